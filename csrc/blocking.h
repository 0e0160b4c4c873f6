/* Small integer arithmetic and workspace layout shared by the blocking code. */
#ifndef FC_BLOCKING_H
#define FC_BLOCKING_H

#include <stdint.h>

#include "fastconv.h"

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t align_to(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }
/* Bytes rounded up to whole cache lines. */
static inline int64_t align64(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

/* How long pieces of `total` are, `most` at most: such that their number is even or, if they are many, a multiple of four,
 * and no thread of two or four has one more to do than the others. */
static inline int64_t even_piece(int64_t total, int64_t most) {
    const int64_t pieces = ceil_div(total, most), of = pieces > 8 ? 4 : 2;
    for (int64_t n = pieces; pieces > 1 && n < pieces + of; n++)
        if (ceil_div(total, ceil_div(total, n)) % of == 0) return ceil_div(total, n);
    return most;
}

/* Takes the next `bytes` of a workspace. */
static inline void *take(char **workspace, int64_t bytes) {
    void *p = *workspace;
    *workspace += align64(bytes);
    return p;
}

/* Joins an axis to the one inside it where neither the input nor the output can tell: a 1x1 convolution sees one long
 * row of pixels. */
static inline void flatten(fc_lattice *l) {
    if (l->taps != 1 || l->tap_at[0] || l->tap_at[1] || l->tap_at[2]) return;
    for (int a = 0; a < 3; a++)
        if (l->step[a] != 1 || l->in_size[a] != l->out_size[a]) return;
    for (int a = 1; a >= 0; a--) {
        const int64_t n = l->in_size[2];
        if (l->in_size[a] != 1 &&
            (l->in_stride[a + 2] != n * l->in_stride[4] || l->out_stride[a + 2] != n * l->out_stride[4]))
            return;
        l->in_size[2] *= l->in_size[a], l->out_size[2] *= l->out_size[a];
        l->in_size[a] = l->out_size[a] = 1;
    }
    const int64_t n = l->in_size[2];
    if (l->in_stride[0] == n * l->in_stride[4] && l->out_stride[0] == n * l->out_stride[4] && l->batch > 0) {
        l->in_size[2] *= l->batch, l->out_size[2] *= l->batch;
        l->batch = 1;
    }
}

#endif
