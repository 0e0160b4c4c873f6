/* Forward convolution and data gradient from rows of the input in place or of a padded copy; see fc_direct in
 * fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "fastconv.h"
#include "kernels.h"
#include "pack.h"

/* Terms of one partial sum: the longer, the less often outputs are read back; weights of a panel come from L2 while
 * strips pass by.  Budgets: the copy, in L2; outputs of a panel, in L2. */
enum { CHUNK = 384, STAGE_BYTES = 256 * 1024, PIXELS = 512 };

/* That min_tasks counts. */
enum { TASKS_PER_THREAD = 4 };

enum { LINE = 64 / sizeof(real) };

/* Rows of a tile that lie a multiple of this apart fall into the same set of L1. */
enum { ALIAS_BYTES = 4096 };

/* Input positions that `n` outputs along an axis span. */
static int64_t extent(const fc_direct *p, int axis, int64_t n) { return (n - 1) * p->l.step[axis] + p->span[axis]; }

static int64_t stage_size(const fc_direct *p, const int64_t box[3]) {
    return extent(p, 0, box[0]) * extent(p, 1, box[1]) * extent(p, 2, box[2]) * p->pitch;
}

/* Grows an axis of the box as long as its input fits the budget. */
static void grow(fc_direct *p, int axis) {
    int64_t *box = p->box;
    const int64_t rest = box[0] * box[1] * box[2];
    while (box[axis] < p->l.out_size[axis] && rest * (box[axis] + 1) <= PIXELS) {
        box[axis]++;
        if (stage_size(p, box) > STAGE_BYTES / (int64_t)sizeof(real)) {
            box[axis]--;
            return;
        }
    }
}

static int64_t box_tasks(const fc_direct *p) {
    int64_t n = p->l.batch * p->l.groups;
    for (int a = 0; a < 3; a++) n *= ceil_div(p->l.out_size[a], p->box[a]);
    return n;
}

/* Rows of tiles that one thread of several multiplies, loads of weights for a tile counted as one. */
static int64_t rows_of_a_thread(const fc_direct *p, int64_t threads) {
    const int64_t row = p->box[2] + ceil_div(p->box[2], ((const fc_kernels *)p->l.kernels)->mr);
    return ceil_div(box_tasks(p), threads) * p->box[0] * p->box[1] * row;
}

/* Cuts the outermost axis that is cut into more boxes, if that leaves no thread waiting: 13 boxes are 7 for one of two. */
static void balance(fc_direct *p) {
    const int64_t threads = p->min_tasks / TASKS_PER_THREAD;
    int a = 0;
    while (a < 2 && p->box[a] >= p->l.out_size[a]) a++;
    const int64_t boxes = ceil_div(p->l.out_size[a], p->box[a]);
    if (threads < 2 || boxes < 2) return;
    int64_t best = INT64_MAX, size = p->box[a];
    for (int64_t n = boxes; n <= 2 * boxes && n <= p->l.out_size[a]; n++) {
        p->box[a] = ceil_div(p->l.out_size[a], n);
        const int64_t rows = rows_of_a_thread(p, threads);
        if (rows < best) best = rows, size = p->box[a];
    }
    p->box[a] = size;
}

