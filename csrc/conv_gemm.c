/* Forward convolution and data gradient in cache-sized blocks around the gemm kernels; see fc_conv in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "fastconv.h"
#include "kernels.h"
#include "pack.h"

/* A run of output pixels that one tile covers: rows of the tile if pixels are rows, else its columns. */
typedef struct {
    int64_t pixel, count;
    const real *in; /* the first pixel's patch origin, if the patches are read in place; else null */
    real *gathered; /* else the patches of the current chunk */
    int regular;    /* consecutive pixels lie out_stride[4] apart in the output */
} strip;

/* Terms of one partial sum: the longer, the less often outputs are read back.  Budget of the gathered patches, in L2. */
enum { CHUNK = 384, GATHER_BYTES = 128 * 1024, MIN_TASKS = 16 };

void FC_NAME(fc_conv_block)(fc_conv *p) {
    fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    flatten(l);
    p->pixels_are_rows = l->out_stride[1] == 1 && l->out_channels > 1 &&
                         (2 * l->out_channels >= k->vl || l->out_stride[4] != 1);
    p->out_is_flat = (l->out_size[1] == 1 || l->out_stride[3] == l->out_size[2] * l->out_stride[4]) &&
                     (l->out_size[0] == 1 || l->out_stride[2] == l->out_size[1] * l->out_size[2] * l->out_stride[4]);

    p->reduction = l->taps * l->in_channels;
    p->chunks = p->reduction <= CHUNK + CHUNK / 2 ? 1 : ceil_div(p->reduction, CHUNK);
    p->chunk = max64(ceil_div(p->reduction, p->chunks), 1);

    /* Strips stay within a row of pixels where patches can be read in place and rows are long enough for it. */
    const int64_t unit = p->pixels_are_rows ? k->mr : k->nr, row = max64(l->out_size[2], 1);
    const int64_t in_place_stride = p->pixels_are_rows ? l->in_stride[1] : l->step[2] * l->in_stride[4];
    p->by_rows = !l->gather && in_place_stride == 1 && row >= (p->pixels_are_rows ? (unit + 1) / 2 : unit);

    for (int a = 0; a < 3; a++) {
        p->tap_low[a] = INT64_MAX, p->tap_high[a] = INT64_MIN;
        for (int64_t t = 0; t < l->taps; t++) {
            p->tap_low[a] = min64(p->tap_low[a], l->tap_at[3 * t + a]);
            p->tap_high[a] = max64(p->tap_high[a], l->tap_at[3 * t + a]);
        }
    }
    if (!l->taps) p->by_rows = 0;

    p->pixels = l->out_size[0] * l->out_size[1] * l->out_size[2];
    int64_t block = max64(GATHER_BYTES / (int64_t)sizeof(real) / p->chunk / unit, 2) * unit;
    const int64_t whole = p->by_rows && row <= block ? row : unit; /* that blocks are made of */
    block = even_piece(ceil_div(p->pixels, whole), block / whole) * whole;
    p->block_pixels = max64(min64(block, p->pixels), 1);
    p->blocks = ceil_div(p->pixels, p->block_pixels);
    p->max_strips = ceil_div(p->block_pixels, unit) + (p->by_rows ? p->block_pixels / row + 1 : 0);

    p->panels = ceil_div(l->out_channels, p->pixels_are_rows ? k->nr : k->mr);
    p->panels_per_task = max64(p->panels, 1);
    while (p->panels_per_task > 1 &&
           l->batch * l->groups * p->blocks * ceil_div(p->panels, p->panels_per_task) < MIN_TASKS)
        p->panels_per_task = ceil_div(p->panels_per_task, 2);
    p->panel_blocks = ceil_div(p->panels, p->panels_per_task);

    p->tasks = l->batch * l->groups * p->blocks * p->panel_blocks;
    p->pack_tasks = l->groups * p->panels;
    p->packed_bytes = p->pack_tasks * p->reduction * (p->pixels_are_rows ? k->nr : k->mr) * (int64_t)sizeof(real);
    p->workspace_bytes = align64(p->max_strips * (int64_t)sizeof(strip)) +
                         align64((p->chunk + 1) * (int64_t)sizeof(fc_term)) +
                         align64(k->mr * k->nr * (int64_t)sizeof(real)) +
                         align64(p->max_strips * unit * p->chunk * (int64_t)sizeof(real));
}

void FC_NAME(fc_conv_pack)(const fc_conv *p, const void *w_, void *packed_, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t lanes = p->pixels_are_rows ? k->nr : k->mr;
    const int64_t group = task / p->panels, first = task % p->panels * lanes,
                  valid = min64(lanes, l->out_channels - first);
    const real *w = (const real *)w_ + group * l->w_stride[0] + first * l->w_stride[1];
    real *to = (real *)packed_ + task * p->reduction * lanes;
    pack_panel(l, w, valid, lanes, weights_end(l, w_), to, NULL);
}

