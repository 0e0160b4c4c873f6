/* Small integer arithmetic and workspace layout shared by the blocking code. */
#ifndef FC_BLOCKING_H
#define FC_BLOCKING_H

#include <stdint.h>

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/* Bytes rounded up to whole cache lines. */
static inline int64_t align64(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

/* Takes the next `bytes` of a workspace. */
static inline void *take(char **workspace, int64_t bytes) {
    void *p = *workspace;
    *workspace += align64(bytes);
    return p;
}

#endif
