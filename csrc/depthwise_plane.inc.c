/* Depthwise convolution of planes whose pixels are contiguous (NCHW): lanes are pixels of a row.
 *
 * The input of a channel is copied with its padding, so that no output is special.  A tile is a few output rows of one
 * or more vectors; with 3 x 3 taps, each input vector that is loaded serves up to three of its rows:
 *
 *      input row 0    taps of row 0 for output row 0
 *                1    row 1 for 0, row 0 for 1
 *                2    row 2 for 0, row 1 for 1, row 0 for 2   ..
 *
 * Taps are added in row-major order in every tile.  Tiles at the end of a row or plane overlap the ones before, and compute
 * the same numbers again. */
#include "kernels.h"
#include "simd.h"

/* Rows of a tile; most rows and vectors of any; whether the weights of 3 x 3 taps fit registers. */
#if FC_VBYTES == 64
enum { SHARED_ROWS = 4, PLANE_ROWS = 7, PLANE_VECTORS = 4, NINE_WEIGHTS = 1 };
#else
enum { SHARED_ROWS = 4, PLANE_ROWS = 4, PLANE_VECTORS = 2, NINE_WEIGHTS = 0 };
#endif

/* One input row under one row of taps for each of the outputs [row, row_end); w: taps of the row for output 0. */
FC_INLINE void FC_NAME(plane_line)(const int vectors, const int row, const int row_end, const fc_depthwise_plane *g,
                                   const real *x, const int64_t *at, const real *w,
                                   vec acc[PLANE_ROWS][PLANE_VECTORS]) {
    const int64_t w_row = g->width;
    for (int64_t t = 0; t < g->width; t++, w++) {
        const real *from = x + g->columns[t];
        vec v[PLANE_VECTORS];
    FC_UNROLL for (int i = 0; i < vectors; i++) v[i] = vload(from + at[i]);
        if (row + 1 < row_end)
            FC_UNROLL for (int i = 0; i < vectors; i++) FC_KEEP(v[i]);
        FC_UNROLL for (int r = row; r < row_end; r++) {
            const real s = w[-r * w_row];
            FC_UNROLL for (int i = 0; i < vectors; i++) acc[r][i] += s * v[i];
        }
    }
}

/* Neighbouring outputs share input rows: tap row j of output row r is input row r + j. */
FC_INLINE void FC_NAME(plane_shared)(const int vectors, const fc_depthwise_plane *g, int64_t offset, const int64_t *at,
                                     vec acc[PLANE_ROWS][PLANE_VECTORS]) {
    const real *w = g->w;
    const int64_t w_row = g->width;
    for (int64_t slice = 0; slice < g->n_slices; slice++, w += g->height * w_row) {
        const real *x = g->slices[slice] + offset;
        for (int64_t i = 0; i < g->height + SHARED_ROWS - 1; i++, x += g->tap_row) {
            const int row = i < g->height ? 0 : (int)(i - g->height + 1), row_end = (int)lesser(i + 1, SHARED_ROWS);
#define FC_LINE(from, to)                                                                   \
    case (from)*8 + (to):                                                                   \
        FC_NAME(plane_line)(vectors, from, to, g, x, at, w + i * w_row, acc);               \
        break;
            switch (row * 8 + row_end) {
                FC_LINE(0, 1)
                FC_LINE(0, 2)
                FC_LINE(0, 3)
                FC_LINE(0, 4)
                FC_LINE(1, 2)
                FC_LINE(1, 3)
                FC_LINE(1, 4)
                FC_LINE(2, 3)
                FC_LINE(2, 4)
                FC_LINE(3, 4)
            }
#undef FC_LINE
        }
    }
}

/* 3 x 3 taps, the input rows of neighbouring outputs being `step` apart: all weights of a slice in registers. */
FC_INLINE void FC_NAME(plane_3x3)(const int rows, const int vectors, const int step, const fc_depthwise_plane *g, int64_t offset,
                                  const int64_t *at, vec acc[PLANE_ROWS][PLANE_VECTORS]) {
    const real *from_w = g->w;
    for (int64_t slice = 0; slice < g->n_slices; slice++) {
        vec w[9];
        FC_UNROLL for (int t = 0; t < 9; t++) w[t] = vset(*from_w++);
        const real *x = g->slices[slice] + offset;
        FC_UNROLL for (int i = 0; i < (rows - 1) * step + 3; i++, x += g->tap_row)
            FC_UNROLL for (int t = 0; t < 3; t++)
                FC_UNROLL for (int k = 0; k < vectors; k++) {
                    vec v = vload(x + g->columns[t] + at[k]);
                    FC_KEEP(v);
                    FC_UNROLL for (int r = 0; r < rows; r++) {
                        const int j = i - r * step;
                        if (j >= 0 && j < 3) acc[r][k] += v * w[3 * j + t];
                    }
                }
    }
}

