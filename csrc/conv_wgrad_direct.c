/* Weight gradient as products of each tap's inputs with dy, from copies of both in cache; see fc_wgrad in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "wgrad.h"

/* Budgets: pixels of a unit (dy of a panel stays in L1 meanwhile); a block of dw, and the copy of x, in L2. */
enum { PIXELS = 128, SUM_BYTES = 288 * 1024, STAGE_BYTES = 256 * 1024, MAX_OUT = 256, MIN_CHANNELS = 28 };

/* Rows of sums of a call; pieces of a pixel that are copied together. */
enum { MAX_LANE_ROWS = 128, PIECES = 32 };

/* Output pixels [at, at + count) of a row, `pixel` of the unit's first ones. */
typedef struct {
    int64_t image, z, y, x, count, pixel;
} run;

static int64_t extent(const fc_wgrad *p, int axis, int64_t n) { return (n - 1) * p->l.step[axis] + p->span[axis]; }

static int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

/* Elements of a strip's copy for the box. */
static int64_t stage_size(const fc_wgrad *p) {
    return p->box[0] * extent(p, 0, p->box[1]) * extent(p, 1, p->box[2]) * extent(p, 2, p->box[3]) * p->pitch;
}

static void choose_box(fc_wgrad *p) {
    const fc_lattice *l = &p->l;
    const int64_t size[4] = {l->batch, l->out_size[0], l->out_size[1], l->out_size[2]};
    const int64_t blocks = l->groups * ceil_div(l->in_channels, p->block_channels) *
                           ceil_div(l->out_channels, p->block_out);
    /* Of one image, units of half the size are dealt out to threads more evenly. */
    const int few = blocks < 4 && size[0] * size[1] * size[2] * size[3] < 16 * PIXELS;
    const int64_t most_pixels = few ? PIXELS / 2 : PIXELS;
    int64_t pixels = 1;
    for (int a = 3; a >= 0; a--) {
        p->box[a] = 1;
        const int64_t most = max64(min64(size[a], most_pixels / pixels), 1);
        while (p->box[a] < most) {
            p->box[a]++;
            if (p->strips * stage_size(p) <= STAGE_BYTES / (int64_t)sizeof(real)) continue;
            p->box[a]--;
            break;
        }
        p->boxes[a] = ceil_div(size[a], p->box[a]);
        if (p->boxes[a]) p->box[a] = ceil_div(size[a], p->boxes[a]); /* boxes of even size */
        pixels *= p->box[a];
        if (p->box[a] < size[a])
            for (a--; a >= 0; a--) p->box[a] = 1, p->boxes[a] = size[a];
    }
}

/* Where all taps lie at one position along an axis, the inputs that steps leave out are no part of the problem. */
static void drop_unread(fc_wgrad *p) {
    fc_lattice *l = &p->l;
    for (int a = 0; a < 3; a++) {
        const int64_t step = l->step[a];
        if (p->span[a] != 1 || step == 1) continue;
        const int64_t residue = (p->low[a] % step + step) % step;
        l->in_offset += residue * l->in_stride[a + 2];
        l->in_size[a] = ceil_div(max64(l->in_size[a] - residue, 0), step);
        l->in_stride[a + 2] *= step;
        l->step[a] = 1;
        p->low[a] = (p->low[a] - residue) / step;
    }
}

/* Of few pixels, more and smaller blocks keep threads busy for less than sums of shares of them do: a block more
 * along one side copies the operand of the other side once more, so that they stay worth CUT_MACS each; of one tap,
 * copying is most of the work. */
enum { MAX_CUT = 8, CUT_MACS = 4000000 };

