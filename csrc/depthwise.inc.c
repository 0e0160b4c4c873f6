/* Convolution of groups of few channels that are contiguous (NHWC): lanes are channels of several groups.
 *
 * A tile is ROWS x `cols` pixels times one vector of channels.  Each input vector is loaded once for the outputs of both rows
 * that meet it under one tap, or, with the usual kernel width, under all of its taps; with 3 x 3 taps:
 *
 *      input        . . . . . .      first line: taps of row 0 for the upper outputs
 *                   . . . . . .      row 1 for the upper, row 0 for the lower
 *                   . . . . . .      row 2 for the upper, row 1 for the lower
 *                   . . . . . .      row 2 for the lower
 *
 * Taps are added in row-major order, in every tile and at every edge. */
#include "kernels.h"
#include "simd.h"

/* Columns of a tile: sums of two rows, weights of both and an input fit the registers.  COLS, the most, is for rows that it
 * divides, or whose inputs are far apart; PICKED for groups of several channels. */
#if FC_VBYTES == 64
enum { ROWS = 2, COLS = 7, USUAL = 4, PICKED = 4, WEIGHTS_FIT = 1 };
#else
enum { ROWS = 2, COLS = 5, USUAL = 5, PICKED = 4, WEIGHTS_FIT = 0 };
#endif

/* v[at[0]], v[at[1]], ... */
FC_INLINE vec FC_NAME(pick)(vec v, mask at) {
#ifdef __clang__ /* has no shuffle by a computed mask */
    vec r;
    for (int l = 0; l < VL; l++) r[l] = v[at[l] & (VL - 1)];
    return r;
#else
    return __builtin_shuffle(v, at);
#endif
}

/* One block of lanes of a strip. */
typedef struct {
    int64_t in, out; /* first channel that is loaded, and first that is written */
    mask pick;       /* which of the loaded channels each lane needs, of the first channel of its group */
    const real *w;
} FC_NAME(lanes);

/* The input at a column, zeros outside.  A choice of pointers, not of values: around a choice of values, compilers place
 * multiplications and additions such that they no longer fuse, and edges would be rounded differently. */
FC_INLINE vec FC_NAME(input_at)(const int anywhere, const fc_depthwise *g, const fc_line *line, const real *at,
                                int64_t offset, int64_t column) {
    const real *from = at + offset * line->step;
    if (anywhere) from = (uint64_t)(column + offset) < (uint64_t)g->columns ? from : g->zeros;
    return vload(from);
}

/* Adds one line of inputs to the outputs of rows [row, row_end), whose taps of that line are at upper and lower.
 * width 0: any number of taps at any spacing. */
FC_INLINE void FC_NAME(depthwise_line)(const int width, const int cols, const int anywhere, const int picked,
                                       const int row, const int row_end, const fc_depthwise *g, const fc_line *line,
                                       int64_t column, const FC_NAME(lanes) * b, const real *upper, const real *lower,
                                       vec acc[ROWS][COLS]) {
    const real *at = line->at + column * line->step + b->in;
    const real *w[ROWS] = {upper, lower};
    for (int64_t c = 0; c < (picked ? g->group : 1); c++) {
        const mask lanes = picked ? b->pick + (lane)c : b->pick;
        if (width && (WEIGHTS_FIT || picked)) {
            vec weights[ROWS][7];
    FC_UNROLL for (int r = row; r < row_end; r++)
                FC_UNROLL for (int t = 0; t < width; t++) weights[r][t] = vload(w[r] + t * VL);
            FC_UNROLL for (int j = 0; j < cols - 1 + width; j++) {
                vec x = FC_NAME(input_at)(anywhere, g, line, at, j, column);
                if (picked)
                    x = FC_NAME(pick)(x, lanes);
                else
                    FC_KEEP(x);
                FC_UNROLL for (int r = row; r < row_end; r++)
                    FC_UNROLL for (int t = 0; t < width; t++)
                        if (j >= t && j - t < cols) acc[r][j - t] += x * weights[r][t];
            }
        } else if (width) {
            FC_UNROLL for (int t = 0; t < width; t++) {
                vec weights[ROWS];
                FC_UNROLL for (int r = row; r < row_end; r++) weights[r] = vload(w[r] + t * VL);
                FC_UNROLL for (int i = 0; i < cols; i++) {
                    vec x = FC_NAME(input_at)(anywhere, g, line, at, i + t, column);
                    FC_KEEP(x);
                    FC_UNROLL for (int r = row; r < row_end; r++) acc[r][i] += x * weights[r];
                }
            }
        } else
            for (int64_t t = 0; t < g->width; t++) {
                vec weights[ROWS];
                FC_UNROLL for (int r = row; r < row_end; r++) weights[r] = vload(w[r] + t * VL);
                FC_UNROLL for (int i = 0; i < cols; i++) {
                    vec x = FC_NAME(input_at)(anywhere, g, line, at, i * g->step + t * g->spacing, column);
                    if (picked) x = FC_NAME(pick)(x, lanes);
                    if (row + 1 < row_end) FC_KEEP(x);
                    FC_UNROLL for (int r = row; r < row_end; r++) acc[r][i] += x * weights[r];
                }
            }
        FC_UNROLL for (int r = row; r < row_end; r++) w[r] += g->width * VL;
    }
}

