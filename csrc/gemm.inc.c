/* The register-tiled matrix product that every convolution pass ends in.
 *
 * A tile of m rows and v vectors of C stays in registers while the terms stream by.  Per k: v vector loads of B, m
 * scalar broadcasts of A, m * v multiply-adds.  The body is written once and instantiated for every m and v, for A with
 * its k contiguous (`row`: patches in place or gathered) and with its rows contiguous (`col`: packed panels). */
#include "kernels.h"
#include "simd.h"

/* The last columns of C, fewer than the v vectors that the m rows of sums have: what follows the sums, and stores.  Rows
 * that leave no gaps are stored whole: what one has too much, the next ones overwrite. */
static __attribute__((noinline)) void FC_NAME(gemm_finish)(const int m, const int v, vec rows[MR][2],
                                                           const fc_gemm *g) {
    const int64_t tail = g->n - (v - 1) * VL;
    const int dense = g->ldc == g->n && !g->add;
    vec bias[2] = {{0}};
    for (int j = 0; j < v && g->bias_col; j++) bias[j] = load_few(g->bias_col + j * VL, j < v - 1 ? VL : tail);
    for (int i = 0; i < m; i++)
        for (int j = 0; j < v; j++) {
            real *c = g->c + i * g->ldc + j * VL;
            int64_t lanes = j < v - 1 ? VL : tail;
            vec s = rows[i][j];
            if (g->add) s += load_few(c, lanes);
            if (g->bias_col) s += bias[j];
            if (g->bias_row) s += g->bias_row[i];
            if (g->relu) s = vrelu(s);
            if (dense && i * g->n + (j + 1) * VL <= m * g->n) lanes = VL;
            store_few(c, 1, lanes, s);
        }
}

FC_INLINE void FC_NAME(gemm_body)(const int m, const int v, const int row, const fc_gemm *g) {
    vec acc[MR][2];
    FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] = (vec){0};

    const int64_t lda = g->lda, ldb = g->ldb;
    const char *next = g->next ? g->next : (const char *)g->c;
    const int64_t next_step = g->next ? g->next_step : 0, second_line = next_step > 64 ? 64 : 0;
    for (int64_t t = 0; t < g->n_terms; t++) {
        const real *restrict a = g->terms[t].a + g->a_shift;
        const real *restrict b = g->terms[t].b + g->b_shift;
        for (int64_t k = g->terms[t].k; k > 0; k--) {
            vec bv[2];
            FC_UNROLL for (int j = 0; j < v; j++) bv[j] = vload(b + j * VL);
            b += ldb;
            if (row) {
                __builtin_prefetch(next, 0, 2);
                __builtin_prefetch(next + second_line, 0, 2);
                next += next_step;
            }
            FC_UNROLL for (int i = 0; i < m; i++) {
                const real s = row ? a[i * lda] : a[i];
                FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] += s * bv[j];
            }
            a += row ? 1 : lda;
        }
    }

    real *c = g->c;
    const int64_t ldc = g->ldc;
    if (g->n == v * VL) {
        if (g->add)
            FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++)
                acc[i][j] += vload(c + i * ldc + j * VL);
        if (g->bias_col)
            FC_UNROLL for (int j = 0; j < v; j++) {
                const vec bias = vload(g->bias_col + j * VL);
                FC_UNROLL for (int i = 0; i < m; i++) acc[i][j] += bias;
            }
        if (g->bias_row)
            FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] += g->bias_row[i];
        if (g->relu)
            FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] = vrelu(acc[i][j]);
        FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++)
            vstore(c + i * ldc + j * VL, acc[i][j]);
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