static void cut_blocks(fc_wgrad *p) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t out = round_up(max64(l->out_channels, 1), k->vl);
    const int64_t pixels = l->batch * l->out_size[0] * l->out_size[1] * l->out_size[2];
    const int64_t macs = pixels * l->taps * l->in_channels * l->out_channels * l->groups;
    const int64_t most = min64(MAX_CUT, macs / CUT_MACS), shares = max64(pixels / SPLIT_PIXELS, 1);
    int64_t channel_blocks = ceil_div(l->in_channels, max64(p->block_channels, 1)),
            out_blocks = ceil_div(out, p->block_out);
    while (2 * l->groups * channel_blocks * out_blocks * shares <= most) {
        const int out_side = p->block_out > k->nr, channel_side = p->block_channels > 2 * k->mr;
        if (!out_side && !channel_side) break;
        if (out_side && (!channel_side || l->in_channels * l->step[0] * l->step[1] * l->step[2] < l->out_channels))
            p->block_out = round_up(ceil_div(out, 2 * out_blocks), k->nr), out_blocks = ceil_div(out, p->block_out);
        else
            p->block_channels = ceil_div(l->in_channels, 2 * channel_blocks),
            channel_blocks = ceil_div(l->in_channels, p->block_channels);
    }
    p->ldk = p->block_out;
    p->strips = ceil_div(p->block_channels, k->mr);
}

void FC_NAME(fc_wgrad_direct_block)(fc_wgrad *p) {
    fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t real_bytes = (int64_t)sizeof(real);
    int64_t side_by_side = 1; /* taps of a run of them along a row */
    for (int a = 0; a < 3; a++) {
        int64_t low = INT64_MAX, high = INT64_MIN;
        for (int64_t t = 0; t < l->taps; t++) {
            low = min64(low, l->tap_at[3 * t + a]);
            high = max64(high, l->tap_at[3 * t + a]);
        }
        p->base[a] = p->low[a] = l->taps ? low : 0;
        p->span[a] = l->taps ? high - low + 1 : 1;
    }
    while (side_by_side < l->taps && l->tap_at[3 * side_by_side + 2] == l->tap_at[2] + side_by_side &&
           l->tap_at[3 * side_by_side + 1] == l->tap_at[1] && l->tap_at[3 * side_by_side] == l->tap_at[0])
        side_by_side++;

    const int64_t per_out = max64(l->taps, 1) * real_bytes;
    const int64_t channels = max64(l->in_channels, 1), out = round_up(max64(l->out_channels, 1), k->vl);
    if (p->form == FC_WGRAD_CHANNELWISE) {
        drop_unread(p);
        p->group = l->in_channels, p->group_out = l->out_channels;
        l->out_channels *= l->groups, l->groups = 1;
        p->block_channels = channels;
        p->pitch = k->vl;
        p->strips = 1;
        /* Taps of a row side by side, if there is a kernel for so many. */
        p->merged = side_by_side == 3 || side_by_side == 5 || side_by_side == 7 ? side_by_side : 1;
    } else if (p->form == FC_WGRAD_IM2COL) {
        p->block_channels = min64(channels, max64(SUM_BYTES / (k->nr * per_out), 1));
        p->pitch = p->block_channels * max64(l->taps, 1);
        p->merged = p->strips = 1;
    } else {
        drop_unread(p);
        /* Even blocks, about as many channels as out channels where there are many of both. */
        int64_t most = max64(SUM_BYTES / per_out / min64(out, 64), MIN_CHANNELS);
        if (most > 128 && channels > 128) most = max64(128, SUM_BYTES / per_out / min64(out, MAX_OUT));
        p->block_channels = ceil_div(channels, ceil_div(channels, most));
        p->merged = side_by_side > 1 && 2 * channels <= k->mr ? side_by_side : 1;
        p->strips = p->merged > 1 ? 1 : ceil_div(p->block_channels, k->mr);
        p->pitch = p->merged > 1 ? channels : round_up(k->mr, k->vl);
    }
    const int64_t most_out = max64(SUM_BYTES / per_out / p->block_channels / k->nr, 1) * k->nr;
    p->block_out = min64(min64(most_out, MAX_OUT), out);
    p->block_out = ceil_div(out, p->block_out) > 1 ? round_up(ceil_div(out, ceil_div(out, p->block_out)), k->nr) : out;
    p->ldk = p->block_out;
    if (p->form == FC_WGRAD_CHANNELWISE) {
        p->block_out = k->vl / max64(max64(p->group, p->group_out), 1) * p->group_out;
        p->ldk = k->vl;
    }

    if (p->form == FC_WGRAD_DIRECT && p->merged == 1 && l->taps > 1) cut_blocks(p);

    const int64_t panels = ceil_div(p->block_out, k->nr);
    if (p->form == FC_WGRAD_IM2COL) {
        const int64_t plane = l->out_size[0] * l->out_size[1] * l->out_size[2];
        p->box[3] = max64(min64(plane, PIXELS), 1), p->boxes[3] = ceil_div(plane, p->box[3]);
        p->units = l->batch * p->boxes[3];
        p->stage = p->box[3] * p->pitch;
    } else {
        choose_box(p);
        p->units = p->boxes[0] * p->boxes[1] * p->boxes[2] * p->boxes[3];
        p->stage = round_up(stage_size(p) + k->vl, k->vl); /* copies of rows end in whole vectors */
    }
    p->min_units = 1;
    p->workspace_bytes = align64(p->strips * p->stage * real_bytes) + align64(panels * PIXELS * k->nr * real_bytes);
}

