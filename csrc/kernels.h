/* The contracts of the kernels and the type of their table. */
#ifndef FC_KERNELS_H
#define FC_KERNELS_H

#include <stdint.h>

#include "pool.h"
#include "real.h"

/* One term of a batch-reduce product: k columns of A and k rows of B. */
typedef struct {
    const real *a;
    const real *b;
    int64_t k;
} FC_NAME(fc_term);
#define fc_term FC_NAME(fc_term)

/* C[i][j] = epilogue((add ? C[i][j] : 0) + (bias + sum over terms, sum over k of A[i][k] * B[k][j]))
 *
 *      0 <= i < m <= mr,  0 <= j < n <= vectors * vl
 *      B[k][j] at b[k * ldb + j]: all vectors * vl lanes are read, so a short panel must be padded
 *      A[i][k] at a[i * lda + k] (gemm_row) or a[i + k * lda] (gemm_col)
 *      C[i][j] at c[i * ldc + j]: only the n valid columns are touched
 *      a and b of each term count from a_shift and b_shift, so that a list of terms can serve many tiles
 *
 * The sum of one call is kept in registers, where it begins as bias_col[j] or bias_row[i] or, if both are null, 0, and is
 * added to C at the end: the chunks of a long reduction are added like partial sums.  Epilogue: max(., 0) if relu. */
typedef struct {
    const fc_term *terms;
    int64_t n_terms;
    int64_t a_shift, b_shift;
    int64_t lda, ldb, ldc;
    real *c;
    int64_t n;
    int add;
    int relu;
    const real *bias_col, *bias_row;
    /* What will be read after this, of which gemm_row fetches next_step bytes, at most two lines, with each k; if null,
     * it fetches C, a row with each k, so that stores need not wait for memory at the end. */
    const char *next;
    int64_t next_step;
} FC_NAME(fc_gemm);
#define fc_gemm FC_NAME(fc_gemm)

/* A block of patches: `pixels` consecutive output positions (row-major over out_size) from `pixel`, reduction indices
 * [r0, r1) of r = tap * in_channels + channel; positions outside the input are zeros.
 *
 *      gather_rows:  to[p * ld + (r - r0)]      a patch after the other, the rows of A
 *      gather_panel: to[(r - r0) * ld + p]      lanes are pixels; columns up to `width` are filled with zeros */
typedef struct {
    const real *in; /* image and group, channel 0, position (0, 0, 0) */
    int64_t in_size[3], out_size[3], step[3];
    int64_t in_stride[4]; /* channel, depth, height, width */
    int64_t in_channels;
    const int64_t *tap_at; /* taps x 3: input position = output position * step + tap_at */
    int64_t pixel, pixels, r0, r1, ld, width;
} FC_NAME(fc_gather);
#define fc_gather FC_NAME(fc_gather)

/* Outputs of a pool along the width, at one depth and height (see pool.h).
 *
 *      wide row (d, h) of the windows, column w:   wide + d * wide_row[0] + h * wide_row[1] + (w - column) * wide_step
 *      output o, its index and its y:              narrow + o * narrow_step, indices + o * indices_step, y + o * y_step
 *      x of wide row (d, h), column w:             as in wide, with x, x_row and x_step
 *
 * Windows lie in the columns [column, column + columns).  pool_*_rows: lanes are columns, strides are free.
 * pool_*_channels: lanes are `channels` channels, whose stride is 1 in all arrays.  The spread kernels add to wide, the
 * others write narrow.  `buffer` holds `columns`, rounded up to whole vectors, plus `outputs` reals, and `buffer_rows` as
 * many integers as wide as real; the channels kernels need neither.
 * pool_max_rows without indices and pool_sum_rows do `lines` rows of outputs, whose windows are alike, each line_wide and
 * line_narrow elements behind the one before; all others do one. */
typedef struct {
    real *wide, *narrow;
    const real *x, *y; /* spread of the maximum: of the forward pass; of Lp: y */
    int64_t *indices;
    int64_t wide_step, wide_row[2], x_step, x_row[2], narrow_step, y_step, indices_step;
    int64_t channels, column, columns, outputs;
    int64_t lines, line_wide, line_narrow;
    int64_t rows[2];             /* rows of the windows by depth and by height */
    int64_t index, index_row[2]; /* flat position of wide[0], and the distances of rows */
    uint8_t *taps;               /* pool_max_channels: of output o and channel c at taps[o * taps_step + c]; or NULL */
    int64_t taps_step, tap_row[2];  /* what rows add to a tap's number by depth and by height */
    fc_windows windows;             /* along the width; `first` counts from column 0 of the input */
    double extent, volume, divisor; /* extent by depth and height; see fc_pool */
    int apart;                      /* no two windows have an input in common */
    real power;
    real *buffer;
    void *buffer_rows;
} FC_NAME(fc_pool_row);
#define fc_pool_row FC_NAME(fc_pool_row)

