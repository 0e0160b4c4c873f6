/* What the blocking code of pools shares. */
#ifndef FC_POOL_BLOCKING_H
#define FC_POOL_BLOCKING_H

#include "blocking.h"
#include "kernels.h"
#include "pool.h"

static inline int64_t volume(const int64_t size[3]) { return size[0] * size[1] * size[2]; }

static inline real *real_at(const fc_view *v, int64_t n, int64_t c, int64_t d, int64_t h) {
    return (real *)v->at + n * v->stride[0] + c * v->stride[1] + d * v->stride[2] + h * v->stride[3];
}

/* The gradient of max pools whose windows overlap, by bands of inputs (pool_max_grad.c): tasks, bands and workspace,
 * where lanes are chosen; and a task. */
void FC_NAME(fc_pool_block_inputs)(const fc_kernels *k, fc_pool *p);
void FC_NAME(fc_pool_run_inputs)(const fc_kernels *k, const fc_pool *p, char *workspace, int64_t task);

#endif