/* The rows of pixels of a unit; returns how many. */
static int64_t runs_of(const fc_wgrad *p, int64_t unit, run runs[PIXELS]) {
    const fc_lattice *l = &p->l;
    int64_t n = 0, pixel = 0;
    if (p->form == FC_WGRAD_IM2COL) {
        const int64_t row = l->out_size[2], plane = l->out_size[0] * l->out_size[1] * row;
        const int64_t image = unit / p->boxes[3], first = unit % p->boxes[3] * p->box[3];
        const int64_t last = min64(first + p->box[3], plane);
        for (int64_t at = first, count; at < last; at += count, pixel += count) {
            count = min64(last - at, row - at % row);
            runs[n++] = (run){image, at / row / l->out_size[1], at / row % l->out_size[1], at % row, count, pixel};
        }
        return n;
    }
    const int64_t size[4] = {l->batch, l->out_size[0], l->out_size[1], l->out_size[2]};
    int64_t from[4], to[4];
    for (int a = 3; a >= 0; a--) {
        from[a] = unit % p->boxes[a] * p->box[a];
        to[a] = min64(from[a] + p->box[a], size[a]);
        unit /= p->boxes[a];
    }
    for (int64_t i = from[0]; i < to[0]; i++)
        for (int64_t z = from[1]; z < to[1]; z++)
            for (int64_t y = from[2]; y < to[2]; y++, pixel += to[3] - from[3])
                runs[n++] = (run){i, z, y, from[3], to[3] - from[3], pixel};
    return n;
}

/* Copies of a row of pixels, whose channels lie `channel` apart in memory; of neighbouring ones whole pixels at a
 * time. */
typedef struct {
    const fc_kernels *k;
    int64_t channel;
    fc_wgrad_copy g;
    int64_t from_at[PIECES], to_at[PIECES], lanes[PIECES];
} copier;

static void copy_pieces(copier *c) {
    if (!c->g.pieces) return;
    c->g.from_at = c->from_at, c->g.to_at = c->to_at, c->g.lanes = c->lanes;
    c->k->wgrad_copy(&c->g);
    c->g.pieces = 0;
}

/* Of channels [first, first + n), to `at` and on. */
static void copy_strip(copier *c, int64_t first, int64_t n, int64_t at) {
    const fc_wgrad_copy *g = &c->g;
    const int64_t vl = c->k->vl;
    for (int64_t end = first + n; first < end; first += vl, at += vl) {
        if (c->channel != 1) {
            c->k->channels_in(g->from + first * c->channel, c->channel, g->step, end - first, g->count, g->to + at,
                              g->pitch);
            continue;
        }
        if (g->pieces == PIECES) copy_pieces(c);
        c->from_at[g->pieces] = first, c->to_at[g->pieces] = at;
        c->lanes[c->g.pieces++] = min64(end - first, vl);
    }
}

/* Copies strips [s0, s1) of `count` positions of a row of the input, from position x on: zeros outside, and of a
 * null row. */
