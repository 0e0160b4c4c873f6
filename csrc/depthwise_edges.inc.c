/* Depthwise convolution by 3 x 3 taps at step 1 of planes whose pixels are contiguous (NCHW), read in place: masks keep lanes
 * in the padding from being loaded.  Three of them serve a vector of outputs, one for each tap of a row:
 *
 *      outputs   o o o o o o o o      first tap   - x x x x x x x      last tap   x x x x x x x -
 *
 * Rows in the padding are masked altogether; tiles that have none do without that.  Planes half as wide as a vector go by
 * twos.  Taps are added in row-major order, as in depthwise_plane.inc.c, zeros of the padding too.  Tiles at the end of a row
 * or plane overlap the ones before, and compute the same numbers again. */
#include "kernels.h"
#include "simd.h"

#if FC_MASKED
enum { EDGE_ROWS = 7, EDGE_VECTORS = 2 };

/* EDGE_ROWS rows from h on of a plane, or of it and the next in halves of a vector; vectors begin at[i] outputs after the
 * first.  whole: no row is masked. */
FC_INLINE void FC_NAME(edges_tile)(const int vectors, const int halves, const int whole, const fc_depthwise_edges *g,
                                   int64_t plane, int64_t h, const int64_t *at, const lane_mask (*inside)[3]) {
    const lane_mask low = first_lanes(VL / 2), high = (lane_mask)~low;
    lane_mask keep[EDGE_VECTORS][3], second[3];
    FC_UNROLL for (int k = 0; k < vectors; k++) FC_UNROLL for (int t = 0; t < 3; t++) keep[k][t] = inside[k][t];
    if (halves) FC_UNROLL for (int t = 0; t < 3; t++) {
            second[t] = (lane_mask)(inside[0][t] << VL / 2);
            keep[0][t] &= low;
        }
    vec acc[EDGE_ROWS][EDGE_VECTORS];
    FC_UNROLL for (int r = 0; r < EDGE_ROWS; r++) FC_UNROLL for (int k = 0; k < vectors; k++) acc[r][k] = (vec){0};
    const int64_t taps = 9 * g->n_slices, in_second = g->in_plane - VL / 2;
    const real *plane_w = g->w + plane * taps;
    for (int64_t slice = 0; slice < g->n_slices; slice++, plane_w += 9) {
        vec w[9];
        FC_UNROLL for (int t = 0; t < 9; t++) {
            w[t] = vset(plane_w[t]);
            if (halves) w[t] = vblend_chosen(w[t], vset(plane_w[taps + t]), high);
        }
        const int there = g->slices[slice] != NULL;
        const real *x = there ? g->slices[slice] + plane * g->in_plane + (g->row + h) * g->in_row + g->column : g->w;
        FC_UNROLL for (int i = 0; i < EDGE_ROWS + 2; i++, x += g->in_row) {
            const int64_t y = g->row + h + i;
            const lane_mask row = (lane_mask)(there && y >= 0 && y < g->rows ? -1 : 0);
            FC_UNROLL for (int t = 0; t < 3; t++) FC_UNROLL for (int k = 0; k < vectors; k++) {
                const real *from = x + at[k] + t;
                vec v = load_chosen(from, whole ? keep[k][t] : keep[k][t] & row);
                if (halves) v = load_over(v, from + in_second, whole ? second[t] : second[t] & row);
                FC_KEEP(v);
                FC_UNROLL for (int r = 0; r < EDGE_ROWS; r++)
                    if (i - r >= 0 && i - r < 3) acc[r][k] += v * w[3 * (i - r) + t];
            }
        }
    }
    if (g->bias) {
        vec bias = vset(g->bias[plane]);
        if (halves) bias = vblend_chosen(bias, vset(g->bias[plane + 1]), high);
        FC_UNROLL for (int r = 0; r < EDGE_ROWS; r++) FC_UNROLL for (int k = 0; k < vectors; k++) acc[r][k] += bias;
    }
    if (g->relu)
        FC_UNROLL for (int r = 0; r < EDGE_ROWS; r++) FC_UNROLL for (int k = 0; k < vectors; k++)
            acc[r][k] = vrelu(acc[r][k]);
    const lane_mask written = first_lanes(g->out_columns);
    real *to = g->out + plane * g->out_plane + h * g->out_row;
    FC_UNROLL for (int r = 0; r < EDGE_ROWS; r++, to += g->out_row) {
        FC_UNROLL for (int k = 0; k < vectors; k++) store_chosen(to + at[k], written, acc[r][k]);
        if (halves) store_chosen(to + g->out_plane - VL / 2, (lane_mask)(written << VL / 2), acc[r][0]);
    }
}

FC_INLINE void FC_NAME(edges_at)(const int vectors, const int halves, const fc_depthwise_edges *g, int64_t plane,
                                 int64_t h, const int64_t *at, const lane_mask (*inside)[3], int whole) {
    whole = whole && g->row + h >= 0 && g->row + h + EDGE_ROWS + 2 <= g->rows;
    if (whole)
        FC_NAME(edges_tile)(vectors, halves, 1, g, plane, h, at, inside);
    else
        FC_NAME(edges_tile)(vectors, halves, 0, g, plane, h, at, inside);
}

static void depthwise_edges(const fc_depthwise_edges *given) {
    const fc_depthwise_edges copy = *given, *g = &copy; /* which no store can change */
    const int64_t vectors = (g->out_columns + VL - 1) / VL, last = g->out_columns > VL ? g->out_columns - VL : 0;
    int64_t at[FC_EDGE_COLUMNS / VL];
    lane_mask inside[FC_EDGE_COLUMNS / VL][3];
    for (int64_t k = 0; k < vectors; k++) {
        at[k] = lesser(k * VL, last);
        for (int t = 0; t < 3; t++) inside[k][t] = lanes_inside(g->column + at[k] + t, g->columns);
    }
    int whole = 1;
    for (int64_t slice = 0; slice < g->n_slices; slice++) whole = whole && g->slices[slice];
    for (int64_t plane = 0; plane < g->planes; plane++) {
        const int two = g->out_columns <= VL / 2 && plane + 1 < g->planes;
        for (int64_t rows = 0; rows < g->out_rows; rows += EDGE_ROWS) {
            const int64_t h = lesser(rows, g->out_rows - EDGE_ROWS);
            if (two) {
                FC_NAME(edges_at)(1, 1, g, plane, h, at, inside, whole);
                continue;
            }
            int64_t k = 0;
            for (; k + 2 <= vectors; k += 2) FC_NAME(edges_at)(2, 0, g, plane, h, at + k, inside + k, whole);
            if (k < vectors) FC_NAME(edges_at)(1, 0, g, plane, h, at + k, inside + k, whole);
        }
        plane += two;
    }
}
#else
enum { EDGE_ROWS = 0 }; /* so that nothing is computed so */
static void depthwise_edges(const fc_depthwise_edges *g) { (void)g; }
#endif