void FC_NAME(fc_direct_block)(fc_direct *p) {
    fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    flatten(l);
    /* the stride of a single channel says nothing */
    if (l->in_channels * l->groups == 1) l->in_stride[1] = 1;
    if (l->out_channels * l->groups == 1) l->out_stride[1] = 1;
    p->staged = l->in_stride[1] != 1 || l->step[2] * l->in_stride[4] * (int64_t)sizeof(real) % ALIAS_BYTES == 0;
    for (int a = 0; a < 3; a++) {
        int64_t low = INT64_MAX, high = INT64_MIN;
        for (int64_t t = 0; t < l->taps; t++) {
            low = min64(low, l->tap_at[3 * t + a]);
            high = max64(high, l->tap_at[3 * t + a]);
        }
        p->low[a] = l->taps ? low : 0;
        p->span[a] = l->taps ? high - low + 1 : 1;
        p->spacing[a] = p->span[a];
        for (int64_t t = 0; t < l->taps; t++)
            if (l->tap_at[3 * t + a] > low) p->spacing[a] = min64(p->spacing[a], l->tap_at[3 * t + a] - low);
        if (p->low[a] < 0 || p->low[a] + extent(p, a, l->out_size[a]) > l->in_size[a]) p->staged = 1;
    }

    /* Few channels lie side by side, so that taps along a row are one run; many are skewed if pixels would alias. */
    p->pitch = max64(l->in_channels, 1);
    if (p->staged && l->step[2] * p->pitch * (int64_t)sizeof(real) % ALIAS_BYTES == 0)
        p->pitch += 64 / (int64_t)sizeof(real);

    p->skip_along_rows = -p->low[2] >= k->mr || p->low[2] + extent(p, 2, l->out_size[2]) - l->in_size[2] >= k->mr;

    p->reduction = l->taps * l->in_channels;
    p->chunks = p->reduction <= CHUNK + CHUNK / 2 ? 1 : ceil_div(p->reduction, CHUNK);
    p->chunk = max64(ceil_div(p->reduction, p->chunks), 1);
    p->panels = ceil_div(l->out_channels, k->nr);

    int64_t *box = p->box;
    box[0] = box[1] = 1;
    box[2] = max64(min64(l->out_size[2], PIXELS), 1);
    while (box[2] > 2 * k->mr && stage_size(p, box) > 2 * STAGE_BYTES / (int64_t)sizeof(real))
        box[2] = ceil_div(box[2], 2);
    if (box[2] == l->out_size[2]) grow(p, 1);
    if (box[1] == l->out_size[1]) grow(p, 0);
    while (box_tasks(p) < p->min_tasks && box[0] * box[1] * box[2] > 4 * k->mr) {
        const int axis = box[0] > 1 ? 0 : box[1] > 1 ? 1 : 2;
        box[axis] = ceil_div(box[axis], 2);
    }
    balance(p);
    for (int a = 0; a < 3; a++) {
        p->boxes[a] = ceil_div(l->out_size[a], box[a]);
        box[a] = max64(ceil_div(l->out_size[a], max64(p->boxes[a], 1)), 1);
        if (p->boxes[a]) p->boxes[a] = ceil_div(l->out_size[a], box[a]);
    }
    p->panels_per_task = max64(p->panels, 1);
    while (p->panels_per_task > 1 && box_tasks(p) * ceil_div(p->panels, p->panels_per_task) < p->min_tasks)
        p->panels_per_task = ceil_div(p->panels_per_task, 2);
    p->panel_blocks = ceil_div(p->panels, p->panels_per_task);
    p->tasks = l->batch * l->groups * p->boxes[0] * p->boxes[1] * p->boxes[2] * p->panel_blocks;
    p->pack_tasks = l->groups * p->panels;

    const int64_t real_bytes = (int64_t)sizeof(real);
    p->packed_bytes = p->pack_tasks * (p->reduction + 1) * k->nr * real_bytes;
    /* rows of the copy are filled by whole vectors, the last of which may end behind them */
    p->stage = p->staged ? stage_size(p, box) + k->vl : 0;
    p->products = l->out_stride[1] == 1 ? 0 : box[0] * box[1] * box[2] * k->nr;
    p->workspace_bytes = align64(p->stage * real_bytes) + align64(p->products * real_bytes) +
                         align64(2 * (p->chunk + 1) * (int64_t)sizeof(fc_term));
}

void FC_NAME(fc_direct_pack)(const fc_direct *p, const void *w_, void *packed_, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t group = task / p->panels, first = task % p->panels * k->nr;
    const int64_t valid = min64(k->nr, l->out_channels - first);
    const real *w = (const real *)w_ + group * l->w_stride[0] + first * l->w_stride[1];
    real *to = (real *)packed_ + task * (p->reduction + 1) * k->nr;
    pack_panel(l, w, valid, k->nr, weights_end(l, w_), to, to + p->reduction * k->nr);
}

/* What a task works on. */
typedef struct {
    const fc_direct *p;
    int64_t from[3], count[3]; /* outputs */
    int64_t origin[3];         /* input position of the first of them under the lowest tap */
    const real *at_origin;     /* that element, in the input or the copy */
    int64_t stride[3];         /* between its neighbours */
    int skip;                  /* there are products with padding, which are left out: the weights are finite */
    fc_term *terms;
} box;

/* Whether a tap of an output of the box lies at this distance from its origin. */
static int needed(const box *b, int axis, int64_t distance) {
    const fc_direct *p = b->p;
    const int64_t step = p->l.step[axis];
    if (step == 1 && p->spacing[axis] == 1) return 1;
    for (int64_t d = distance; d >= 0 && d > distance - p->span[axis]; d -= p->spacing[axis])
        if (d % step == 0 && d / step < b->count[axis]) return 1;
    return 0;
}

static int outside(const box *b, int axis, int64_t distance) {
    const int64_t i = b->origin[axis] + distance;
    return i < 0 || i >= b->p->l.in_size[axis];
}

