/* The transforms of Winograd's minimal filtering, F(m, r) along each axis: n = m + r - 1 points.
 *
 *      y = A^T [ (G w) * (B^T x) ]            Lavin and Gray, "Fast algorithms for convolutional neural networks",
 *                                             CVPR 2016; the matrices by Cook and Toom from the points
 *      4 points: 0, +-1, infinity
 *      5 points: +-1/2, +-5/4, infinity
 *      6 points: 0, +-5/8, +-3/2, infinity
 *      7 points: +-5/16, +-13/16, +-27/16, infinity
 *      8 points: 0, +-1/2, +-1, +-2, infinity
 *
 * chosen for small rounding errors: Barabasz et al., "Error analysis and improving the accuracy of Winograd convolution",
 * TOMS 2020.
 *
 * Lanes are channels; the transforms of several axes are applied one after the other. */
#include "kernels.h"
#include "simd.h"

#define P1 0.625 /* the points of the 6-point transforms: +-P1, +-P2 */
#define P2 1.5
#define P3 0.5 /* of the 5-point transforms */
#define P4 1.25
#define Q3 (P3 * P3)
#define Q4 (P4 * P4)
#define Q1 (P1 * P1)
#define Q2 (P2 * P2)
#define R(x) ((real)(x))

/* Pair i of +-p in the transforms with 7 and 8 points: powers of p, sum and product of the other squares. */
typedef struct {
    double p[6], sum, product;
} FC_NAME(wino_pair);
#define wino_pair FC_NAME(wino_pair)

FC_INLINE wino_pair FC_NAME(pair_of)(const int n, const int i) {
    const double points[2][3] = {{0.3125, 0.8125, 1.6875}, {0.5, 1, 2}}, *of = points[n == 8];
    const double p = of[i], a = of[(i + 1) % 3] * of[(i + 1) % 3], b = of[(i + 2) % 3] * of[(i + 2) % 3];
    return (wino_pair){{1, p, p * p, p * p * p, p * p * p * p, p * p * p * p * p}, a + b, a * b};
}

/* B^T with 7 points, or with 8, of which the first is 0.  Row +-p: the product of all other x - q, by powers of x. */
FC_INLINE void FC_NAME(pairs_bt)(const int n, vec *d, const int s) {
    const int zero = n == 8;
    const wino_pair first = FC_NAME(pair_of)(n, 0);
    const double s1 = first.p[2] + first.sum, s2 = first.p[2] * first.sum + first.product,
                 s3 = first.p[2] * first.product;
    vec x[8];
    FC_UNROLL for (int i = 0; i < n; i++) x[i] = d[i * s];
    if (zero) d[0] = x[6] - R(s1) * x[4] + R(s2) * x[2] - R(s3) * x[0];
    FC_UNROLL for (int i = 0; i < 3; i++) {
        const wino_pair o = FC_NAME(pair_of)(n, i);
        const vec plain = x[5 + zero] - R(o.sum) * x[3 + zero] + R(o.product) * x[1 + zero];
        const vec times_p = x[4 + zero] - R(o.sum) * x[2 + zero] + R(o.product) * x[zero];
        d[(zero + 2 * i) * s] = plain + R(o.p[1]) * times_p;
        d[(zero + 2 * i + 1) * s] = plain - R(o.p[1]) * times_p;
    }
    d[(n - 1) * s] = x[n - 1] - R(s1) * x[n - 3] + R(s2) * x[n - 5] - R(s3) * x[n - 7];
}

