/* What the blocking code of pools shares. */
#ifndef FC_POOL_BLOCKING_H
#define FC_POOL_BLOCKING_H

#include <string.h>

#include "blocking.h"
#include "kernels.h"
#include "pool.h"

static inline int64_t volume(const int64_t size[3]) { return size[0] * size[1] * size[2]; }

static inline real *real_at(const fc_view *v, int64_t n, int64_t c, int64_t d, int64_t h) {
    return (real *)v->at + n * v->stride[0] + c * v->stride[1] + d * v->stride[2] + h * v->stride[3];
}

static inline int64_t largest(const int64_t *p, int64_t n) {
    int64_t most = 0;
    for (int64_t i = 0; i < n; i++) most = max64(most, p[i]);
    return most;
}

/* Gradients and unpooling set a row of the wide array to zero just before they first write to it, while it is to stay in
 * the cache: rows [0, zeroed) of depth x height are done.  Returns `rows`. */
static inline int64_t zero_rows(const fc_pool *p, int64_t n, int64_t c, int64_t channels, int64_t zeroed,
                                int64_t rows) {
    const int64_t *s = p->wide.stride;
    /* the inner of channels and columns, and how many of the outer lie next to each other */
    int64_t outer = p->in_size[2], inner = channels, outer_stride = s[4], inner_stride = s[1];
    if (!p->by_channels) outer = channels, inner = p->in_size[2], outer_stride = s[1], inner_stride = s[4];
    if (inner_stride == 1 && outer_stride == inner) inner *= outer, outer = 1;
    for (int64_t row = zeroed; row < rows; row++) {
        real *to = real_at(&p->wide, n, c, row / p->in_size[1], row % p->in_size[1]);
        for (int64_t i = 0; i < outer; i++, to += outer_stride)
            if (inner_stride == 1)
                memset(to, 0, inner * sizeof(real));
            else
                for (int64_t j = 0; j < inner; j++) to[j * inner_stride] = 0;
    }
    return max64(zeroed, rows);
}

/* pool_taps.c: where the taps of a pixel of an image begin, at channel c; those of FC_MAX_POOL; and their gradient. */
uint8_t *FC_NAME(fc_pool_taps_at)(const fc_pool *p, int64_t n, int64_t c);
void FC_NAME(fc_pool_lay_taps)(const fc_kernels *k, fc_pool *p);
void FC_NAME(fc_pool_block_taps)(fc_pool *p);
void FC_NAME(fc_pool_run_taps)(const fc_pool *p, int64_t task);

#endif