/* Copies a row of the input, `width` positions from `x`, with zeros outside. */
static void copy_row(const fc_direct *p, const real *in, int64_t x, int64_t width, real *to) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t low = min64(max64(-x, 0), width), high = max64(min64(l->in_size[2] - x, width), low);
    const size_t pixel = (size_t)l->in_channels * sizeof(real);
    memset(to, 0, (size_t)(low * p->pitch) * sizeof(real));
    real *first = to + low * p->pitch;
    const real *from = in + (x + low) * l->in_stride[4];
    if (l->in_stride[1] != 1) /* the last vector of channels first: what it writes past the end is overwritten */
        for (int64_t c = (l->in_channels - 1) / k->vl * k->vl; c >= 0; c -= k->vl)
            k->channels_in(from + c * l->in_stride[1], l->in_stride[1], l->in_stride[4], l->in_channels - c, high - low,
                           first + c, p->pitch);
    else if (l->in_stride[4] == p->pitch)
        memcpy(first, from, (size_t)(high - low) * pixel);
    else
        for (int64_t i = low; i < high; i++, from += l->in_stride[4]) memcpy(to + i * p->pitch, from, pixel);
    memset(to + high * p->pitch, 0, (size_t)((width - high) * p->pitch) * sizeof(real));
}

static void stage(const box *b, const real *in, real *to) {
    const fc_direct *p = b->p;
    const fc_lattice *l = &p->l;
    const int64_t width = extent(p, 2, b->count[2]);
    for (int64_t z = 0; z < extent(p, 0, b->count[0]); z++) {
        if (!needed(b, 0, z) || (b->skip && outside(b, 0, z))) continue;
        for (int64_t y = 0; y < extent(p, 1, b->count[1]); y++) {
            if (!needed(b, 1, y)) continue;
            real *row = to + z * b->stride[0] + y * b->stride[1];
            if (!outside(b, 0, z) && !outside(b, 1, y))
                copy_row(p, in + (b->origin[0] + z) * l->in_stride[2] + (b->origin[1] + y) * l->in_stride[3],
                         b->origin[2], width, row);
            else if (!b->skip)
                memset(row, 0, (size_t)(width * p->pitch) * sizeof(real));
        }
    }
}

/* The terms of output (0, 0, 0) of the box and panel 0 for the reduction indices [r0, r1): one per tap, joined where
 * taps lie next to each other in memory.  Those of other outputs and panels lie a shift away.  `at`, if given:
 * leaves out the taps that meet only padding for `count` outputs from there. */
static int64_t terms_of(const box *b, const int64_t *at, int64_t count, const real *packed, int64_t r0, int64_t r1,
                        fc_term *terms) {
    const fc_direct *p = b->p;
    const fc_lattice *l = &p->l;
    const int64_t nr = ((const fc_kernels *)l->kernels)->nr;
    int64_t n = 0, c = r0 % max64(l->in_channels, 1);
    const int64_t *tap = l->tap_at + (l->in_channels ? 3 * (r0 / l->in_channels) : 0);
    for (int64_t r = r0, run; r < r1; r += run, tap += 3, c = 0) {
        run = min64(l->in_channels - c, r1 - r);
        const int64_t z = tap[0] - p->low[0], y = tap[1] - p->low[1], x = tap[2] - p->low[2];
        if (at) {
            const int64_t first = b->origin[2] + at[2] * l->step[2] + x, last = first + (count - 1) * l->step[2];
            if (last < 0 || first >= l->in_size[2] || outside(b, 0, at[0] * l->step[0] + z) ||
                outside(b, 1, at[1] * l->step[1] + y))
                continue;
        }
        const real *from = b->at_origin + z * b->stride[0] + y * b->stride[1] + x * b->stride[2] + c;
        const real *weights = packed + r * nr;
        if (n && terms[n - 1].a + terms[n - 1].k == from && terms[n - 1].b + terms[n - 1].k * nr == weights)
            terms[n - 1].k += run;
        else
            terms[n++] = (fc_term){from, weights, run};
    }
    return n;
}

/* Whether some tap of output i along an axis meets padding. */
static int meets_padding(const box *b, int axis, int64_t i) {
    const int64_t first = i * b->p->l.step[axis];
    return outside(b, axis, first) || outside(b, axis, first + b->p->span[axis] - 1);
}