/* Whether every tap of every pixel of the strip lies inside the input. */
static int inside(const fc_conv *p, const int64_t first[3], int64_t count) {
    const fc_lattice *l = &p->l;
    for (int a = 0; a < 3; a++) {
        const int64_t low = first[a] * l->step[a] + p->tap_low[a];
        const int64_t high = (first[a] + (a == 2 ? count - 1 : 0)) * l->step[a] + p->tap_high[a];
        if (low < 0 || high >= l->in_size[a]) return 0;
    }
    return 1;
}

/* Cuts the pixels [from, to) into strips. */
static int64_t cut(const fc_conv *p, const real *in, int64_t from, int64_t to, strip *strips, real *gathered) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t unit = p->pixels_are_rows ? k->mr : k->nr, row = l->out_size[2];
    int64_t n = 0;
    for (int64_t pixel = from; pixel < to; n++) {
        const int64_t at[3] = {pixel / row / l->out_size[1], pixel / row % l->out_size[1], pixel % row};
        int64_t left = to - pixel;
        if (p->by_rows) left = min64(left, row - at[2]);
        /* Rows of a tile may be any number: share them out evenly.  Columns are vectors: fill them. */
        const int64_t count = p->pixels_are_rows ? ceil_div(left, ceil_div(left, unit)) : min64(left, unit);
        strip *s = strips + n;
        s->pixel = pixel, s->count = count;
        s->regular = p->out_is_flat || at[2] + count <= row;
        s->in = NULL;
        s->gathered = gathered + (p->pixels_are_rows ? (pixel - from) * p->chunk
                                  : p->by_rows       ? n * unit * p->chunk
                                                     : pixel - from);
        const int whole = p->pixels_are_rows || count % k->vl == 0; /* vector loads must not run past the row */
        if (p->by_rows && whole && inside(p, at, count))
            s->in = in + at[0] * l->step[0] * l->in_stride[2] + at[1] * l->step[1] * l->in_stride[3] +
                    at[2] * l->step[2] * l->in_stride[4];
        pixel += count;
    }
    return n;
}

/* The terms of a strip that is read in place: one per tap, joined where taps lie next to each other in memory. */
static int64_t terms_in_place(const fc_conv *p, const real *patch, const real *packed, int64_t r0, int64_t r1,
                              fc_term *terms) {
    const fc_lattice *l = &p->l;
    const int64_t lanes = p->pixels_are_rows ? ((const fc_kernels *)l->kernels)->nr
                                             : ((const fc_kernels *)l->kernels)->mr;
    int64_t n = 0, c = l->in_channels ? r0 % l->in_channels : 0;
    const int64_t *at = l->tap_at + (l->in_channels ? 3 * (r0 / l->in_channels) : 0);
    for (int64_t r = r0; r < r1; at += 3, c = 0) {
        const int64_t count = min64(l->in_channels - c, r1 - r);
        const real *from = patch + at[0] * l->in_stride[2] + at[1] * l->in_stride[3] + at[2] * l->in_stride[4] +
                           c * l->in_stride[1];
        const real *weights = packed + (r - r0) * lanes;
        if (n && p->pixels_are_rows && terms[n - 1].a + terms[n - 1].k == from)
            terms[n - 1].k += count;
        else {
            terms[n].a = p->pixels_are_rows ? from : weights;
            terms[n].b = p->pixels_are_rows ? weights : from;
            terms[n++].k = count;
        }
        r += count;
    }
    return n;
}

static int64_t out_offset(const fc_lattice *l, int64_t pixel) {
    const int64_t w = pixel % l->out_size[2], h = pixel / l->out_size[2] % l->out_size[1];
    const int64_t d = pixel / l->out_size[2] / l->out_size[1];
    return d * l->out_stride[2] + h * l->out_stride[3] + w * l->out_stride[4];
}

/* Adds a tile into an output that no tile can be stored to directly, with the epilogue. */
static void scatter(const fc_conv *p, const strip *s, const real *tile, int64_t ld, int64_t channels, int add, int last,
                    const real *bias, real *out) {
    const fc_lattice *l = &p->l;
    for (int64_t i = 0; i < s->count; i++) {
        real *to = out + out_offset(l, s->pixel + i);
        for (int64_t j = 0; j < channels; j++) {
            real v = p->pixels_are_rows ? tile[i * ld + j] : tile[j * ld + i];
            if (add) v += to[j * l->out_stride[1]];
            if (last && bias) v += bias[j];
            if (last && p->relu && v < 0) v = 0;
            to[j * l->out_stride[1]] = v;
        }
    }
}