/* A^T with 7 or 8 points, for m outputs: the powers of the points below m. */
FC_INLINE void FC_NAME(pairs_at)(const int n, const int m, vec *d, const int s) {
    const int zero = n == 8;
    const vec at_0 = d[0], last = d[(n - 1) * s];
    vec both[2][3];
    FC_UNROLL for (int i = 0; i < 3; i++) {
        const vec plus = d[(zero + 2 * i) * s], minus = d[(zero + 2 * i + 1) * s];
        both[0][i] = plus + minus, both[1][i] = plus - minus;
    }
    FC_UNROLL for (int j = 0; j < m; j++) {
        vec y = j == 0 && zero ? at_0 : j == m - 1 ? last : (vec){0};
        FC_UNROLL for (int i = 0; i < 3; i++) y += R(FC_NAME(pair_of)(n, i).p[j]) * both[j % 2][i];
        d[j * s] = y;
    }
}

/* G with 7 or 8 points, of r weights.  Row +-p: the weights times powers of it, over its differences to the others. */
FC_INLINE void FC_NAME(pairs_g)(const int n, const int r, vec *w, const int s) {
    const int zero = n == 8;
    vec x[6];
    FC_UNROLL for (int i = 0; i < r; i++) x[i] = w[i * s];
    FC_UNROLL for (int i = 0; i < 3; i++) {
        const wino_pair o = FC_NAME(pair_of)(n, i);
        const double by = 0.5 / (o.p[1 + zero] * (o.p[4] - o.sum * o.p[2] + o.product));
        vec even = x[0], odd = R(o.p[1]) * x[1];
        FC_UNROLL for (int j = 2; j < r; j++) *(j % 2 ? &odd : &even) += R(o.p[j]) * x[j];
        w[(zero + 2 * i) * s] = R(by) * (odd + even);
        w[(zero + 2 * i + 1) * s] = zero ? R(by) * (even - odd) : R(by) * (odd - even);
        if (zero && i == 0) w[0] = R(-1 / (o.p[2] * o.product)) * x[0];
    }
    w[(n - 1) * s] = x[r - 1];
}

/* B^T along one axis, in place: elements s apart. */
FC_INLINE void FC_NAME(wino_bt)(const int n, vec *d, const int s) {
    if (n == 4) {
        const vec d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s];
        d[0] = d0 - d2;
        d[s] = d1 + d2;
        d[2 * s] = d2 - d1;
        d[3 * s] = d3 - d1;
    } else if (n == 5) {
        const vec d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s];
        const vec odd1 = d3 - R(Q4) * d1, even1 = R(P3) * d2 - R(P3 * Q4) * d0;
        const vec odd2 = d3 - R(Q3) * d1, even2 = R(P4) * d2 - R(P4 * Q3) * d0;
        d[0] = odd1 + even1;
        d[s] = odd1 - even1;
        d[2 * s] = odd2 + even2;
        d[3 * s] = odd2 - even2;
        d[4 * s] = R(Q3 * Q4) * d0 - R(Q3 + Q4) * d2 + d4;
    } else if (n == 6) {
        const vec d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s], d5 = d[5 * s];
        const vec even1 = d4 - R(Q2) * d2, odd1 = R(P1) * d3 - R(P1 * Q2) * d1;
        const vec even2 = d4 - R(Q1) * d2, odd2 = R(P2) * d3 - R(P2 * Q1) * d1;
        d[0] = R(Q1 * Q2) * d0 - R(Q1 + Q2) * d2 + d4;
        d[s] = even1 + odd1;
        d[2 * s] = even1 - odd1;
        d[3 * s] = even2 + odd2;
        d[4 * s] = even2 - odd2;
        d[5 * s] = R(Q1 * Q2) * d1 - R(Q1 + Q2) * d3 + d5;
    } else if (n > 6) {
        FC_NAME(pairs_bt)(n, d, s);
    }
}