/* `rows` outputs by themselves, any distances. */
FC_INLINE void FC_NAME(plane_apart)(const int rows, const int vectors, const fc_depthwise_plane *g, int64_t offset,
                                    const int64_t *at, vec acc[PLANE_ROWS][PLANE_VECTORS]) {
    const real *w = g->w;
    for (int64_t slice = 0; slice < g->n_slices; slice++)
        for (int64_t j = 0; j < g->height; j++)
            for (int64_t t = 0; t < g->width; t++, w++) {
                const real *x = g->slices[slice] + offset + j * g->tap_row + g->columns[t], s = *w;
                FC_UNROLL for (int r = 0; r < rows; r++, x += g->next_row)
                    FC_UNROLL for (int i = 0; i < vectors; i++) acc[r][i] += s * vload(x + at[i]);
            }
}

/* kind: 0 apart, 1 shared, 2 and 3 for 3 x 3 taps at step 1 and 2. */
FC_INLINE void FC_NAME(plane_tile)(const int kind, const int rows, const int vectors, const fc_depthwise_plane *g,
                                   int64_t h, int64_t u) {
    int64_t at[PLANE_VECTORS];
    FC_UNROLL for (int i = 0; i < vectors; i++) {
        const int64_t last = g->pixels - VL, next = u + i * VL;
        at[i] = last < 0 ? 0 : lesser(next, last);
    }
    vec acc[PLANE_ROWS][PLANE_VECTORS];
    FC_UNROLL for (int r = 0; r < rows; r++) FC_UNROLL for (int i = 0; i < vectors; i++) acc[r][i] = (vec){0};
    const int64_t offset = h * g->next_row;
    if (kind == 0)
        FC_NAME(plane_apart)(rows, vectors, g, offset, at, acc);
    else if (kind == 1)
        FC_NAME(plane_shared)(vectors, g, offset, at, acc);
    else
        FC_NAME(plane_3x3)(rows, vectors, kind - 1, g, offset, at, acc);
    if (g->bias)
        FC_UNROLL for (int r = 0; r < rows; r++) FC_UNROLL for (int i = 0; i < vectors; i++) acc[r][i] += *g->bias;
    if (g->relu)
        FC_UNROLL for (int r = 0; r < rows; r++) FC_UNROLL for (int i = 0; i < vectors; i++)
            acc[r][i] = vrelu(acc[r][i]);
    real *to = g->out + h * g->out_row;
    if (g->out_step == 1 && g->pixels >= VL) {
        FC_UNROLL for (int r = 0; r < rows; r++) FC_UNROLL for (int i = 0; i < vectors; i++)
            vstore(to + r * g->out_row + at[i], acc[r][i]);
        return;
    }
    /* A short row may run into the next ones, which are written later. */
    const int64_t end = g->rows * g->out_row;
    FC_UNROLL for (int r = 0; r < rows; r++) FC_UNROLL for (int i = 0; i < vectors; i++) {
        if (g->dense && (h + r) * g->out_row + VL <= end)
            vstore(to + r * g->out_row, acc[r][i]);
        else
            store_few(to + r * g->out_row + at[i] * g->out_step, g->out_step, lesser(g->pixels, VL), acc[r][i]);
    }
}

FC_INLINE void FC_NAME(plane_strip)(const int kind, const int rows, const int most, const fc_depthwise_plane *g,
                                    int64_t h) {
    for (int64_t u = 0; u < g->pixels;) {
        const int64_t left = g->pixels - u;
        if (most == 4 && left > 3 * VL) {
            FC_NAME(plane_tile)(kind, rows, 4, g, h, u);
            u += 4 * VL;
        } else if (left > VL) {
            FC_NAME(plane_tile)(kind, rows, 2, g, h, u);
            u += 2 * VL;
        } else {
            FC_NAME(plane_tile)(kind, rows, 1, g, h, u);
            u += VL;
        }
    }
}

FC_INLINE void FC_NAME(plane_rows)(const int kind, const int rows, const int most, const fc_depthwise_plane *plane) {
    const fc_depthwise_plane copy = *plane, *g = &copy; /* which no store can change */
    for (int64_t h = 0; h < g->rows; h += rows)
        FC_NAME(plane_strip)(kind, rows, most, g, lesser(h, g->rows - rows));
}

