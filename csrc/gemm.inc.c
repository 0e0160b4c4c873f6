/* The register-tiled matrix product that every convolution pass ends in.
 *
 * A tile of m rows and v vectors of C stays in registers while the terms stream by.  Per k: v vector loads of B, m
 * scalar broadcasts of A, m * v multiply-adds.  The body is written once and instantiated for every m and v, for A with
 * its k contiguous (`row`: patches in place or gathered) and with its rows contiguous (`col`: packed panels). */
#include "kernels.h"
#include "simd.h"

/* Biases of fewer columns than v vectors. */
static __attribute__((noinline)) void FC_NAME(gemm_short_bias)(const int v, vec bias[2], const fc_gemm *g) {
    for (int j = 0; j < v; j++) bias[j] = load_few(g->bias_col + j * VL, j < v - 1 ? VL : g->n - j * VL);
}

/* The last columns of C, fewer than the v vectors that the m rows of sums have: what follows the sums, and stores.  Rows
 * that leave no gaps are stored whole: what one has too much, the next ones overwrite. */
static __attribute__((noinline)) void FC_NAME(gemm_finish)(const int m, const int v, vec rows[MR][2],
                                                           const fc_gemm *g) {
    const int64_t tail = g->n - (v - 1) * VL;
    const int dense = g->ldc == g->n && !g->add;
    for (int i = 0; i < m; i++)
        for (int j = 0; j < v; j++) {
            real *c = g->c + i * g->ldc + j * VL;
            int64_t lanes = j < v - 1 ? VL : tail;
            vec s = rows[i][j];
            if (g->add) s += load_few(c, lanes);
            if (g->relu) s = vrelu(s);
            if (dense && i * g->n + (j + 1) * VL <= m * g->n) lanes = VL;
            store_few(c, 1, lanes, s);
        }
}

/* Rows of A lie a distance apart that is known only then.  An x86 address is base + 0, 1, 2, 4 or 8 times an index: one
 * pointer to five rows, with the distance and three times it in registers, addresses all.  Compilers would keep a distance
 * for each row, more than there are registers. */
enum { ROWS_EACH = 5, ROW_POINTERS = (MR + ROWS_EACH - 1) / ROWS_EACH };

/* What lies between the multiply-adds of two tiles has to be short: a core looks some hundred instructions ahead. */
FC_INLINE void FC_NAME(gemm_body)(const int m, const int v, const int row, const fc_gemm *g) {
    vec acc[MR][2];
    if (g->bias_col) {
        vec bias[2];
        const int whole = g->n == v * VL;
        if (!whole) FC_NAME(gemm_short_bias)(v, bias, g);
        for (int j = 0; j < v && whole; j++) bias[j] = vload(g->bias_col + j * VL);
    FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] = bias[j];
    } else if (g->bias_row) {
        FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] = vset(g->bias_row[i]);
    } else
        FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] = (vec){0};

    const int64_t ldb = g->ldb, ldc = g->ldc;
    int64_t row_bytes = g->lda * (int64_t)sizeof(real);
    FC_OPAQUE(row_bytes);
    real *c = g->c;
    /* what is stored in the end, if nothing else is to be fetched */
    const int64_t next_step = g->next ? g->next_step : ldc * (int64_t)sizeof(real);
    const int64_t second_line = (g->next ? next_step : v * FC_VBYTES) > 64 ? 64 : 0;
    const char *next = g->next ? g->next : (const char *)c;
    const char *last = g->next ? (const char *)UINTPTR_MAX : (const char *)(c + (m - 1) * ldc);
    for (int64_t t = 0; t < g->n_terms; t++) {
        const real *restrict b = g->terms[t].b + g->b_shift;
        const char *a[ROW_POINTERS];
        FC_UNROLL for (int i = 0; i < ROW_POINTERS; i++) {
            a[i] = (const char *)(g->terms[t].a + g->a_shift) + (row ? i * ROWS_EACH * row_bytes : 0);
            FC_OPAQUE(a[i]);
        }
        for (int64_t k = g->terms[t].k; k > 0; k--) {
            vec bv[2];
            FC_UNROLL for (int j = 0; j < v; j++) bv[j] = vload(b + j * VL);
            b += ldb;
            if (row) {
                __builtin_prefetch(next, 0, 2);
                __builtin_prefetch(next + second_line, 0, 2);
                next = next < last ? next + next_step : last;
            }
            FC_UNROLL for (int i = 0; i < m; i++) {
                const char *p = row ? a[i / ROWS_EACH] + i % ROWS_EACH * row_bytes : a[0] + i * sizeof(real);
                const real s = *(const real *)p;
                FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] += s * bv[j];
            }
            FC_UNROLL for (int i = 0; i < ROW_POINTERS; i++) a[i] += row ? (int64_t)sizeof(real) : row_bytes;
        }
    }

    if (g->n == v * VL) {
        if (g->add)
            FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++)
                acc[i][j] += vload(c + i * ldc + j * VL);
        if (g->relu)
            FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] = vrelu(acc[i][j]);
        FC_UNROLL for (int i = 0; i < m; i++, c += ldc) FC_UNROLL for (int j = 0; j < v; j++)
            vstore(c + j * VL, acc[i][j]);
        return;
    }

    vec rows[MR][2]; /* in memory */
    FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) rows[i][j] = acc[i][j];
    FC_NAME(gemm_finish)(m, v, rows, g);
}