static void copy_row(const fc_wgrad *p, const real *row, int64_t x, int64_t count, int64_t channels, int64_t s0,
                     int64_t s1, real *to) {
    const fc_lattice *l = &p->l;
    const int side_by_side = p->merged > 1 && p->form == FC_WGRAD_DIRECT;
    const int64_t low = row ? min64(max64(-x, 0), count) : count, high = max64(min64(l->in_size[2] - x, count), low);
    const int64_t pitch = p->pitch, step = l->in_stride[4];
    for (int64_t strip = s0; strip < s1; strip++) {
        memset(to + strip * p->stage, 0, (size_t)(low * pitch) * sizeof(real));
        memset(to + strip * p->stage + high * pitch, 0, (size_t)((count - high) * pitch) * sizeof(real));
    }
    if (low == high) return;
    row += (x + low) * step;
    to += low * pitch;
    const int64_t n = high - low;
    if (side_by_side && ((l->in_stride[1] == 1 && step == pitch) || (pitch == 1 && step == 1)))
        memcpy(to, row, (size_t)(n * pitch) * sizeof(real));
    else if (side_by_side)
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < pitch; c++) to[i * pitch + c] = row[i * step + c * l->in_stride[1]];
    else {
        copier c; /* whose arrays are left as they are: rows are short */
        c.k = l->kernels, c.channel = l->in_stride[1];
        c.g = (fc_wgrad_copy){.from = row, .to = to, .step = step, .pitch = pitch, .count = n};
        for (int64_t strip = s0; strip < s1; strip++) {
            const int64_t c0 = channels * strip / p->strips, c1 = channels * (strip + 1) / p->strips;
            copy_strip(&c, c0, c1 - c0, strip * p->stage);
        }
        copy_pieces(&c);
    }
}

/* Copies the input under a box, in strips; `first` is its first run, `last` its last one.  Memory is read in its order:
 * whole pixels, or the rows of a strip's channels. */
static void stage(const fc_wgrad *p, const real *in, int64_t channels, const run *first, const run *last, real *copy) {
    const fc_lattice *l = &p->l;
    const int64_t depth = extent(p, 0, last->z - first->z + 1), height = extent(p, 1, last->y - first->y + 1);
    const int64_t width = extent(p, 2, first->count), together = l->in_stride[1] == 1 ? p->strips : 1;
    for (int64_t strip = 0; strip < p->strips; strip += together) {
        real *to = copy;
        for (int64_t image = first->image; image <= last->image; image++)
            for (int64_t z = 0; z < depth; z++)
                for (int64_t y = 0; y < height; y++, to += width * p->pitch) {
                    const int64_t iz = first->z * l->step[0] + p->low[0] + z,
                                  iy = first->y * l->step[1] + p->low[1] + y;
                    const int inside = iz >= 0 && iz < l->in_size[0] && iy >= 0 && iy < l->in_size[1];
                    const real *row = in + image * l->in_stride[0] + iz * l->in_stride[2] + iy * l->in_stride[3];
                    copy_row(p, inside ? row : NULL, first->x * l->step[2] + p->low[2], width, channels, strip,
                             strip + together, to);
                }
    }
}

/* Patches of all taps of the channels of a block: [pixel][tap][channel]. */
static void gather(const fc_wgrad *p, const real *in, const fc_wgrad_share *s, const run *first, int64_t pixels,
                   real *to) {
    const fc_lattice *l = &p->l;
    const int64_t channels = s->c1 - s->c0;
    fc_gather g = {.in = in + first->image * l->in_stride[0], .in_channels = channels, .tap_at = l->tap_at};
    for (int a = 0; a < 3; a++) g.in_size[a] = l->in_size[a], g.out_size[a] = l->out_size[a], g.step[a] = l->step[a];
    for (int a = 0; a < 4; a++) g.in_stride[a] = l->in_stride[a + 1];
    g.pixel = (first->z * l->out_size[1] + first->y) * l->out_size[2] + first->x;
    g.pixels = pixels;
    g.r1 = g.ld = l->taps * channels;
    ((const fc_kernels *)l->kernels)->gather_rows(&g, to);
}

static const real *row_of(const fc_lattice *l, const real *dy, const run *r) {
    const int64_t *stride = l->out_stride;
    return dy + r->image * stride[0] + r->z * stride[2] + r->y * stride[3] + r->x * stride[4];
}