/* One patch of Winograd's input: positions [low, high) along each axis lie inside the input, others are zeros.
 * Point q of channel c goes to v[q * ldq + c]; channels are contiguous, and v has room for whole vectors. */
typedef struct {
    const real *in;
    int64_t stride[3], low[3], high[3];
    int64_t channels;
    real *v;
    int64_t ldq;
} FC_NAME(fc_wino_input);
#define fc_wino_input FC_NAME(fc_wino_input)

/* One tile of Winograd's output: point q of column j comes from m[q * ldq + j]; `count` outputs along each axis are
 * written, with bias and relu, n contiguous channels each.  0 * each of them is added to the vl elements of `check`, which
 * so become NaN if an output is not finite. */
typedef struct {
    const real *m;
    int64_t ldq, n;
    real *out;
    int64_t stride[3], count[3];
    const real *bias;
    int relu;
    real *check;
} FC_NAME(fc_wino_output);
#define fc_wino_output FC_NAME(fc_wino_output)

/* A panel of transformed weights: u[q * ldq + channel * nr + lane] from w[tap_w[tap] + channel * channel_stride + lane],
 * taps in row-major order; FC_NO_TAP: a zero. */
#define FC_NO_TAP INT64_MIN
typedef struct {
    const real *w;
    const int64_t *tap_w;
    int64_t channel_stride, channels;
    real *u;
    int64_t ldq;
} FC_NAME(fc_wino_weights);
#define fc_wino_weights FC_NAME(fc_wino_weights)

/* Pieces of pixels, of at most a vector each: pixel i of piece j, of lanes[j] channels, goes from from[i * step + from_at[j]]
 * to to[i * pitch + to_at[j]].  Whole vectors are written, and behind the channels of a piece there can be anything. */
typedef struct {
    const real *from;
    real *to;
    int64_t step, pitch, count;
    int64_t pieces;
    const int64_t *from_at, *to_at, *lanes;
} FC_NAME(fc_wgrad_copy);
#define fc_wgrad_copy FC_NAME(fc_wgrad_copy)

/* Weight gradients of a vector of out channels, lane by lane:
 *
 *      sum[((row * width + t) * group + c) * vl + lane] (add ? += : =)
 *          sum over runs, k of x[a + rows[row] + t * vl + k * x_step + pick[lane] + c] * dy[b + k * vl + lane]
 *
 * width is 1, 3, 5 or 7.  pick: input channel of the vector that starts each lane's group; null: the lane itself. */
typedef struct {
    const fc_term *runs;
    int64_t n_runs, x_step;
    const int64_t *rows;
    int64_t n_rows, width, group;
    const lane *pick;
    real *sum;
    int add;
} FC_NAME(fc_wgrad_lanes);
#define fc_wgrad_lanes FC_NAME(fc_wgrad_lanes)

/* Weight gradients from their sums of products: point q of (channel c, lane k) comes from m[q * ldq + c * ld + k], tap t
 * goes to to[t * tap_step + c * ld + k]; `lanes` are whole vectors.  `check` as in fc_wino_output. */
typedef struct {
    const real *m;
    int64_t ldq, ld, channels, lanes;
    real *to;
    int64_t tap_step;
    real *check;
} FC_NAME(fc_wino_grad);
#define fc_wino_grad FC_NAME(fc_wino_grad)

/* An input row: column x at at[x * step]; step 0 is a row of zeros. */
typedef struct {
    const real *at;
    int64_t step;
} FC_NAME(fc_line);
#define fc_line FC_NAME(fc_line)

/* Convolution in groups of few channels, which are contiguous and at least vl in all: outputs [from, to) of one row, or of
 * two (`second`), for a range of blocks.  A block is block_groups groups, at most vl channels; the last one begins where it
 * is as long as the others.  Taps are slices x height x width; tap t of output u is in column u * step + first + t * spacing,
 * a zero beyond the columns.  lines: for each slice, the input rows: height, and with `second` as many more as the first tap
 * of the lower outputs is `below` that of the upper ones (at most height).
 * w[block][slice][height][channel of the group][width][vl], from the first block on. */
typedef struct {
    const fc_line *lines;
    const real *zeros; /* as many as channels */
    int64_t slices, height, width;
    int64_t step, spacing, first, columns;
    int64_t from, to, out_step;
    real *out[2]; /* output 0 of each row */
    int second;
    int64_t below;
    int64_t groups, group, group_out; /* groups, input and output channels of each */
    int64_t in_channels, out_channels, out_lanes;
    int64_t block, block_end, block_groups;
    const lane *pick; /* vl lanes: input channel of a block that starts each lane's group; null: the lane itself */
    const real *w, *bias;
    int relu;
} FC_NAME(fc_depthwise);
#define fc_depthwise FC_NAME(fc_depthwise)