/* The output channels of the panel `shift` elements behind `packed`. */
static void panel(const box *b, const real *packed, int64_t shift, int64_t channels, const real *bias, real *out,
                  real *products) {
    const fc_direct *p = b->p;
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    fc_term *all = b->terms, *some = all + p->chunk + 1;
    const int64_t strips = ceil_div(b->count[2], k->mr), height = b->count[2] / strips, taller = b->count[2] % strips;
    fc_gemm g = {.lda = l->step[2] * b->stride[2], .ldb = k->nr, .n = channels, .b_shift = shift};
    g.ldc = p->products ? k->nr : l->out_stride[4];
    for (int64_t chunk = 0; chunk < p->chunks; chunk++) {
        const int64_t r0 = chunk * p->chunk, r1 = min64(r0 + p->chunk, p->reduction);
        const int64_t n_all = terms_of(b, NULL, 0, packed, r0, r1, all);
        g.add = chunk > 0;
        if (chunk == p->chunks - 1) g.bias_col = bias, g.relu = p->relu;
        const int64_t tiles = b->count[0] * b->count[1] * strips;
        int64_t at[3], tile = 0;
        for (at[0] = 0; at[0] < b->count[0]; at[0]++)
            for (at[1] = 0; at[1] < b->count[1]; at[1]++) {
                real *row = p->products ? products + (at[0] * b->count[1] + at[1]) * b->count[2] * k->nr
                                        : out + at[0] * l->out_stride[2] + at[1] * l->out_stride[3];
                const int skip = b->skip &&
                                 (p->skip_along_rows || meets_padding(b, 0, at[0]) || meets_padding(b, 1, at[1]));
                int64_t count;
                at[2] = 0;
                g.terms = skip ? some : all;
                g.n_terms = skip ? terms_of(b, at, b->count[2], packed, r0, r1, some) : n_all;
                for (int64_t i = 0; i < strips; i++, at[2] += count) { /* of even height */
                    count = height + (i < taller);
                    if (skip && p->skip_along_rows) g.n_terms = terms_of(b, at, count, packed, r0, r1, some);
                    g.a_shift = at[0] * l->step[0] * b->stride[0] + at[1] * l->step[1] * b->stride[1] +
                                at[2] * l->step[2] * b->stride[2];
                    g.c = row + at[2] * g.ldc;
                    fetch_weights(&g, packed + shift + r1 * k->nr, r1 - r0, tile++, tiles);
                    if (g.next && !p->products && !g.add) /* stores would otherwise wait for memory at the end */
                        for (int64_t n = 0; n < count; n++)
                            for (int64_t c = 0; c < channels; c += LINE) __builtin_prefetch(g.c + n * g.ldc + c, 1);
                    k->gemm_row((int)count, channels > k->vl ? 2 : 1, &g);
                }
            }
    }
    if (!p->products) return;
    for (int64_t z = 0; z < b->count[0]; z++)
        for (int64_t y = 0; y < b->count[1]; y++)
            for (int64_t c = 0; c < channels; c += k->vl)
                k->channels_out(products + (z * b->count[1] + y) * b->count[2] * k->nr + c, k->nr, channels - c,
                                b->count[2], out + z * l->out_stride[2] + y * l->out_stride[3] + c * l->out_stride[1],
                                l->out_stride[1], l->out_stride[4]);
}

/* Panels [first, end) of a group. */
typedef struct {
    int64_t first, end, size;    /* size: elements between two of them */
    const real *packed, *checks; /* of the first one: weights, and what pack_panel adds up of them */
} panels;

/* Outputs of one box of one image and group: number `index` of all boxes. */
static void run_box(const fc_direct *p, const real *in, int64_t index, const panels *s, const real *bias, real *out,
                    char *w) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    real *copy = take(&w, p->stage * (int64_t)sizeof(real));
    real *products = take(&w, p->products * (int64_t)sizeof(real));
    box b = {.p = p, .terms = (fc_term *)w};
    int64_t i = index;
    for (int a = 2; a >= 0; a--) {
        b.from[a] = i % p->boxes[a] * p->box[a];
        i /= p->boxes[a];
        b.count[a] = min64(p->box[a], l->out_size[a] - b.from[a]);
        b.origin[a] = b.from[a] * l->step[a] + p->low[a];
    }
    const int64_t group = i % l->groups, image = i / l->groups;
    in += l->in_offset + image * l->in_stride[0] + group * l->in_channels * l->in_stride[1];
    out += l->out_offset + image * l->out_stride[0] + group * l->out_channels * l->out_stride[1];
    for (int a = 0; a < 3; a++) out += b.from[a] * l->out_stride[a + 2];

    b.skip = 0;
    for (int a = 0; a < 3; a++) b.skip |= b.origin[a] < 0 || b.origin[a] + extent(p, a, b.count[a]) > l->in_size[a];
    for (int64_t n = 0; n < s->end - s->first && b.skip; n++)
        for (int lane = 0; lane < k->nr; lane++)
            if (s->checks[n * s->size + lane] != 0) b.skip = 0;
    if (p->staged) {
        b.stride[2] = p->pitch;
        b.stride[1] = extent(p, 2, b.count[2]) * b.stride[2];
        b.stride[0] = extent(p, 1, b.count[1]) * b.stride[1];
        b.at_origin = copy;
        stage(&b, in, copy);
    } else {
        b.at_origin = in;
        for (int a = 0; a < 3; a++) {
            b.stride[a] = l->in_stride[a + 2];
            b.at_origin += b.origin[a] * b.stride[a];
        }
    }
    for (int64_t n = s->first; n < s->end; n++) {
        const int64_t first = n * k->nr;
        panel(&b, s->packed, (n - s->first) * s->size, min64(k->nr, l->out_channels - first),
              bias ? bias + group * l->out_channels + first : NULL, out + first * l->out_stride[1], products);
    }
}

