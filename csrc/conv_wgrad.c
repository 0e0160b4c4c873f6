/* Weight gradient in cache-sized blocks around the gemm kernels; see fc_wgrad in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "fastconv.h"
#include "kernels.h"

/* Pixels per partial sum (the operand dy of a panel stays in L1 meanwhile); results per task; tasks wanted. */
enum { PANEL_BYTES = 16 * 1024, BLOCK_ROWS = 96, BLOCK_COLS = 256, MIN_TASKS = 16, MIN_CHUNKS_PER_SPLIT = 4 };

void FC_NAME(fc_wgrad_block)(fc_wgrad *p) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    p->reduction = l->taps * l->in_channels;
    p->pixels = l->batch * l->out_size[0] * l->out_size[1] * l->out_size[2];
    p->chunk = PANEL_BYTES / (int64_t)sizeof(real) / k->nr;
    p->chunks = ceil_div(p->pixels, p->chunk);
    p->in_rows_are_channels = l->in_stride[1] == 1 || l->step[2] * l->in_stride[4] != 1;
    p->in_place = !l->gather && l->in_stride[1] == 1;
    p->dy_in_place = p->in_place && l->out_stride[1] == 1 && l->out_channels % k->vl == 0;

    p->block_rows = min64(BLOCK_ROWS / k->mr * k->mr, max64(p->reduction, 1));
    p->block_cols = min64(BLOCK_COLS, ceil_div(max64(l->out_channels, 1), k->nr) * k->nr);
    p->row_blocks = ceil_div(p->reduction, p->block_rows);
    p->col_blocks = ceil_div(l->out_channels, p->block_cols);
    const int64_t tiles = l->groups * p->row_blocks * p->col_blocks;
    p->splits = 1;
    if (tiles > 0 && tiles < MIN_TASKS)
        p->splits = max64(min64(ceil_div(MIN_TASKS, tiles), p->chunks / MIN_CHUNKS_PER_SPLIT), 1);
    p->tasks = tiles * p->splits;
    p->merge_tasks = p->splits > 1 ? l->groups * p->row_blocks : 0;
    p->partial_bytes = p->splits > 1 ? p->splits * l->groups * p->reduction * l->out_channels * (int64_t)sizeof(real)
                                     : 0;
    p->workspace_bytes = align64(p->block_rows * p->block_cols * (int64_t)sizeof(real)) +
                         align64(p->chunk * (p->block_rows + p->block_cols) * (int64_t)sizeof(real)) +
                         align64((p->chunk + 1) * (int64_t)sizeof(fc_term));
}

/* Where row r, column k of the result lies in dw. */
static int64_t dw_offset(const fc_lattice *l, int64_t group, int64_t r, int64_t k) {
    return group * l->w_stride[0] + k * l->w_stride[1] + r % l->in_channels * l->w_stride[2] +
           l->tap_w[r / l->in_channels];
}

/* A range of the flattened reduction index (image, pixel). */
typedef struct {
    int64_t from, to;
} range;

/* The patches of rows [r0, r1) over a chunk: [pixel][r] or [r][pixel]. */
static void gather_patches(const fc_wgrad *p, const real *in, range q, int64_t r0, int64_t r1, real *to) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t plane = l->out_size[0] * l->out_size[1] * l->out_size[2];
    fc_gather g = {.in_channels = l->in_channels, .tap_at = l->tap_at, .r0 = r0, .r1 = r1};
    for (int a = 0; a < 3; a++) g.in_size[a] = l->in_size[a], g.out_size[a] = l->out_size[a], g.step[a] = l->step[a];
    for (int a = 0; a < 4; a++) g.in_stride[a] = l->in_stride[a + 1];
    g.ld = p->in_rows_are_channels ? r1 - r0 : p->chunk;
    for (int64_t at = q.from; at < q.to; at += g.pixels) {
        g.in = in + at / plane * l->in_stride[0];
        g.pixel = at % plane;
        g.pixels = g.width = min64(q.to - at, plane - g.pixel);
        if (p->in_rows_are_channels)
            k->gather_rows(&g, to + (at - q.from) * g.ld);
        else
            k->gather_panel(&g, to + (at - q.from));
    }
}

