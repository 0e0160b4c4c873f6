/* Passes of normalisation over whole arrays: the C interface, as backends/_cpu_train.pxi sees it.
 *
 *   by_channels = 1   x[pixel][channel], channels contiguous (NHWC, or rows of features): `outer` pixels, a task is a
 *                     block of them, and sums are made block by block
 *   by_channels = 0   x[image][channel][element], elements contiguous (NCHW): `outer` images, a task is a channel */
#ifndef FC_PASSES_H
#define FC_PASSES_H

#include <stdint.h>

enum { FC_PASS_MOMENTS, FC_PASS_APPLY, FC_PASS_GRAD_SUMS, FC_PASS_GRAD_APPLY, FC_PASS_SUMS };

/* One of the arrays: elements between pixels, or images and channels. */
typedef struct {
    void *at;
    int64_t outer, channel;
} fc_plane;

typedef struct {
    const void *kernels;
    int by_channels, relu;
    int64_t outer, channels, inner;
    fc_plane x, dy, out;
    const void *mean, *scale, *bias, *along, *across, *shift; /* real, one for each channel; see fc_norm */
    double *sums;                                             /* tasks by channels, else 1, times 2 * channels */
    int64_t block, tasks;
} fc_pass;

/* Fills in block and tasks. */
void fc_pass_block(fc_pass *p);
/* Runs one task; sums (or mean and sum of squared distances) of a task by channels are at sums + 2 * channels * task. */
void fc_pass_run_f32(const fc_pass *p, int pass, int64_t task);
void fc_pass_run_f64(const fc_pass *p, int pass, int64_t task);
/* Brings the sums of all tasks together in sums[0 .. 2 * channels). */
void fc_pass_merge(const fc_pass *p, int pass);

/* Elementwise passes over contiguous runs. */
void fc_relu_f32(const void *kernels, const void *x, int64_t n, void *y);
void fc_relu_f64(const void *kernels, const void *x, int64_t n, void *y);
void fc_relu_grad_f32(const void *kernels, const void *dy, const void *y, int64_t n, void *dx);
void fc_relu_grad_f64(const void *kernels, const void *dy, const void *y, int64_t n, void *dx);
void fc_add_f32(const void *kernels, const void *a, const void *b, int relu, int64_t n, void *y);
void fc_add_f64(const void *kernels, const void *a, const void *b, int relu, int64_t n, void *y);
/* SGD and Adam, see fc_sgd and fc_adam in kernels.h: constants in the order that they have there. */
void fc_sgd_step_f32(const void *kernels, void *value, void *velocity, const void *grad, int64_t n,
                     const double constants[4], int first, int nesterov);
void fc_sgd_step_f64(const void *kernels, void *value, void *velocity, const void *grad, int64_t n,
                     const double constants[4], int first, int nesterov);
void fc_adam_step_f32(const void *kernels, void *value, void *mean, void *square, const void *grad, int64_t n,
                      const double constants[8]);
void fc_adam_step_f64(const void *kernels, void *value, void *mean, void *square, const void *grad, int64_t n,
                      const double constants[8]);

#endif