/* cols outputs of one or two rows, from output u on; `anywhere` is for tiles that touch the padding or have fewer. */
FC_INLINE void FC_NAME(depthwise_tile)(const int width, const int cols, const int anywhere, const int picked,
                                       const fc_depthwise *g, int64_t u, const FC_NAME(lanes) * b) {
    const int64_t w_row = g->width * (picked ? g->group : 1) * VL;
    const int64_t column = u * g->step + g->first;
    vec acc[ROWS][COLS];
    FC_UNROLL for (int r = 0; r < ROWS; r++) FC_UNROLL for (int i = 0; i < cols; i++) acc[r][i] = (vec){0};
    const fc_line *line = g->lines;
    const real *w = b->w;
    const int64_t below = g->second ? g->below : g->height; /* line of the first tap of the lower outputs */
#define FC_LINE(row, row_end)                                                                                     \
    FC_NAME(depthwise_line)                                                                                       \
    (width, cols, anywhere, picked, row, row_end, g, line++, column, b, w + i * w_row, w + (i - below) * w_row, acc)
    for (int64_t slice = 0; slice < g->slices; slice++, w += g->height * w_row) {
        int64_t i = 0;
        for (; i < below; i++) FC_LINE(0, 1);
        for (; i < g->height; i++) FC_LINE(0, 2);
        for (; g->second && i < g->height + below; i++) FC_LINE(1, 2);
    }
#undef FC_LINE
    const int64_t lanes = anywhere ? g->out_lanes : VL, count = anywhere ? lesser(g->to - u, cols) : cols;
    if (g->bias) {
        const vec bias = load_lanes(g->bias + b->out, 1, lanes);
        FC_UNROLL for (int r = 0; r < ROWS; r++) FC_UNROLL for (int i = 0; i < cols; i++) acc[r][i] += bias;
    }
    if (g->relu)
        FC_UNROLL for (int r = 0; r < ROWS; r++) FC_UNROLL for (int i = 0; i < cols; i++) acc[r][i] = vrelu(acc[r][i]);
    FC_UNROLL for (int r = 0; r < ROWS; r++) {
        real *to = g->out[r] + u * g->out_step + b->out;
        if (r == 0 || g->second)
            FC_UNROLL for (int i = 0; i < cols; i++) if (i < count)
                store_few(to + i * g->out_step, 1, lanes, acc[r][i]);
    }
}

FC_INLINE void FC_NAME(depthwise_strip)(const int width, const int edge_width, const int cols, const int picked,
                                        const fc_depthwise *strip) {
    const fc_depthwise copy = *strip, *g = &copy; /* which no store can change */
    FC_NAME(lanes) b = {.pick = {0}};
    mask pick = {0};
    if (picked) memcpy(&pick, g->pick, sizeof pick);
    for (int64_t next = g->from; next < g->to; next += cols) {
        const int64_t u = next + cols > g->to && g->to - cols >= g->from ? g->to - cols : next;
        const int64_t column = u * g->step + g->first;
        const int inside = column >= 0 && u + cols <= g->to &&
                           column + (cols - 1) * g->step + (g->width - 1) * g->spacing < g->columns;
        b.w = g->w;
        for (int64_t i = g->block; i < g->block_end; i++, b.w += g->slices * g->height * g->group * g->width * VL) {
            const int64_t group = lesser(i * g->block_groups, g->groups - g->block_groups);
            b.out = group * g->group_out;
            b.in = group * g->group;
            if (picked) {
                /* vectors must not run past the channels: start earlier, and pick from there */
                const int64_t start = b.in;
                b.in = lesser(start, g->in_channels - VL);
                b.pick = pick + (lane)(start - b.in);
            }
            /* What a short block writes beyond its lanes, later ones write again. */
            if (inside && b.out + VL <= g->out_channels)
                FC_NAME(depthwise_tile)(width, cols, 0, picked, g, u, &b);
            else
                FC_NAME(depthwise_tile)(edge_width, cols, 1, picked, g, u, &b);
        }
    }
}

/* Whether a short row is cut into fewer columns by tiles of COLS. */
FC_INLINE int FC_NAME(divides_better)(int64_t n) {
    const int64_t usual = USUAL;
    return n <= 2 * COLS && (n + COLS - 1) / COLS * COLS < (n + usual - 1) / usual * usual;
}

/* The usual widths are unrolled, which takes long to compile: for one scalar type, and at edges for the width whose maps
 * are small. */
static void depthwise_channels(const fc_depthwise *g) {
    const int64_t width = sizeof(real) == sizeof(float) && g->step == 1 ? g->width : 0;
    if (g->pick && width == 3)
        FC_NAME(depthwise_strip)(3, 0, PICKED, 1, g);
    else if (g->pick)
        FC_NAME(depthwise_strip)(0, 0, PICKED, 1, g);
    else if (width == 3 && FC_NAME(divides_better)(g->to - g->from))
        FC_NAME(depthwise_strip)(3, 3, COLS, 0, g);
    else if (width == 3)
        FC_NAME(depthwise_strip)(3, 3, USUAL, 0, g);
    else if (width == 5)
        FC_NAME(depthwise_strip)(5, 0, USUAL, 0, g);
    else if (width == 7)
        FC_NAME(depthwise_strip)(7, 0, USUAL, 0, g);
    else
        FC_NAME(depthwise_strip)(0, 0, COLS, 0, g);
}