static void depthwise_plane(const fc_depthwise_plane *g) {
    const int nine = NINE_WEIGHTS && g->height == 3 && g->width == 3;
    if (g->rows < SHARED_ROWS)
        FC_NAME(plane_rows)(0, 1, PLANE_VECTORS, g);
    else if (nine && g->next_row == g->tap_row && g->rows >= PLANE_ROWS)
        FC_NAME(plane_rows)(2, PLANE_ROWS, 2, g);
    else if (nine && g->next_row == 2 * g->tap_row)
        FC_NAME(plane_rows)(3, SHARED_ROWS, 2, g);
    else if (g->next_row == g->tap_row)
        FC_NAME(plane_rows)(1, SHARED_ROWS, PLANE_VECTORS, g);
    else
        FC_NAME(plane_rows)(0, SHARED_ROWS, PLANE_VECTORS, g);
}

/* The even and the odd elements of a and b. */
FC_INLINE void FC_NAME(unzip)(vec a, vec b, vec *even, vec *odd) {
#ifdef __clang__ /* has no shuffle by a computed mask */
    vec e, o;
    for (int i = 0; i < VL; i++) {
        e[i] = 2 * i < VL ? a[(2 * i) & (VL - 1)] : b[(2 * i) & (VL - 1)];
        o[i] = 2 * i < VL ? a[(2 * i + 1) & (VL - 1)] : b[(2 * i + 1) & (VL - 1)];
    }
    *even = e, *odd = o;
#else
    mask at;
    for (int i = 0; i < VL; i++) at[i] = 2 * i;
    *even = __builtin_shuffle(a, b, at);
    *odd = __builtin_shuffle(a, b, at + 1);
#endif
}

/* Lanes below `lanes`. */
FC_INLINE mask FC_NAME(lanes_below)(int64_t lanes) {
    mask keep;
    for (int i = 0; i < VL; i++) keep[i] = i < lanes ? -1 : 0;
    return keep;
}

FC_INLINE vec FC_NAME(load_masked)(const real *p, mask keep) { return (vec)((mask)vload(p) & keep); }

/* Rows without gaps, in whole vectors of which the last one is masked. */
FC_INLINE void FC_NAME(pad_whole)(const fc_pad *g, int64_t rows) {
    const int64_t width = g->width, last = (width - 1) / VL * VL;
    const mask keep = FC_NAME(lanes_below)(width - last);
    const real *from = g->from;
    real *to = g->to + g->lead;
    const int64_t row_stride = g->row_stride, to_row = g->to_row;
    for (int64_t y = 0; y < rows; y++, from += row_stride, to += to_row) {
        for (int64_t x = 0; x < last; x += VL) vstore(to + x, vload(from + x));
        vstore(to + last, FC_NAME(load_masked)(from + last, keep));
    }
}

/* The same, dealt out to even and odd columns. */
FC_INLINE void FC_NAME(pad_pairs)(const fc_pad *g, int64_t rows) {
    const int64_t width = g->width, last = (width - 1) / (2 * VL) * (2 * VL);
    const mask keep[2] = {FC_NAME(lanes_below)(width - last), FC_NAME(lanes_below)(width - last - VL)};
    const real *from = g->from;
    real *first = g->to + g->lead % 2 * g->deal + g->lead / 2;
    real *second = g->to + (g->lead + 1) % 2 * g->deal + (g->lead + 1) / 2;
    const int64_t row_stride = g->row_stride, to_row = g->to_row;
    for (int64_t y = 0; y < rows; y++, from += row_stride, first += to_row, second += to_row) {
        vec even, odd;
        for (int64_t x = 0; x < last; x += 2 * VL) {
            FC_NAME(unzip)(vload(from + x), vload(from + x + VL), &even, &odd);
            vstore(first + x / 2, even);
            vstore(second + x / 2, odd);
        }
        FC_NAME(unzip)
        (FC_NAME(load_masked)(from + last, keep[0]), FC_NAME(load_masked)(from + last + VL, keep[1]), &even, &odd);
        vstore(first + last / 2, even);
        vstore(second + last / 2, odd);
    }
}

static void pad_rows(const fc_pad *g) {
    const int64_t whole = g->step * VL, read = (g->width + whole - 1) / whole * whole;
    int64_t y = 0;
    if (g->x_stride == 1 && g->step <= 2 && g->readable >= read) {
        y = g->row_stride ? lesser(g->rows, (g->readable - read) / g->row_stride + 1) : g->rows;
        if (g->step == 1)
            FC_NAME(pad_whole)(g, y);
        else
            FC_NAME(pad_pairs)(g, y);
    }
    for (; y < g->rows; y++) {
        const real *from = g->from + y * g->row_stride;
        real *to = g->to + y * g->to_row;
        if (g->step == 1)
            for (int64_t x = 0; x < g->width; x++) to[g->lead + x] = from[x * g->x_stride];
        else
            for (int64_t x = 0; x < g->width; x++)
                to[(g->lead + x) % g->step * g->deal + (g->lead + x) / g->step] = from[x * g->x_stride];
    }
}
