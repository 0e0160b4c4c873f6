/* Weight gradients: operands into panels, results into dw, and the transforms of Winograd's minimal filtering.
 *
 * F(r, m) with the points of the forward F(m, r), so that patches are transformed by the same B^T:
 *
 *      dw = A^T [ sum over tiles of (G dy) * (B^T x) ]       r taps from tiles of m outputs, n = m + r - 1 points
 *
 * A^T has r rows here and G has m columns.  (Lavin and Gray, CVPR 2016, section 3.) */
#include "kernels.h"
#include "simd.h"

static void wgrad_copy(const fc_wgrad_copy *g) {
    const int64_t step = g->step, pitch = g->pitch;
    /* Of all but the last pixels a whole vector can be read, which ends in channels or pixels that are copied too. */
    int64_t end = 0, furthest = 0;
    for (int64_t j = 0; j < g->pieces; j++) {
        if (g->from_at[j] + g->lanes[j] > end) end = g->from_at[j] + g->lanes[j];
        if (g->from_at[j] > furthest) furthest = g->from_at[j];
    }
    int64_t whole = 0;
    if (furthest + VL <= end)
        whole = g->count;
    else if (step > 0)
        whole = g->count - lesser(g->count, (furthest + VL - end + step - 1) / step);
    const real *from = g->from;
    real *to = g->to;
    if (g->pieces == 1) { /* of depthwise, which copies more than it computes */
        const int64_t from_at = g->from_at[0], to_at = g->to_at[0];
        for (int64_t i = 0; i < whole; i++, from += step, to += pitch) vstore(to + to_at, vload(from + from_at));
    } else
        for (int64_t i = 0; i < whole; i++, from += step, to += pitch)
            for (int64_t j = 0; j < g->pieces; j++) vstore(to + g->to_at[j], vload(from + g->from_at[j]));
    for (int64_t i = whole; i < g->count; i++, from += step, to += pitch)
        for (int64_t j = 0; j < g->pieces; j++) vstore(to + g->to_at[j], load_few(from + g->from_at[j], g->lanes[j]));
}

static void wgrad_store(const real *from, const int64_t *from_at, int64_t width, int64_t lanes, real *to,
                        int64_t lane_stride, int64_t x_stride) {
    for (int64_t k = 0; k < lanes; k += VL) {
        const int64_t rows = lesser(VL, lanes - k);
        for (int64_t x = 0; x < width; x += VL) {
            const int64_t n = lesser(VL, width - x);
            vec r[VL];
    FC_UNROLL for (int i = 0; i < VL; i++) r[i] = i < n ? vload(from + from_at[x + i] + k) : (vec){0};
            FC_NAME(transpose_square)(r);
            real *out = to + k * lane_stride + x * x_stride;
            FC_UNROLL for (int i = 0; i < VL; i++) if (i < rows) store_few(out + i * lane_stride, x_stride, n, r[i]);
        }
    }
}

/* Sums of the taps of `rows` runs of `width` taps side by side. */
FC_INLINE void FC_NAME(wgrad_lanes_body)(const int rows, const int width, const int picked, const fc_wgrad_lanes *g,
                                         const int64_t *at, int64_t channel, real *sum) {
    vec acc[4][7];
    mask pick = {0};
    if (picked) {
        memcpy(&pick, g->pick, sizeof pick);
        pick += (lane)channel;
    }
    FC_UNROLL for (int r = 0; r < rows; r++) FC_UNROLL for (int t = 0; t < width; t++) acc[r][t] = (vec){0};
    for (int64_t i = 0; i < g->n_runs; i++) {
        const real *x[4], *dy = g->runs[i].b;
        FC_UNROLL for (int r = 0; r < rows; r++) x[r] = g->runs[i].a + at[r];
        for (int64_t k = g->runs[i].k; k > 0; k--, dy += VL) {
            const vec d = vload(dy);
            FC_UNROLL for (int r = 0; r < rows; r++) {
                FC_UNROLL for (int t = 0; t < width; t++) {
                    vec v = vload(x[r] + t * VL);
                    if (picked) v = FC_NAME(pick)(v, pick);
                    acc[r][t] += d * v;
                }
                x[r] += g->x_step;
            }
        }
    }
    FC_UNROLL for (int r = 0; r < rows; r++) FC_UNROLL for (int t = 0; t < width; t++) {
        real *to = sum + (r * width + t) * g->group * VL;
        vstore(to, g->add ? vload(to) + acc[r][t] : acc[r][t]);
    }
}

#define FC_LANES(n_of, w_of)                                                                                     \
    do {                                                                                                          \
        if (g->pick)                                                                                              \
            FC_NAME(wgrad_lanes_body)(n_of, w_of, 1, g, g->rows + r, c, sum);                                    \
        else                                                                                                      \
            FC_NAME(wgrad_lanes_body)(n_of, w_of, 0, g, g->rows + r, c, sum);                                    \
    } while (0)