/* A^T along one axis, in place: n elements become m. */
FC_INLINE void FC_NAME(wino_at)(const int n, const int m, vec *d, const int s) {
    if (n == 4) {
        const vec d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s];
        d[0] = d0 + d1 + d2;
        d[s] = d1 - d2 + d3;
    } else if (n == 5) {
        const vec sum1 = d[0] + d[s], dif1 = d[0] - d[s], sum2 = d[2 * s] + d[3 * s], dif2 = d[2 * s] - d[3 * s],
                  d4 = d[4 * s];
        d[0] = sum1 + sum2;
        d[s] = R(P3) * dif1 + R(P4) * dif2;
        d[2 * s] = R(Q3) * sum1 + R(Q4) * sum2;
        if (m == 3) d[2 * s] += d4;
        if (m == 4) d[3 * s] = R(P3 * Q3) * dif1 + R(P4 * Q4) * dif2 + d4;
    } else if (n == 6) {
        const vec d0 = d[0], sum1 = d[s] + d[2 * s], dif1 = d[s] - d[2 * s], sum2 = d[3 * s] + d[4 * s],
                  dif2 = d[3 * s] - d[4 * s], d5 = d[5 * s];
        d[0] = d0 + sum1 + sum2;
        d[s] = R(P1) * dif1 + R(P2) * dif2;
        if (m == 2) d[s] += d5;
        if (m == 4) {
            d[2 * s] = R(Q1) * sum1 + R(Q2) * sum2;
            d[3 * s] = R(P1 * Q1) * dif1 + R(P2 * Q2) * dif2 + d5;
        }
    } else if (n > 6) {
        FC_NAME(pairs_at)(n, m, d, s);
    }
}

FC_INLINE vec FC_NAME(load_first)(const real *p, int64_t lanes) {
    vec v = {0};
    for (int64_t i = 0; i < lanes; i++) v[i] = p[i];
    return v;
}

FC_INLINE void FC_NAME(wino_input_body)(const int nz, const int ny, const int nx, const fc_wino_input *g) {
    const int64_t sz = g->stride[0], sy = g->stride[1], sx = g->stride[2];
    const int inside = g->low[0] <= 0 && g->low[1] <= 0 && g->low[2] <= 0 && g->high[0] >= nz && g->high[1] >= ny &&
                       g->high[2] >= nx;
    for (int64_t c = 0; c < g->channels; c += VL) {
        vec d[6 * 6 * 6];
        const real *in = g->in + c;
        if (inside && c + VL <= g->channels)
            for (int z = 0; z < nz; z++) FC_UNROLL for (int y = 0; y < ny; y++) FC_UNROLL for (int x = 0; x < nx; x++)
                d[(z * ny + y) * nx + x] = vload(in + z * sz + y * sy + x * sx);
        else
            for (int z = 0; z < nz; z++)
                for (int y = 0; y < ny; y++)
                    for (int x = 0; x < nx; x++) {
                        const int valid = z >= g->low[0] && z < g->high[0] && y >= g->low[1] && y < g->high[1] &&
                                          x >= g->low[2] && x < g->high[2];
                        const real *p = in + z * sz + y * sy + x * sx;
                        d[(z * ny + y) * nx + x] = !valid                   ? (vec){0}
                                                   : c + VL <= g->channels ? vload(p)
                                                                           : FC_NAME(load_first)(p, g->channels - c);
                    }
        for (int z = 0; z < nz; z++) {
            FC_UNROLL for (int y = 0; y < ny; y++) FC_NAME(wino_bt)(nx, d + (z * ny + y) * nx, 1);
            FC_UNROLL for (int x = 0; x < nx; x++) FC_NAME(wino_bt)(ny, d + z * ny * nx + x, nx);
        }
        if (nz > 1)
            for (int i = 0; i < ny * nx; i++) FC_NAME(wino_bt)(nz, d + i, ny * nx);
        real *v = g->v + c;
        for (int z = 0; z < nz; z++) FC_UNROLL for (int i = 0; i < ny * nx; i++)
            vstore(v + (z * ny * nx + i) * g->ldq, d[z * ny * nx + i]);
    }
}