/* One tile: weight panel `panel` times one strip, chunk [r0, r1). */
static void tile(const fc_conv *p, const strip *s, const real *packed, int64_t panel, int64_t r0, int64_t r1,
                 const real *bias, real *out, fc_term *terms, real *spare) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t lanes = p->pixels_are_rows ? k->nr : k->mr, first = panel * lanes;
    const int64_t channels = min64(lanes, l->out_channels - first);
    const real *weights = packed + (panel * p->reduction + r0) * lanes;
    const int add = r0 > 0, last = r1 == p->reduction;
    const int direct = s->regular && l->out_stride[p->pixels_are_rows ? 1 : 4] == 1;
    real *to = out + first * l->out_stride[1];
    if (bias) bias += first;

    fc_gemm g = {.terms = terms, .c = spare, .ldc = k->nr};
    if (s->in)
        g.n_terms = terms_in_place(p, s->in, weights, r0, r1, terms);
    else {
        terms[0].a = p->pixels_are_rows ? s->gathered : weights;
        terms[0].b = p->pixels_are_rows ? weights : s->gathered;
        terms[0].k = r1 - r0;
        g.n_terms = 1;
    }
    if (direct) {
        g.c = to + out_offset(l, s->pixel);
        g.ldc = l->out_stride[p->pixels_are_rows ? 4 : 1];
        g.add = add;
        if (last) {
            g.relu = p->relu;
            *(p->pixels_are_rows ? &g.bias_col : &g.bias_row) = bias;
        }
    }
    if (p->pixels_are_rows) {
        g.n = channels;
        g.lda = s->in ? l->step[2] * l->in_stride[4] : p->chunk;
        g.ldb = lanes;
        k->gemm_row((int)s->count, channels > k->vl ? 2 : 1, &g);
    } else {
        g.n = s->count;
        g.lda = lanes;
        g.ldb = s->in ? l->in_stride[1] : p->by_rows ? k->nr : p->max_strips * k->nr;
        k->gemm_col((int)channels, s->count > k->vl ? 2 : 1, &g);
    }
    if (!direct) scatter(p, s, spare, k->nr, channels, add, last, bias, to);
}

int FC_NAME(fc_conv_run)(const fc_conv *p, const void *in_, const void *packed_, const void *bias_, void *out_,
                         void *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t panel_block = task % p->panel_blocks, block = task / p->panel_blocks % p->blocks;
    const int64_t group = task / p->panel_blocks / p->blocks % l->groups;
    const int64_t image = task / p->panel_blocks / p->blocks / l->groups;
    const int64_t lanes = p->pixels_are_rows ? k->nr : k->mr, unit = p->pixels_are_rows ? k->mr : k->nr;
    const real *in = (const real *)in_ + l->in_offset + image * l->in_stride[0] +
                     group * l->in_channels * l->in_stride[1];
    const real *packed = (const real *)packed_ + group * p->panels * p->reduction * lanes;
    const real *bias = bias_ ? (const real *)bias_ + group * l->out_channels : NULL;
    real *out = (real *)out_ + l->out_offset + image * l->out_stride[0] + group * l->out_channels * l->out_stride[1];

    char *w = workspace;
    strip *strips = take(&w, p->max_strips * (int64_t)sizeof(strip));
    fc_term *terms = take(&w, (p->chunk + 1) * (int64_t)sizeof(fc_term));
    real *spare = take(&w, k->mr * k->nr * (int64_t)sizeof(real));
    real *gathered = take(&w, p->max_strips * unit * p->chunk * (int64_t)sizeof(real));

    const int64_t from = block * p->block_pixels, to = min64(from + p->block_pixels, p->pixels);
    const int64_t n_strips = cut(p, in, from, to, strips, gathered);
    const int64_t first_panel = panel_block * p->panels_per_task;
    const int64_t last_panel = min64(first_panel + p->panels_per_task, p->panels);

    fc_gather g = {.in = in, .in_channels = l->in_channels, .tap_at = l->tap_at, .width = unit};
    for (int a = 0; a < 3; a++) g.in_size[a] = l->in_size[a], g.out_size[a] = l->out_size[a], g.step[a] = l->step[a];
    for (int a = 0; a < 4; a++) g.in_stride[a] = l->in_stride[a + 1];

    for (int64_t chunk = 0; chunk < p->chunks; chunk++) {
        g.r0 = chunk * p->chunk, g.r1 = min64(g.r0 + p->chunk, p->reduction);
        if (!p->by_rows && g.r0 < g.r1) { /* the whole block at once: the longer the runs, the better */
            g.pixel = from, g.pixels = to - from;
            g.ld = p->pixels_are_rows ? p->chunk : p->max_strips * k->nr;
            g.width = g.ld;
            (p->pixels_are_rows ? k->gather_rows : k->gather_panel)(&g, gathered);
        }
        for (int64_t i = 0; i < n_strips && p->by_rows && g.r0 < g.r1; i++) {
            if (strips[i].in) continue;
            g.pixel = strips[i].pixel, g.pixels = strips[i].count;
            g.ld = p->pixels_are_rows ? p->chunk : k->nr;
            (p->pixels_are_rows ? k->gather_rows : k->gather_panel)(&g, strips[i].gathered);
        }
        /* The operand that is packed weights, a panel of nr columns or mr rows, stays in L1 over all strips. */
        for (int64_t panel = first_panel; panel < last_panel; panel++)
            for (int64_t i = 0; i < n_strips; i++)
                tile(p, strips + i, packed, panel, g.r0, g.r1, bias, out, terms, spare);
    }
    return 1;
}