static void wgrad_lanes(const fc_wgrad_lanes *g) {
    for (int64_t c = 0; c < g->group; c++)
        for (int64_t r = 0, n; r < g->n_rows; r += n) {
            real *sum = g->sum + (r * g->width * g->group + c) * VL;
            const int64_t left = g->n_rows - r;
            switch (g->width) { /* about ten sums at a time */
            case 3:
                n = left >= 3 ? 3 : 1;
                if (n == 3)
                    FC_LANES(3, 3);
                else
                    FC_LANES(1, 3);
                break;
            case 5:
                n = left >= 2 ? 2 : 1;
                if (n == 2)
                    FC_LANES(2, 5);
                else
                    FC_LANES(1, 5);
                break;
            case 7:
                n = 1;
                FC_LANES(1, 7);
                break;
            default: /* width 1 */
                n = left >= 4 ? 4 : 1;
                if (n == 4)
                    FC_LANES(4, 1);
                else
                    FC_LANES(1, 1);
            }
        }
}

/* G along one axis, in place: m elements, s apart, become n. */
FC_INLINE void FC_NAME(grad_g)(const int n, const int m, vec *w, const int s) {
    if (n == 4) {
        const vec w0 = w[0], w1 = w[s];
        w[s] = R(0.5) * (w0 + w1);
        w[2 * s] = R(0.5) * (w0 - w1);
        w[3 * s] = w1;
    } else if (n == 5) {
        const vec w0 = w[0], w1 = w[s], w2 = w[2 * s];
        vec odd1 = R(P3) * w1, odd2 = R(P4) * w1, last = w2;
        if (m == 4) {
            const vec w3 = w[3 * s];
            odd1 += R(P3 * Q3) * w3, odd2 += R(P4 * Q4) * w3, last = w3;
        }
        const vec even1 = w0 + R(Q3) * w2, even2 = w0 + R(Q4) * w2;
        w[0] = R(0.5 / (P3 * (Q3 - Q4))) * (odd1 + even1);
        w[s] = R(0.5 / (P3 * (Q3 - Q4))) * (odd1 - even1);
        w[2 * s] = R(0.5 / (P4 * (Q4 - Q3))) * (odd2 + even2);
        w[3 * s] = R(0.5 / (P4 * (Q4 - Q3))) * (odd2 - even2);
        w[4 * s] = last;
    } else if (n == 6) {
        const vec w0 = w[0], w1 = w[s];
        vec even1 = w0, odd1 = R(P1) * w1, even2 = w0, odd2 = R(P2) * w1, last = w1;
        if (m == 4) {
            const vec w2 = w[2 * s], w3 = w[3 * s];
            even1 += R(Q1) * w2, odd1 += R(P1 * Q1) * w3, even2 += R(Q2) * w2, odd2 += R(P2 * Q2) * w3, last = w3;
        }
        w[0] = R(1 / (Q1 * Q2)) * w0;
        w[s] = R(0.5 / (Q1 * (Q1 - Q2))) * (even1 + odd1);
        w[2 * s] = R(0.5 / (Q1 * (Q1 - Q2))) * (even1 - odd1);
        w[3 * s] = R(0.5 / (Q2 * (Q2 - Q1))) * (even2 + odd2);
        w[4 * s] = R(0.5 / (Q2 * (Q2 - Q1))) * (even2 - odd2);
        w[5 * s] = last;
    } else if (n > 6) {
        FC_NAME(pairs_g)(n, m, w, s);
    }
}

/* A^T along one axis, in place: n elements become r. */
FC_INLINE void FC_NAME(grad_at)(const int n, const int r, vec *d, const int s) {
    if (n == 4) {
        const vec d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s];
        d[0] = d0 + d1 + d2;
        d[s] = d1 - d2;
        d[2 * s] = d1 + d2 + d3;
    } else if (n == 5) {
        const vec sum1 = d[0] + d[s], dif1 = d[0] - d[s], sum2 = d[2 * s] + d[3 * s], dif2 = d[2 * s] - d[3 * s],
                  d4 = d[4 * s];
        d[0] = sum1 + sum2;
        d[s] = R(P3) * dif1 + R(P4) * dif2;
        if (r == 2) d[s] += d4;
        if (r == 3) d[2 * s] = R(Q3) * sum1 + R(Q4) * sum2 + d4;
    } else if (n == 6) {
        const vec d0 = d[0], sum1 = d[s] + d[2 * s], dif1 = d[s] - d[2 * s], sum2 = d[3 * s] + d[4 * s],
                  dif2 = d[3 * s] - d[4 * s], d5 = d[5 * s];
        d[0] = d0 + sum1 + sum2;
        d[s] = R(P1) * dif1 + R(P2) * dif2;
        d[2 * s] = R(Q1) * sum1 + R(Q2) * sum2;
        if (r == 3) d[2 * s] += d5;
        if (r == 5) {
            d[3 * s] = R(P1 * Q1) * dif1 + R(P2 * Q2) * dif2;
            d[4 * s] = R(Q1 * Q1) * sum1 + R(Q2 * Q2) * sum2 + d5;
        }
    } else if (n > 6) {
        FC_NAME(pairs_at)(n, r, d, s);
    }
}