/* Rows of outputs of one channel by itself, from a padded copy of its input.  slices[i]: input of output (0, 0) under the first
 * tap of slice i; output (h, u) under tap (j, t) is at h * next_row + j * tap_row + u + columns[t] from there, and vl
 * elements past the end of a row can be read.  dense: rows follow each other, and nothing but the later ones lies behind
 * each. */
typedef struct {
    const real *const *slices;
    int64_t n_slices, height, width;
    int64_t tap_row, next_row;
    const int64_t *columns;
    int64_t rows, pixels;
    real *out;
    int64_t out_row, out_step;
    int dense;
    const real *w, *bias; /* w[slice][height][width] */
    int relu;
} FC_NAME(fc_depthwise_plane);
#define fc_depthwise_plane FC_NAME(fc_depthwise_plane)

/* Outputs of 3 x 3 taps at step 1 of `planes` channels, from inputs without padding.  slices[i]: input (0, 0) of slice i of
 * the first channel, or null, if all of the slice is padding; `row` and `column`: input under the first tap of output (0, 0),
 * which may lie outside of the rows x columns that there are.  At least edge_rows rows and at most FC_EDGE_COLUMNS columns of
 * outputs. */
enum { FC_EDGE_COLUMNS = 1024 };
typedef struct {
    const real *const *slices;
    int64_t n_slices, planes;
    int64_t rows, columns, in_row, in_plane;
    int64_t row, column;
    int64_t out_rows, out_columns, out_row, out_plane;
    real *out;
    const real *w, *bias; /* w[plane][slice][3][3] */
    int relu;
} FC_NAME(fc_depthwise_edges);
#define fc_depthwise_edges FC_NAME(fc_depthwise_edges)

/* Rows of the input, copied between paddings: column x to to[(lead + x) % step * deal + (lead + x) / step], and zeros behind
 * the last one, up to whole vectors.  The `readable` elements from `from` on are part of the array. */
typedef struct {
    const real *from;
    int64_t row_stride, x_stride, rows, width, readable;
    real *to;
    int64_t to_row, lead, step, deal;
} FC_NAME(fc_pad);
#define fc_pad FC_NAME(fc_pad)

/* Normalisation over [pixel][channel] and its gradient, for each channel:
 *
 *      norm_apply        out = (x - mean) * scale + bias, with relu max(., 0) of it
 *      norm_grad_sums    sums[c] += dy,  sums[channels + c] += dy * (x - mean)
 *      norm_grad_apply   out = dy * along + (x - mean) * across + shift, without across only the first term
 *      column_sums       sums[c] += dy
 *
 * With relu, dy counts only where the normalised value passed the ReLU. */
typedef struct {
    const real *x, *dy;
    real *out;
    int64_t pixels, channels, x_ld, dy_ld, out_ld;
    const real *mean, *scale, *bias, *along, *across, *shift;
    int relu;
    double *sums;
} FC_NAME(fc_norm);
#define fc_norm FC_NAME(fc_norm)

/* g = grad + weight_decay * value;  velocity = first ? g : momentum * velocity + fresh * g;
 * value -= lr * (nesterov ? g + momentum * velocity : velocity), or lr * g without velocity. */
typedef struct {
    real *value, *velocity;
    const real *grad;
    int64_t n;
    real lr, momentum, fresh, weight_decay;
    int first, nesterov;
} FC_NAME(fc_sgd);
#define fc_sgd FC_NAME(fc_sgd)

/* w = value * shrink;  g = grad + weight_decay * w;  mean += new1 * (g - mean);  square = beta2 * square + new2 * g^2;
 * value = w - rate * mean / (sqrt(square) * root + eps). */
typedef struct {
    real *value, *mean, *square;
    const real *grad;
    int64_t n;
    real shrink, weight_decay, new1, beta2, new2, rate, root, eps;
} FC_NAME(fc_adam);
#define fc_adam FC_NAME(fc_adam)

/* Sums with lanes of pixels, on their way out: pixel x < n[p] of phase p and channel c goes from
 * tile[p * tile_step + c * nr + x] to to[p][c * channel_step + x * step].  Whole vectors of the tile are read. */
typedef struct {
    const real *tile;
    int64_t tile_step, phases, channels;
    const int64_t *n;
    real *const *to;
    int64_t channel_step, step;
} FC_NAME(fc_pixels_out);
#define fc_pixels_out FC_NAME(fc_pixels_out)

typedef struct {
    const char *isa;
    int vl, mr, nr; /* lanes, rows and columns of the largest tile; nr = 2 * vl */
    int edge_rows;  /* least rows for depthwise_edges; 0 without it */
    int masked;     /* FC_MASKED of simd.h */
#define FC_KERNEL(slot, result, parameters) result(*slot) parameters;
#include "kernels.def"
#undef FC_KERNEL
} FC_NAME(fc_kernels);
#define fc_kernels FC_NAME(fc_kernels)

#endif