/* dy of the runs, panel by panel of `pitch` out channels. */
static void copy_panels(const fc_wgrad *p, const real *dy, const fc_wgrad_share *s, const run *runs, int64_t n,
                        int64_t pitch, real *panels) {
    const fc_lattice *l = &p->l;
    const int64_t step = l->out_stride[4], channels = s->k1 - s->k0;
    copier c;
    c.k = l->kernels, c.channel = l->out_stride[1];
    const int64_t together = c.channel == 1 ? channels : pitch;
    for (int64_t from = 0; from < channels; from += together)
        for (int64_t i = 0; i < n;) {
            const run *r = runs + i;
            const real *row = row_of(l, dy, r);
            int64_t count = 0; /* of rows that follow each other in memory */
            while (i < n && row_of(l, dy, runs + i) == row + count * step) count += runs[i++].count;
            c.g = (fc_wgrad_copy){
                .from = row, .to = panels + r->pixel * pitch, .step = step, .pitch = pitch, .count = count};
            for (int64_t first = from; first < min64(from + together, channels); first += pitch)
                copy_strip(&c, first, min64(pitch, channels - first), first * PIXELS);
            copy_pieces(&c);
        }
}

/* Products of more terms wait for memory so seldom that fetching ahead only takes time from them. */
enum { AHEAD_TERMS = 256, AHEAD_ROWS = 256 };

/* What the next unit copies, on its way to L2 while this one is multiplied: `n` pieces of `bytes`, `step` bytes
 * apart. */
typedef struct {
    const char *at;
    int64_t step, n, bytes;
} ahead_row;

typedef struct {
    ahead_row rows[AHEAD_ROWS];
    int64_t n, lines, row, piece, byte; /* lines: in all; then the place that has been reached */
    int64_t quota;                      /* lines at a time */
} ahead;

static void add_ahead(ahead *a, const real *at, int64_t channel, int64_t step, int64_t channels, int64_t count) {
    const int64_t size = (int64_t)sizeof(real);
    if (a->n == AHEAD_ROWS || count <= 0) return;
    ahead_row *r = a->rows + a->n++;
    r->at = (const char *)at;
    if (channel == 1 && step == channels)
        *r = (ahead_row){r->at, 0, 1, channels * count * size};
    else if (channel == 1)
        *r = (ahead_row){r->at, step * size, count, channels * size};
    else
        *r = (ahead_row){r->at, channel * size, channels, count * size};
    a->lines += r->n * (r->bytes / 64 + 1);
}

/* `calls`: of fetch_ahead. */
static void look_ahead(const fc_wgrad *p, const real *in, const real *dy, const fc_wgrad_share *s, int64_t unit,
                       int64_t calls, ahead *next) {
    const fc_lattice *l = &p->l;
    const int64_t channels = s->c1 - s->c0, *xs = l->in_stride, *ys = l->out_stride;
    next->n = next->lines = next->row = next->piece = next->byte = next->quota = 0;
    if (unit == s->to || l->taps * channels > AHEAD_TERMS) return;
    run runs[PIXELS];
    const int64_t n = runs_of(p, unit, runs);
    for (const run *r = runs; r < runs + n; r++)
        add_ahead(next, row_of(l, dy, r), ys[1], ys[4], s->k1 - s->k0, r->count);
    const run *first = runs, *last = runs + n - 1;
    int64_t from[3], to[3]; /* of an image */
    const int64_t at[3] = {first->z, first->y, min64(first->x, last->x)};
    const int64_t end[3] = {last->z, last->y, max64(first->x + first->count, last->x + last->count) - 1};
    for (int a = 0; a < 3; a++) {
        from[a] = max64(at[a] * l->step[a] + p->low[a], 0);
        to[a] = min64(end[a] * l->step[a] + p->low[a] + p->span[a], l->in_size[a]);
    }
    for (int64_t image = first->image; image <= last->image; image++)
        for (int64_t z = from[0]; z < to[0]; z++)
            for (int64_t y = from[1]; y < to[1]; y++)
                add_ahead(next, in + image * xs[0] + z * xs[2] + y * xs[3] + from[2] * xs[4], xs[1], xs[4], channels,
                          to[2] - from[2]);
    next->quota = ceil_div(next->lines, max64(calls, 1));
}

static void fetch_ahead(ahead *a) {
    for (int64_t lines = a->quota; lines > 0 && a->row < a->n; lines--) {
        const ahead_row *r = a->rows + a->row;
        const char *piece = r->at + a->piece * r->step;
        __builtin_prefetch(piece + a->byte, 0, 2);
        if (a->byte == 0) a->byte = -(int64_t)((uintptr_t)piece & 63);
        a->byte += 64;
        if (a->byte < r->bytes) continue;
        a->byte = 0;
        if (++a->piece == r->n) a->piece = 0, a->row++;
    }
}