FC_INLINE void FC_NAME(wino_grad_output_body)(const int nz, const int ny, const int nx, const int mz, const int my,
                                              const int mx, const fc_wino_input *g) {
    const int64_t sz = g->stride[0], sy = g->stride[1], sx = g->stride[2];
    const int inside = g->high[0] >= mz && g->high[1] >= my && g->high[2] >= mx;
    for (int64_t c = 0; c < g->channels; c += VL) {
        vec d[6 * 6 * 6];
        const real *in = g->in + c;
        if (inside && c + VL <= g->channels)
            for (int z = 0; z < mz; z++) FC_UNROLL for (int y = 0; y < my; y++) FC_UNROLL for (int x = 0; x < mx; x++)
                d[(z * ny + y) * nx + x] = vload(in + z * sz + y * sy + x * sx);
        else
            for (int z = 0; z < mz; z++)
                for (int y = 0; y < my; y++)
                    for (int x = 0; x < mx; x++) {
                        const int valid = z < g->high[0] && y < g->high[1] && x < g->high[2];
                        const real *p = in + z * sz + y * sy + x * sx;
                        d[(z * ny + y) * nx + x] = !valid                   ? (vec){0}
                                                   : c + VL <= g->channels ? vload(p)
                                                                           : load_few(p, g->channels - c);
                    }
        for (int z = 0; z < mz; z++) {
            FC_UNROLL for (int y = 0; y < my; y++) FC_NAME(grad_g)(nx, mx, d + (z * ny + y) * nx, 1);
            FC_UNROLL for (int x = 0; x < nx; x++) FC_NAME(grad_g)(ny, my, d + z * ny * nx + x, nx);
        }
        if (nz > 1)
            for (int i = 0; i < ny * nx; i++) FC_NAME(grad_g)(nz, mz, d + i, ny * nx);
        real *v = g->v + c;
        for (int z = 0; z < nz; z++) FC_UNROLL for (int i = 0; i < ny * nx; i++)
            vstore(v + (z * ny * nx + i) * g->ldq, d[z * ny * nx + i]);
    }
}

FC_INLINE void FC_NAME(wino_grad_weights_body)(const int nz, const int ny, const int nx, const int r,
                                               const fc_wino_grad *g) {
    const int rz = nz == 1 ? 1 : r, ry = ny == 1 ? 1 : r, rx = nx == 1 ? 1 : r;
    vec check = vload(g->check);
    for (int64_t c = 0; c < g->channels; c++)
        for (int64_t k = 0; k < g->lanes; k += VL) {
            vec d[6 * 6 * 6];
            const real *m = g->m + c * g->ld + k;
            for (int z = 0; z < nz; z++) FC_UNROLL for (int i = 0; i < ny * nx; i++)
                d[z * ny * nx + i] = vload(m + (z * ny * nx + i) * g->ldq);
            if (nz > 1)
                for (int i = 0; i < ny * nx; i++) FC_NAME(grad_at)(nz, r, d + i, ny * nx);
            real *to = g->to + c * g->ld + k;
            for (int z = 0; z < rz; z++) {
                if (ny > 1)
                    FC_UNROLL for (int x = 0; x < nx; x++) FC_NAME(grad_at)(ny, r, d + z * ny * nx + x, nx);
                FC_UNROLL for (int y = 0; y < ry; y++) FC_NAME(grad_at)(nx, r, d + (z * ny + y) * nx, 1);
                FC_UNROLL for (int y = 0; y < ry; y++) FC_UNROLL for (int x = 0; x < rx; x++) {
                    const vec v = d[(z * ny + y) * nx + x];
                    check += v * 0;
                    vstore(to + ((z * ry + y) * rx + x) * g->tap_step, v);
                }
            }
        }
    vstore(g->check, check);
}

#define FC_WINO(name, nz, ny, nx, mz, my, mx, r)                                                             \
    static void FC_NAME(wino_grad_output_##name)(const fc_wino_input *g) {                                   \
        FC_NAME(wino_grad_output_body)(nz, ny, nx, mz, my, mx, g);                                           \
    }                                                                                                        \
    static void FC_NAME(wino_grad_weights_##name)(const fc_wino_grad *g) {                                   \
        FC_NAME(wino_grad_weights_body)(nz, ny, nx, r, g);                                                   \
    }
#include "winograd.def"
#undef FC_WINO

static void wino_grad_output(int shape, const fc_wino_input *g) {
    static void (*const table[])(const fc_wino_input *) = {
#define FC_WINO(name, ...) FC_NAME(wino_grad_output_##name),
#include "winograd.def"
#undef FC_WINO
    };
    table[shape](g);
}

static void wino_grad_weights(int shape, const fc_wino_grad *g) {
    static void (*const table[])(const fc_wino_grad *) = {
#define FC_WINO(name, ...) FC_NAME(wino_grad_weights_##name),
#include "winograd.def"
#undef FC_WINO
    };
    table[shape](g);
}