FC_INLINE void FC_NAME(wino_output_body)(const int nz, const int ny, const int nx, const int mz, const int my,
                                         const int mx, const fc_wino_output *g) {
    vec check = vload(g->check);
    for (int64_t j = 0; j < g->n; j += VL) {
        vec d[6 * 6 * 6];
        for (int z = 0; z < nz; z++) FC_UNROLL for (int i = 0; i < ny * nx; i++)
            d[z * ny * nx + i] = vload(g->m + (z * ny * nx + i) * g->ldq + j);
        if (nz > 1)
            for (int i = 0; i < ny * nx; i++) FC_NAME(wino_at)(nz, mz, d + i, ny * nx);
        const int64_t lanes = g->n - j;
        const vec bias = !g->bias ? (vec){0} : lanes >= VL ? vload(g->bias + j) : FC_NAME(load_first)(g->bias + j, lanes);
        for (int z = 0; z < mz; z++) {
            FC_UNROLL for (int x = 0; x < nx; x++) FC_NAME(wino_at)(ny, my, d + z * ny * nx + x, nx);
            FC_UNROLL for (int y = 0; y < my; y++) FC_NAME(wino_at)(nx, mx, d + (z * ny + y) * nx, 1);
            if (z >= g->count[0]) continue;
            FC_UNROLL for (int y = 0; y < my; y++) FC_UNROLL for (int x = 0; x < mx; x++) {
                if (y >= g->count[1] || x >= g->count[2]) continue;
                vec v = d[(z * ny + y) * nx + x] + bias;
                check += v * 0;
                if (g->relu) v = vrelu(v);
                real *out = g->out + z * g->stride[0] + y * g->stride[1] + x * g->stride[2] + j;
                if (lanes >= VL)
                    vstore(out, v);
                else
                    for (int64_t i = 0; i < lanes; i++) out[i] = v[i];
            }
        }
    }
    vstore(g->check, check);
}

#define FC_WINO(name, nz, ny, nx, mz, my, mx, r)                                                             \
    static void FC_NAME(wino_input_##name)(const fc_wino_input *g) {                                         \
        FC_NAME(wino_input_body)(nz, ny, nx, g);                                                             \
    }                                                                                                        \
    static void FC_NAME(wino_output_##name)(const fc_wino_output *g) {                                       \
        FC_NAME(wino_output_body)(nz, ny, nx, mz, my, mx, g);                                                \
    }
#include "winograd.def"
#undef FC_WINO

static void wino_input(int shape, const fc_wino_input *g) {
    static void (*const table[])(const fc_wino_input *) = {
#define FC_WINO(name, ...) FC_NAME(wino_input_##name),
#include "winograd.def"
#undef FC_WINO
    };
    table[shape](g);
}

static void wino_output(int shape, const fc_wino_output *g) {
    static void (*const table[])(const fc_wino_output *) = {
#define FC_WINO(name, ...) FC_NAME(wino_output_##name),
#include "winograd.def"
#undef FC_WINO
    };
    table[shape](g);
}

/* G along one axis, in place: r elements, s apart, become n.  Row p: (w0 + p w1 + p^2 w2 + ..) over the product of the
 * differences to the other points; rows of +p and -p share their even terms. */