/* dy of columns [k0, k1) over a chunk: [pixel][column], `ld` apart. */
static void gather_dy(const fc_wgrad *p, const real *dy, range q, int64_t k0, int64_t k1, int64_t ld, real *to) {
    static const int64_t centre[3] = {0, 0, 0};
    const fc_lattice *l = &p->l;
    const int64_t plane = l->out_size[0] * l->out_size[1] * l->out_size[2];
    fc_gather g = {.in_channels = l->out_channels, .tap_at = centre, .r0 = k0, .r1 = k1, .ld = ld};
    for (int a = 0; a < 3; a++) g.in_size[a] = g.out_size[a] = l->out_size[a], g.step[a] = 1;
    for (int a = 0; a < 4; a++) g.in_stride[a] = l->out_stride[a + 1];
    for (int64_t at = q.from; at < q.to; at += g.pixels) {
        g.in = dy + at / plane * l->out_stride[0];
        g.pixel = at % plane;
        g.pixels = min64(q.to - at, plane - g.pixel);
        ((const fc_kernels *)l->kernels)->gather_rows(&g, to + (at - q.from) * ld);
    }
}

/* The terms of one tap over a chunk, both operands in place: one per row of pixels, clipped to where the tap lies
 * inside the input.  dy is at `dy`, or, if it was gathered, row by row at `panel`. */
static int64_t terms_in_place(const fc_wgrad *p, const real *in, const real *dy, const real *panel, int64_t ldb,
                              range q, int64_t tap, fc_term *terms) {
    const fc_lattice *l = &p->l;
    const int64_t *at = l->tap_at + 3 * tap, row = l->out_size[2], step = l->step[2];
    int64_t n = 0;
    for (int64_t i = q.from; i < q.to;) {
        const int64_t w = i % row, h = i / row % l->out_size[1], d = i / row / l->out_size[1] % l->out_size[0];
        const int64_t image = i / row / l->out_size[1] / l->out_size[0];
        const int64_t count = min64(q.to - i, row - w);
        const int64_t z = d * l->step[0] + at[0], y = h * l->step[1] + at[1];
        /* Columns [low, high) of the row have their input inside. */
        const int64_t low = max64(w, at[2] < 0 ? ceil_div(-at[2], step) : 0);
        const int64_t high = l->in_size[2] > at[2] ? min64(w + count, (l->in_size[2] - 1 - at[2]) / step + 1) : 0;
        if (z >= 0 && z < l->in_size[0] && y >= 0 && y < l->in_size[1] && low < high) {
            terms[n].a = in + image * l->in_stride[0] + z * l->in_stride[2] + y * l->in_stride[3] +
                         (low * step + at[2]) * l->in_stride[4];
            terms[n].b = panel ? panel + (i - q.from + low - w) * ldb
                               : dy + image * l->out_stride[0] + d * l->out_stride[2] + h * l->out_stride[3] +
                                     low * l->out_stride[4];
            terms[n++].k = high - low;
        }
        i += count;
    }
    return n;
}

