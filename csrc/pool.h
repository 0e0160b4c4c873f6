/* Pools and their gradients: the C interface, as backends/_cpu_pool.pxi sees it.
 *
 * A pool maps a wide array (of in_size) to a narrow one (of out_size).  Along each axis, output o covers the inputs
 * first[o] + i * step for 0 <= i < count[o], already clipped to the input; count[o] >= 1 everywhere:
 *
 *      input    0   1   2   3   4   5   6         kernel 3, stride 2, padding 1, ceil mode
 *      o = 0    |-----|                           first 0, count 2
 *      o = 1        |---------|                   first 1, count 3
 *      o = 2                |---------|           first 3, count 3
 *      o = 3                        |-----|       first 5, count 2
 *
 * This one description covers maximum, average, Lp, dilated, adaptive and global pools.
 *
 *      op                   reads                       writes
 *      FC_MAX_POOL          wide = x                    narrow = y, indices or taps
 *      FC_SUM_POOL          wide = x                    narrow = y = (sum of x^power / divisor)^(1 / power)
 *      FC_MAX_POOL_GRAD     narrow = dy, indices        wide = dx
 *      FC_SUM_POOL_GRAD     narrow = dy (lp: x, y)      wide = dx
 *      FC_MAX_UNPOOL        narrow = x, indices         wide = y
 *      FC_MAX_UNPOOL_GRAD   wide = dy, indices          narrow = dx
 *      FC_MAX_POOL_INPUT_GRAD  narrow = dy, x, y        wide = dx, of windows that have no input in common
 *      FC_MAX_POOL_TAPS_GRAD   narrow = dy, taps        wide = dx
 *
 * The divisor is extent_d[o] * extent_h[o] * extent_w[o] / volume, or `divisor` if that is not 0: volume is 1 for an
 * average and the size of the kernel for Lp, whose clipped windows count as whole ones.  Indices are flat row-major
 * positions in in_size.  Of equal maxima the first counts; NaN is larger than all, and of several the last counts. */
#ifndef FC_POOL_H
#define FC_POOL_H

#include <stdint.h>

/* Elements (n, c, d, h, w) at at[n * stride[0] + ... + w * stride[4]]: real, or int64 for indices. */
typedef struct {
    void *at;
    int64_t stride[5];
} fc_view;

/* Which tap of its window an output took, in one byte: (d * count[1] + h) * count[2] + w of a tap (d, h, w).  Of lanes 0: channel c of pixel q of image n at at[(n * pixels + q) * channels + c]; else planes
 * are the lanes, those of all images counted on if they are `together`: of block b (of an image) and lane l at
 * at[(b * pixels + q) * lanes + l]. */
typedef struct {
    uint8_t *at;
    int64_t lanes;
    int together, wanted; /* wanted: of FC_MAX_POOL, which chooses the layout */
    int64_t bytes;        /* all of it; 0 if the pool cannot have them */
    int64_t count[3];     /* the largest ones of the windows, filled in by fc_pool_block */
} fc_taps;

typedef struct {
    const int64_t *first, *count, *extent; /* one entry for each output */
    int64_t step;
    /* Filled in by fc_pool_block: the outputs [run, run_end) have equal counts and extents, and first[o + 1] is
     * first[o] + run_step. */
    int64_t run, run_end, run_step;
} fc_windows;

enum {
    FC_MAX_POOL,
    FC_SUM_POOL,
    FC_MAX_POOL_GRAD,
    FC_SUM_POOL_GRAD,
    FC_MAX_UNPOOL,
    FC_MAX_UNPOOL_GRAD,
    FC_MAX_POOL_INPUT_GRAD,
    FC_MAX_POOL_TAPS_GRAD
};
enum { FC_POOL_OK, FC_POOL_INDEX_OUT_OF_RANGE, FC_POOL_WINDOW_TOO_LARGE, FC_POOL_WINDOWS_OVERLAP };

typedef struct {
    int op;
    int64_t batch, channels, in_size[3], out_size[3];
    fc_windows windows[3];
    double power, volume, divisor;
    fc_view wide, narrow, indices, x, y;
    fc_taps taps;
    int batch_invariant; /* nothing that rounds may depend on the size of the batch */
    /* Filled in by fc_pool_block.  A task is a sample, a block of channels, of output rows and of
     * output columns; by planes, a vector of planes and a band of outputs along an axis. */
    int by_channels; /* lanes are channels; else they are columns */
    int by_planes;   /* or planes of memory order NCHW, which are brought to [pixel][lane] and back */
    int band_axis, images_together;
    int64_t planes, plane_blocks, band, bands, wide_pixels, narrow_pixels; /* those of a band */
    int apart;                                                             /* no two windows have an input in common */
    int tiles;                                                             /* and every input is in one */
    int64_t channel_block, channel_blocks, row_block, row_blocks, column_block, column_blocks, tasks;
    int64_t merged_count, merged_extent; /* global pools of planes; `windows` points here, so the struct stays put */
    int64_t line;                        /* columns that the rows kernels reduce at once; 0 for other kernels */
    int64_t workspace_bytes;
} fc_pool;

/* Fills in the blocking from the rest, and turns planes into lines (in_size, windows) where that is the same.
 * FC_POOL_WINDOW_TOO_LARGE: the maximum of windows that span 2^31 positions is not served.  Every axis of the input
 * must be at least 1.  FC_POOL_WINDOWS_OVERLAP: FC_MAX_POOL_INPUT_GRAD does not serve that. */
int fc_pool_block_f32(const void *kernels, fc_pool *p);
int fc_pool_block_f64(const void *kernels, fc_pool *p);
/* Runs one task, 0 <= task < tasks, with a workspace of its own (64-byte aligned).  Tasks write disjoint outputs. */
int fc_pool_run_f32(const void *kernels, const fc_pool *p, void *workspace, int64_t task);
int fc_pool_run_f64(const void *kernels, const fc_pool *p, void *workspace, int64_t task);

#endif