FC_INLINE void FC_NAME(wino_g)(const int n, const int r, vec *w, const int s) {
    const vec w0 = w[0], w1 = w[s];
    if (n == 4) {
        const vec w2 = w[2 * s], even = R(0.5) * w0 + R(0.5) * w2;
        w[s] = even + R(0.5) * w1;
        w[2 * s] = even - R(0.5) * w1;
        w[3 * s] = w2;
    } else if (n == 5) {
        const double by3 = 0.5 / (P3 * (Q3 - Q4)), by4 = 0.5 / (P4 * (Q4 - Q3));
        vec even3 = R(by3) * w0, even4 = R(by4) * w0, last = w1;
        if (r == 3) {
            const vec w2 = w[2 * s];
            even3 += R(by3 * Q3) * w2, even4 += R(by4 * Q4) * w2, last = w2;
        }
        w[0] = R(by3 * P3) * w1 + even3;
        w[s] = R(by3 * P3) * w1 - even3;
        w[2 * s] = R(by4 * P4) * w1 + even4;
        w[3 * s] = R(by4 * P4) * w1 - even4;
        w[4 * s] = last;
    } else if (n == 6) {
        const double by1 = 0.5 / (Q1 * (Q1 - Q2)), by2 = 0.5 / (Q2 * (Q2 - Q1));
        const vec w2 = w[2 * s];
        vec even1 = R(by1) * w0 + R(by1 * Q1) * w2, even2 = R(by2) * w0 + R(by2 * Q2) * w2, last = w2;
        vec rest1 = even1, rest2 = even2;
        if (r == 5) {
            const vec w3 = w[3 * s], w4 = w[4 * s];
            even1 += R(by1 * Q1 * Q1) * w4, even2 += R(by2 * Q2 * Q2) * w4, last = w4;
            rest1 = even1 - R(by1 * P1 * Q1) * w3, rest2 = even2 - R(by2 * P2 * Q2) * w3;
            even1 += R(by1 * P1 * Q1) * w3, even2 += R(by2 * P2 * Q2) * w3;
        }
        w[0] = R(1 / (Q1 * Q2)) * w0;
        w[s] = even1 + R(by1 * P1) * w1;
        w[2 * s] = rest1 - R(by1 * P1) * w1;
        w[3 * s] = even2 + R(by2 * P2) * w1;
        w[4 * s] = rest2 - R(by2 * P2) * w1;
        w[5 * s] = last;
    } else if (n > 6) {
        FC_NAME(pairs_g)(n, r, w, s);
    }
}

FC_INLINE void FC_NAME(wino_weights_body)(const int nz, const int ny, const int nx, const int r,
                                          const fc_wino_weights *g) {
    const int rz = nz == 1 ? 1 : r, ry = ny == 1 ? 1 : r, rx = nx == 1 ? 1 : r;
    for (int64_t c = 0; c < g->channels; c++)
        for (int64_t first = 0; first < NR; first += VL) {
            vec d[6 * 6 * 6];
            const real *w = g->w + c * g->channel_stride + first;
            for (int z = 0; z < rz; z++)
                FC_UNROLL for (int y = 0; y < ry; y++) FC_UNROLL for (int x = 0; x < rx; x++) {
                    const int64_t at = g->tap_w[(z * ry + y) * rx + x];
                    d[(z * ny + y) * nx + x] = at == FC_NO_TAP ? (vec){0} : vload(w + at);
                }
            for (int z = 0; z < rz; z++) {
                FC_UNROLL for (int y = 0; y < ry; y++) FC_NAME(wino_g)(nx, r, d + (z * ny + y) * nx, 1);
                FC_UNROLL for (int x = 0; x < nx; x++) FC_NAME(wino_g)(ny, r, d + z * ny * nx + x, nx);
            }
            if (nz > 1)
                for (int i = 0; i < ny * nx; i++) FC_NAME(wino_g)(nz, r, d + i, ny * nx);
            for (int z = 0; z < nz; z++)
                FC_UNROLL for (int q = z * ny * nx; q < (z + 1) * ny * nx; q++)
                    vstore(g->u + q * g->ldq + c * NR + first, d[q]);
        }
}

#define FC_WINO(name, nz, ny, nx, mz, my, mx, r)                                   \
    static void FC_NAME(wino_weights_##name)(const fc_wino_weights *g) {           \
        FC_NAME(wino_weights_body)(nz, ny, nx, r, g);                              \
    }
#include "winograd.def"
#undef FC_WINO

static void wino_weights(int shape, const fc_wino_weights *g) {
    static void (*const table[])(const fc_wino_weights *) = {
#define FC_WINO(name, ...) FC_NAME(wino_weights_##name),
#include "winograd.def"
#undef FC_WINO
    };
    table[shape](g);
}