/* Adds to rows [0, rows) of the result, which are contiguous columns of the copy at `at`, cut into even tiles. */
static void multiply(const fc_wgrad *p, fc_gemm *g, int vectors, int64_t at, int64_t rows, real *sum) {
    const fc_kernels *k = p->l.kernels;
    const int64_t tiles = ceil_div(rows, k->mr);
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t r0 = rows * i / tiles, r1 = rows * (i + 1) / tiles;
        g->a_shift = at + r0;
        g->c = sum + r0 * p->ldk;
        k->gemm_col((int)(r1 - r0), vectors, g);
    }
}

/* The sum of a share of groups of few channels. */
static void sum_lanes(const fc_wgrad *p, const real *in, const real *dy, const fc_wgrad_share *s, real *sum, real *copy,
                      real *panels) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t groups = (s->k1 - s->k0) / p->group_out, taps = l->taps / p->merged;
    run runs[PIXELS];
    fc_term terms[PIXELS];
    int64_t rows[MAX_LANE_ROWS];
    lane pick[64] = {0};
    for (int64_t i = 0; i < k->vl && p->group_out > 0; i++) /* lanes behind the last group repeat one */
        pick[i] = (lane)(min64(i / p->group_out, max64(groups - 1, 0)) * p->group);
    in += s->k0 / p->group_out * p->group * l->in_stride[1];
    for (int64_t unit = s->from; unit < s->to; unit++) {
        const int64_t n = runs_of(p, unit, runs);
        const run *first = runs, *last = runs + n - 1;
        const int64_t width = extent(p, 2, first->count), height = extent(p, 1, last->y - first->y + 1);
        const int64_t depth = extent(p, 0, last->z - first->z + 1);
        stage(p, in, groups * p->group, first, last, copy);
        copy_panels(p, dy, s, runs, n, k->vl, panels);
        for (int64_t i = 0; i < n; i++) {
            const run *r = runs + i;
            const int64_t z = (r->image - first->image) * depth + (r->z - first->z) * l->step[0];
            const int64_t row = z * height + (r->y - first->y) * l->step[1];
            terms[i] = (fc_term){copy + row * width * p->pitch, panels + r->pixel * k->vl, r->count};
        }
        fc_wgrad_lanes g = {.runs = terms,
                            .n_runs = n,
                            .x_step = l->step[2] * p->pitch,
                            .rows = rows,
                            .width = p->merged,
                            .group = p->group,
                            .pick = p->group > 1 || p->group_out > 1 ? pick : NULL,
                            .add = unit > s->from};
        for (int64_t from = 0; from < taps; from += g.n_rows) {
            g.n_rows = min64(taps - from, MAX_LANE_ROWS);
            for (int64_t i = 0; i < g.n_rows; i++) {
                const int64_t *at = l->tap_at + 3 * (from + i) * p->merged;
                const int64_t row = (at[0] - p->base[0]) * height + at[1] - p->base[1];
                rows[i] = (row * width + at[2] - p->base[2]) * p->pitch;
            }
            g.sum = sum + from * p->merged * p->group * k->vl;
            k->wgrad_lanes(&g);
        }
    }
}

/* Whether both operands of the product of one tap can be read where they are.  With more rows, pixels lie so far
 * apart that L1 cannot hold them, and tiles read them too often. */
enum { IN_PLACE_ROWS = 128 };

static int in_place(const fc_wgrad *p, const fc_wgrad_share *s) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    if (p->form != FC_WGRAD_IM2COL || l->taps != 1 || s->c1 - s->c0 > IN_PLACE_ROWS || l->in_stride[1] != 1 ||
        l->out_stride[1] != 1 || (s->k1 - s->k0) % k->vl)
        return 0;
    for (int a = 0; a < 3; a++)
        if (p->low[a] < 0 || (l->out_size[a] - 1) * l->step[a] + p->low[a] >= l->in_size[a]) return 0;
    return 1;
}