void FC_NAME(fc_wgrad_run)(const fc_wgrad *p, const void *in_, const void *dy_, void *dw_, void *partial_,
                           void *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t split = task % p->splits, col_block = task / p->splits % p->col_blocks;
    const int64_t row_block = task / p->splits / p->col_blocks % p->row_blocks;
    const int64_t group = task / p->splits / p->col_blocks / p->row_blocks;
    const int64_t r0 = row_block * p->block_rows, r1 = min64(r0 + p->block_rows, p->reduction), rows = r1 - r0;
    const int64_t k0 = col_block * p->block_cols, k1 = min64(k0 + p->block_cols, l->out_channels), cols = k1 - k0;
    const real *in = (const real *)in_ + l->in_offset + group * l->in_channels * l->in_stride[1];
    const real *dy = (const real *)dy_ + l->out_offset + group * l->out_channels * l->out_stride[1];

    char *w = workspace;
    real *sum = take(&w, p->block_rows * p->block_cols * (int64_t)sizeof(real));
    real *patches = take(&w, p->chunk * (p->block_rows + p->block_cols) * (int64_t)sizeof(real));
    real *panels = patches + p->chunk * p->block_rows;
    fc_term *terms = take(&w, (p->chunk + 1) * (int64_t)sizeof(fc_term));
    memset(sum, 0, (size_t)(rows * p->block_cols) * sizeof(real));

    const int64_t first = p->chunks * split / p->splits, last = p->chunks * (split + 1) / p->splits;
    for (int64_t chunk = first; chunk < last; chunk++) {
        const range q = {chunk * p->chunk, min64((chunk + 1) * p->chunk, p->pixels)};
        fc_gemm g = {.terms = terms, .n_terms = 1, .ldc = p->block_cols, .add = 1};
        if (!p->in_place) gather_patches(p, in, q, r0, r1, patches);
        if (!p->dy_in_place) gather_dy(p, dy, q, k0, k1, p->block_cols, panels);
        g.ldb = p->dy_in_place ? l->out_stride[4] : p->block_cols;

        for (int64_t r = r0, m; r < r1; r += m) {
            m = min64(k->mr, r1 - r);
            if (p->in_place) {
                const int64_t tap = r / l->in_channels, c = r % l->in_channels;
                m = min64(m, l->in_channels - c);
                g.n_terms = terms_in_place(p, in + c, dy + k0, p->dy_in_place ? NULL : panels, g.ldb, q, tap, terms);
                g.lda = l->step[2] * l->in_stride[4];
            } else {
                terms[0].a = patches + (r - r0) * (p->in_rows_are_channels ? 1 : p->chunk);
                terms[0].b = panels;
                terms[0].k = q.to - q.from;
                g.lda = p->in_rows_are_channels ? rows : p->chunk;
            }
            for (int64_t j = 0; j < cols; j += k->nr) {
                g.n = min64(k->nr, cols - j);
                g.c = sum + (r - r0) * p->block_cols + j;
                const int vectors = g.n > k->vl ? 2 : 1;
                (p->in_place || p->in_rows_are_channels ? k->gemm_col : k->gemm_row)((int)m, vectors, &g);
                for (int64_t t = 0; t < g.n_terms; t++) terms[t].b += k->nr;
            }
        }
    }

    if (p->splits == 1)
        for (int64_t r = r0; r < r1; r++)
            for (int64_t j = k0; j < k1; j++)
                ((real *)dw_)[dw_offset(l, group, r, j)] = sum[(r - r0) * p->block_cols + j - k0];
    else
        for (int64_t r = r0; r < r1; r++)
            memcpy((real *)partial_ + ((split * l->groups + group) * p->reduction + r) * l->out_channels + k0,
                   sum + (r - r0) * p->block_cols, (size_t)cols * sizeof(real));
}

void FC_NAME(fc_wgrad_merge)(const fc_wgrad *p, const void *partial_, void *dw_, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t group = task / p->row_blocks, r0 = task % p->row_blocks * p->block_rows;
    const int64_t part = l->groups * p->reduction * l->out_channels;
    for (int64_t r = r0; r < min64(r0 + p->block_rows, p->reduction); r++)
        for (int64_t j = 0; j < l->out_channels; j++) {
            const real *from = (const real *)partial_ + (group * p->reduction + r) * l->out_channels + j;
            real s = 0;
            for (int64_t split = 0; split < p->splits; split++) s += from[split * part];
            ((real *)dw_)[dw_offset(l, group, r, j)] = s;
        }
}

int FC_NAME(fc_wgrad_finite)(const fc_wgrad *p, const void *dy_, int64_t image) {
    const fc_lattice *l = &p->l;
    const real *dy = (const real *)dy_ + l->out_offset + image * l->out_stride[0];
    const int64_t channels = l->groups * l->out_channels;
    /* 0 * v is NaN exactly for the values looked for.  The inner loop runs over whichever axis is contiguous. */
    const int nhwc = l->out_stride[1] == 1;
    const int64_t inner = nhwc ? channels : l->out_size[2], inner_stride = l->out_stride[nhwc ? 1 : 4];
    const int64_t outer = nhwc ? l->out_size[2] : channels, outer_stride = l->out_stride[nhwc ? 4 : 1];
    real s = 0;
    for (int64_t d = 0; d < l->out_size[0]; d++)
        for (int64_t h = 0; h < l->out_size[1]; h++)
            for (int64_t o = 0; o < outer; o++) {
                const real *v = dy + d * l->out_stride[2] + h * l->out_stride[3] + o * outer_stride;
                for (int64_t i = 0; i < inner; i++) s += 0 * v[i * inner_stride];
            }
    return s == 0;
}