int FC_NAME(fc_direct_run)(const fc_direct *p, const void *in, const void *packed, const void *bias, void *out,
                           void *workspace, int64_t task) {
    const int64_t nr = ((const fc_kernels *)p->l.kernels)->nr;
    const int64_t index = task / p->panel_blocks, boxes = p->boxes[0] * p->boxes[1] * p->boxes[2];
    panels s = {.first = task % p->panel_blocks * p->panels_per_task, .size = (p->reduction + 1) * nr};
    s.end = min64(s.first + p->panels_per_task, p->panels);
    s.packed = (const real *)packed + (index / boxes % p->l.groups * p->panels + s.first) * s.size;
    s.checks = s.packed + p->reduction * nr;
    run_box(p, in, index, &s, bias, out, workspace);
    return 1;
}

/* ---- Weights as they are ---------------------------------------------------------------------------------------- */

/* Boxes of a phase up to which packing is worth saving. */
enum { RAW_BOXES = 8 };

void FC_NAME(fc_direct_raw_block)(fc_direct_raw *p) {
    const fc_kernels *k = p->l.kernels;
    const int64_t panel = (p->l.taps * p->l.in_channels + 1) * k->nr;
    int64_t workspace = 0, boxes = 0, copied = 0;
    for (int64_t i = 0; i < p->n_phases; i++) {
        fc_direct *phase = p->phases + i;
        phase->min_tasks = 1;
        FC_NAME(fc_direct_block)(phase);
        const int64_t n = phase->l.batch * phase->boxes[0] * phase->boxes[1] * phase->boxes[2];
        boxes += n, copied += n * phase->stage;
        workspace = max64(workspace, phase->workspace_bytes);
    }
    p->panels = ceil_div(p->l.out_channels, k->nr);
    p->tasks = p->l.groups * p->panels;
    /* A phase alone would load the weights of all.  Copies are made for each panel anew. */
    p->worth = p->tasks >= p->min_tasks && boxes <= RAW_BOXES * p->n_phases && (p->n_phases > 1 || copied <= panel);
    p->workspace_bytes = align64(panel * (int64_t)sizeof(real)) + align64(workspace);
}

int FC_NAME(fc_direct_raw_run)(const fc_direct_raw *p, const void *in, const void *w_, const void *bias, void *out,
                               void *workspace_, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t nr = ((const fc_kernels *)l->kernels)->nr, group = task / p->panels, n = task % p->panels;
    const int64_t size = (l->taps * l->in_channels + 1) * nr;
    const real *w = (const real *)w_ + group * l->w_stride[0] + n * nr * l->w_stride[1];
    char *workspace = workspace_;
    real *packed = take(&workspace, size * (int64_t)sizeof(real)), *checks = packed + size - nr;
    pack_panel(l, w, min64(nr, l->out_channels - n * nr), nr, weights_end(l, w_), packed, checks);
    panels s = {.first = n, .end = n + 1, .packed = packed, .checks = checks};
    for (int64_t i = 0; i < p->n_phases; i++) {
        const fc_direct *phase = p->phases + i;
        const int64_t boxes = phase->boxes[0] * phase->boxes[1] * phase->boxes[2];
        for (int64_t image = 0; image < phase->l.batch; image++)
            for (int64_t b = 0; b < boxes; b++)
                run_box(phase, in, (image * l->groups + group) * boxes + b, &s, bias, out, workspace);
        s.packed += phase->reduction * nr;
    }
    return 1;
}