int FC_NAME(fc_wgrad_direct_sum)(const fc_wgrad *p, const real *in, const real *dy, const fc_wgrad_share *s, real *sum,
                                 char *workspace) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t channels = s->c1 - s->c0;
    real *copy = take(&workspace, p->strips * p->stage * (int64_t)sizeof(real));
    real *panels = take(&workspace, ceil_div(p->block_out, k->nr) * PIXELS * k->nr * (int64_t)sizeof(real));
    run runs[PIXELS];
    fc_term terms[PIXELS];
    ahead next;
    const int uncopied = in_place(p, s);
    if (s->from == s->to) memset(sum, 0, (size_t)(l->taps * channels * p->ldk) * sizeof(real));
    if (p->form == FC_WGRAD_CHANNELWISE) {
        sum_lanes(p, in, dy, s, sum, copy, panels);
        return 1;
    }

    for (int64_t unit = s->from; unit < s->to; unit++) {
        const int64_t n = runs_of(p, unit, runs);
        const run *first = runs, *last = runs + n - 1;
        fc_gemm g = {.terms = terms, .n_terms = n, .ldb = k->nr, .ldc = p->ldk, .add = unit > s->from};
        const int64_t width = extent(p, 2, first->count), height = extent(p, 1, last->y - first->y + 1);
        const int64_t depth = extent(p, 0, last->z - first->z + 1);
        if (uncopied) {
            for (int64_t i = 0; i < n; i++) {
                const run *r = runs + i;
                const int64_t at[3] = {r->z, r->y, r->x};
                const real *x = in + r->image * l->in_stride[0];
                for (int a = 0; a < 3; a++) x += (at[a] * l->step[a] + p->low[a]) * l->in_stride[a + 2];
                terms[i] = (fc_term){x, row_of(l, dy, r), r->count};
            }
            g.lda = l->step[2] * l->in_stride[4], g.ldb = l->out_stride[4];
        } else if (p->form == FC_WGRAD_IM2COL) {
            const int64_t pixels = last->pixel + last->count;
            gather(p, in, s, first, pixels, copy);
            terms[0] = (fc_term){copy, panels, pixels};
            g.n_terms = 1;
            g.lda = l->taps * channels;
        } else {
            stage(p, in, channels, first, last, copy);
            for (int64_t i = 0; i < n; i++) {
                const run *r = runs + i;
                const int64_t z = (r->image - first->image) * depth + (r->z - first->z) * l->step[0];
                const int64_t row = z * height + (r->y - first->y) * l->step[1];
                terms[i] = (fc_term){copy + row * width * p->pitch, panels + r->pixel * k->nr, r->count};
            }
            g.lda = l->step[2] * p->pitch;
        }
        if (!uncopied) copy_panels(p, dy, s, runs, n, k->nr, panels);
        const int64_t panels_read = ceil_div(s->k1 - s->k0, k->nr);
        const int64_t products = p->form == FC_WGRAD_IM2COL ? 1 : p->strips * l->taps / p->merged;
        /* One panel in place is read from end to end, as processors expect. */
        look_ahead(p, in, dy, s, uncopied && panels_read == 1 ? s->to : unit + 1, panels_read * products, &next);

        for (int64_t panel = 0; panel * k->nr < s->k1 - s->k0; panel++) {
            const int64_t lanes = min64(k->nr, s->k1 - s->k0 - panel * k->nr);
            const int vectors = lanes > k->vl ? 2 : 1;
            g.b_shift = panel * (uncopied ? 1 : PIXELS) * k->nr;
            g.n = vectors * k->vl;
            real *to = sum + panel * k->nr;
            if (p->form == FC_WGRAD_IM2COL) {
                fetch_ahead(&next);
                multiply(p, &g, vectors, 0, l->taps * channels, to);
                continue;
            }
            for (int64_t strip = 0; strip < p->strips; strip++) {
                const int64_t c = channels * strip / p->strips, m = channels * (strip + 1) / p->strips - c;
                for (int64_t t = 0; t < l->taps; t += p->merged) {
                    const int64_t *at = l->tap_at + 3 * t;
                    const int64_t row = (at[0] - p->base[0]) * height + at[1] - p->base[1];
                    fetch_ahead(&next);
                    multiply(p, &g, vectors, strip * p->stage + (row * width + at[2] - p->base[2]) * p->pitch,
                             m * p->merged, to + (t * channels + c) * p->ldk);
                }
            }
        }
    }
    return 1;
}
