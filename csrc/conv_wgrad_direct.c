/* Weight gradient as products of each tap's inputs with dy, from copies of both in cache; see fc_wgrad in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "wgrad.h"

/* Budgets: pixels of a unit (dy of a panel stays in L1 meanwhile); a block of dw, and the copy of x, in L2. */
enum { PIXELS = 128, SUM_BYTES = 288 * 1024, STAGE_BYTES = 256 * 1024, MAX_OUT = 256, MIN_CHANNELS = 28 };

enum { MAX_LANE_ROWS = 128 };

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

/* Copies `count` positions of a row of the input, from position x on: zeros outside. */
static void copy_row(const fc_wgrad *p, const real *row, int64_t x, int64_t count, int64_t channels, real *to) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int side_by_side = p->merged > 1 && p->form == FC_WGRAD_DIRECT;
    const int64_t low = min64(max64(-x, 0), count), high = max64(min64(l->in_size[2] - x, count), low);
    const int64_t pitch = p->pitch, step = l->in_stride[4];
    memset(to, 0, (size_t)(low * pitch) * sizeof(real));
    memset(to + high * pitch, 0, (size_t)((count - high) * pitch) * sizeof(real));
    if (low == high) return;
    row += (x + low) * step;
    to += low * pitch;
    const int64_t n = high - low;
    if (side_by_side && ((l->in_stride[1] == 1 && step == pitch) || (pitch == 1 && step == 1)))
        k->wgrad_copy(row, 0, n * pitch, 1, to, 0, n * pitch);
    else if (side_by_side)
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < pitch; c++) to[i * pitch + c] = row[i * step + c * l->in_stride[1]];
    else if (l->in_stride[1] == 1)
        k->wgrad_copy(row, step, channels, n, to, pitch, channels);
    else
        for (int64_t c = 0; c < channels; c += k->vl)
            k->channels_in(row + c * l->in_stride[1], l->in_stride[1], step, channels - c, n, to + c, pitch);
}

/* Copies the input under a box, strip by strip; `first` is its first run, `last` its last one. */
static void stage(const fc_wgrad *p, const real *in, int64_t channels, const run *first, const run *last, real *to) {
    const fc_lattice *l = &p->l;
    const int64_t depth = extent(p, 0, last->z - first->z + 1), height = extent(p, 1, last->y - first->y + 1);
    const int64_t width = extent(p, 2, first->count);
    for (int64_t strip = 0; strip < p->strips; strip++, to += p->stage) {
        const int64_t c = channels * strip / p->strips, n = channels * (strip + 1) / p->strips - c;
        real *row = to;
        for (int64_t image = first->image; image <= last->image; image++)
            for (int64_t z = 0; z < depth; z++)
                for (int64_t y = 0; y < height; y++, row += width * p->pitch) {
                    const int64_t iz = first->z * l->step[0] + p->low[0] + z,
                                  iy = first->y * l->step[1] + p->low[1] + y;
                    if (iz < 0 || iz >= l->in_size[0] || iy < 0 || iy >= l->in_size[1])
                        memset(row, 0, (size_t)(width * p->pitch) * sizeof(real));
                    else
                        copy_row(p,
                                 in + image * l->in_stride[0] + iz * l->in_stride[2] + iy * l->in_stride[3] +
                                     c * l->in_stride[1],
                                 first->x * l->step[2] + p->low[2], width, n, row);
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

/* dy of the runs, panel by panel of `pitch` out channels. */
static void copy_panels(const fc_wgrad *p, const real *dy, const fc_wgrad_share *s, const run *runs, int64_t n,
                        int64_t pitch, real *panels) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t channel = l->out_stride[1], step = l->out_stride[4];
    for (int64_t first = s->k0; first < s->k1; first += pitch, panels += PIXELS * pitch) {
        const int64_t lanes = min64(pitch, s->k1 - first);
        for (const run *r = runs; r < runs + n; r++) {
            const real *row = dy + (first - s->k0) * channel + r->image * l->out_stride[0] + r->z * l->out_stride[2] +
                              r->y * l->out_stride[3] + r->x * step;
            real *to = panels + r->pixel * pitch;
            if (channel == 1)
                k->wgrad_copy(row, step, lanes, r->count, to, pitch, pitch);
            else
                for (int64_t c = 0; c < lanes; c += k->vl)
                    k->channels_in(row + c * channel, channel, step, lanes - c, r->count, to + c, pitch);
        }
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

int FC_NAME(fc_wgrad_direct_sum)(const fc_wgrad *p, const real *in, const real *dy, const fc_wgrad_share *s, real *sum,
                                 char *workspace) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t channels = s->c1 - s->c0;
    real *copy = take(&workspace, p->strips * p->stage * (int64_t)sizeof(real));
    real *panels = take(&workspace, ceil_div(p->block_out, k->nr) * PIXELS * k->nr * (int64_t)sizeof(real));
    run runs[PIXELS];
    fc_term terms[PIXELS];
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
        if (p->form == FC_WGRAD_IM2COL) {
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
        copy_panels(p, dy, s, runs, n, k->nr, panels);

        for (int64_t panel = 0; panel * k->nr < s->k1 - s->k0; panel++) {
            const int64_t lanes = min64(k->nr, s->k1 - s->k0 - panel * k->nr);
            const int vectors = lanes > k->vl ? 2 : 1;
            g.b_shift = panel * PIXELS * k->nr;
            g.n = vectors * k->vl;
            real *to = sum + panel * k->nr;
            if (p->form == FC_WGRAD_IM2COL) {
                multiply(p, &g, vectors, 0, l->taps * channels, to);
                continue;
            }
            for (int64_t strip = 0; strip < p->strips; strip++) {
                const int64_t c = channels * strip / p->strips, m = channels * (strip + 1) / p->strips - c;
                for (int64_t t = 0; t < l->taps; t += p->merged) {
                    const int64_t *at = l->tap_at + 3 * t;
                    const int64_t row = (at[0] - p->base[0]) * height + at[1] - p->base[1];
                    multiply(p, &g, vectors, strip * p->stage + (row * width + at[2] - p->base[2]) * p->pitch,
                             m * p->merged, to + (t * channels + c) * p->ldk);
                }
            }
        }
    }
    return 1;
}