#define FC_GEMM(m, form, row)                                                                                     \
    static __attribute__((noinline)) void FC_NAME(gemm_##form##_##m##x1)(const fc_gemm *g) {                      \
        FC_NAME(gemm_body)(m, 1, row, g);                                                                         \
    }                                                                                                             \
    static __attribute__((noinline)) void FC_NAME(gemm_##form##_##m##x2)(const fc_gemm *g) {                      \
        FC_NAME(gemm_body)(m, 2, row, g);                                                                         \
    }
#define FC_GEMM_PAIR(m, form) {FC_NAME(gemm_##form##_##m##x1), FC_NAME(gemm_##form##_##m##x2)}

#if MR == 4
#define FC_EACH_M(f, ...) f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__) f(4, __VA_ARGS__)
#elif MR == 6
#define FC_EACH_M(f, ...)                                                                                         \
    f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__) f(4, __VA_ARGS__) f(5, __VA_ARGS__) f(6, __VA_ARGS__)
#elif MR == 8
#define FC_EACH_M(f, ...)                                                                                         \
    f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__) f(4, __VA_ARGS__) f(5, __VA_ARGS__) f(6, __VA_ARGS__)   \
        f(7, __VA_ARGS__) f(8, __VA_ARGS__)
#elif MR == 14
#define FC_EACH_M(f, ...)                                                                                         \
    f(1, __VA_ARGS__) f(2, __VA_ARGS__) f(3, __VA_ARGS__) f(4, __VA_ARGS__) f(5, __VA_ARGS__) f(6, __VA_ARGS__)   \
        f(7, __VA_ARGS__) f(8, __VA_ARGS__) f(9, __VA_ARGS__) f(10, __VA_ARGS__) f(11, __VA_ARGS__)               \
            f(12, __VA_ARGS__) f(13, __VA_ARGS__) f(14, __VA_ARGS__)
#else
#error "list the row counts of this tile height"
#endif

FC_EACH_M(FC_GEMM, row, 1)
FC_EACH_M(FC_GEMM, col, 0)

typedef void FC_NAME(gemm_fn)(const fc_gemm *);
#define FC_GEMM_ENTRY(m, form) [m] = FC_GEMM_PAIR(m, form),

static void gemm_row(int m, int vectors, const fc_gemm *g) {
    static FC_NAME(gemm_fn) *const tiles[MR + 1][2] = {FC_EACH_M(FC_GEMM_ENTRY, row)};
    tiles[m][vectors - 1](g);
}

static void gemm_col(int m, int vectors, const fc_gemm *g) {
    static FC_NAME(gemm_fn) *const tiles[MR + 1][2] = {FC_EACH_M(FC_GEMM_ENTRY, col)};
    tiles[m][vectors - 1](g);
}
