/* What the forms of the weight gradient share; see fc_wgrad in fastconv.h. */
#ifndef FC_WGRAD_H
#define FC_WGRAD_H

#include "fastconv.h"
#include "kernels.h"

/* Tasks wanted, and multiply-adds that a task is worth.  A share of a block of fewer than SPLIT_PIXELS would take
 * longer to be added up than to be computed. */
enum { MIN_TASKS = 16, MIN_MACS = 2000000, SPLIT_PIXELS = 512 };

/* Shares of each of `blocks` blocks: an even number of tasks, so that two threads get as many. */
static inline int64_t even_shares(int64_t blocks, int64_t splits) {
    return splits > 2 && blocks % 2 && splits % 2 ? splits - 1 : splits;
}

/* A task's share: channels [c0, c1) and out channels [k0, k1) of a group, units [from, to). */
typedef struct {
    int64_t group, c0, c1, k0, k1, from, to;
} fc_wgrad_share;

/* A form fills in the blocking up to min_units and the bytes that it needs, and sums over a share.  The sum goes to
 * sum[(tap * (c1 - c0) + c - c0) * ldk + k - k0]; returns whether it is to be used. */
#define FC_WGRAD_FORM(form)                                                                                        \
    void FC_NAME(fc_wgrad_##form##_block)(fc_wgrad *p);                                                            \
    int FC_NAME(fc_wgrad_##form##_sum)(const fc_wgrad *p, const real *in, const real *dy, const fc_wgrad_share *s, \
                                       real *sum, char *workspace);
FC_WGRAD_FORM(direct)
FC_WGRAD_FORM(winograd)
#undef FC_WGRAD_FORM

#endif
