/* Per-channel passes over [pixel][channel]: moments, normalisation and its gradient.  A chunk of pixels is summed in
 * registers, chunks are added in double. */
#include "kernels.h"
#include "simd.h"

#define NORM_CHUNK 64

/* The next `n` (1 to 4) vectors of channels, the last of which may be short by `missing` lanes. */
#define FC_COLUMNS(body, channels, ...)                \
    for (int64_t c = 0; c < (channels);) {             \
        const int64_t left = (channels) - c;           \
        if (left >= 4 * VL) {                          \
            body(4, VL, c, __VA_ARGS__);               \
            c += 4 * VL;                               \
        } else {                                       \
            body(1, lesser(left, VL), c, __VA_ARGS__); \
            c += VL;                                   \
        }                                              \
    }

FC_INLINE vec FC_NAME(lanes_at)(const real *p, int64_t lanes) {
    return lanes == VL ? vload(p) : load_lanes(p, 1, lanes);
}

FC_INLINE void FC_NAME(moments_body)(const int v, int64_t lanes, int64_t c, const real *x, int64_t ld, int64_t pixels,
                                     int64_t before, double *mean, double *m2) {
    x += c;
    vec sum[4], square[4];
    FC_UNROLL for (int j = 0; j < v; j++) sum[j] = square[j] = (vec){0};
    for (int64_t p = 0; p < pixels; p++)
        FC_UNROLL for (int j = 0; j < v; j++) sum[j] += FC_NAME(lanes_at)(x + p * ld + j * VL, lanes);
    vec off[4]; /* what the rounding of the mean leaves */
    FC_UNROLL for (int j = 0; j < v; j++) sum[j] *= (real)1 / (real)pixels, off[j] = (vec){0};
    for (int64_t p = 0; p < pixels; p++)
        FC_UNROLL for (int j = 0; j < v; j++) {
            const vec d = FC_NAME(lanes_at)(x + p * ld + j * VL, lanes) - sum[j];
            off[j] += d;
            square[j] += d * d;
        }
    const double n = (double)pixels, share = n / (double)(before + pixels), weight = share * (double)before;
    FC_UNROLL for (int j = 0; j < v; j++) {
        real s[VL], o[VL], q[VL];
        vstore(s, sum[j]), vstore(o, off[j]), vstore(q, square[j]);
        double *m = mean + c + j * VL, *w = m2 + c + j * VL;
        for (int64_t i = 0; i < lanes; i++) { /* Chan, Golub and LeVeque, 1983 */
            const double rest = o[i] / n, here = s[i] + rest, delta = here - m[i];
            w[i] += q[i] - n * rest * rest + delta * delta * weight;
            m[i] += delta * share;
        }
    }
}

static void norm_moments(const real *x, int64_t ld, int64_t pixels, int64_t channels, double *mean, double *m2) {
    for (int64_t c = 0; c < channels; c++) mean[c] = m2[c] = 0;
    for (int64_t p = 0; p < pixels; p += NORM_CHUNK) {
        const int64_t n = lesser(NORM_CHUNK, pixels - p);
        FC_COLUMNS(FC_NAME(moments_body), channels, x + p * ld, ld, n, p, mean, m2)
    }
}

/* Where the normalised value, before the ReLU, lets a gradient pass: all that is not <= 0, so NaN too. */
FC_INLINE vec FC_NAME(passed)(vec dy, vec y) { return (vec)((mask)dy & ~(mask)(y <= (vec){0})); }

FC_INLINE void FC_NAME(norm_apply_body)(const int v, int64_t lanes, int64_t c, const fc_norm *g) {
    vec mean[4], scale[4], bias[4];
    FC_UNROLL for (int j = 0; j < v; j++) {
        mean[j] = FC_NAME(lanes_at)(g->mean + c + j * VL, lanes);
        scale[j] = FC_NAME(lanes_at)(g->scale + c + j * VL, lanes);
        bias[j] = FC_NAME(lanes_at)(g->bias + c + j * VL, lanes);
    }
    const real *x = g->x + c;
    real *out = g->out + c;
    for (int64_t p = 0; p < g->pixels; p++, x += g->x_ld, out += g->out_ld)
        FC_UNROLL for (int j = 0; j < v; j++) {
            /* Centred first: folding the mean into the bias would cancel where the mean is large. */
            vec y = (FC_NAME(lanes_at)(x + j * VL, lanes) - mean[j]) * scale[j] + bias[j];
            if (g->relu) y = vrelu(y);
            store_lanes(out + j * VL, 1, lanes, y);
        }
}

static void norm_apply(const fc_norm *g) { FC_COLUMNS(FC_NAME(norm_apply_body), g->channels, g) }

FC_INLINE void FC_NAME(norm_grad_sums_body)(const int v, int64_t lanes, int64_t c, const fc_norm *g) {
    vec mean[4], scale[4], bias[4];
    FC_UNROLL for (int j = 0; j < v; j++) {
        mean[j] = FC_NAME(lanes_at)(g->mean + c + j * VL, lanes);
        scale[j] = g->relu ? FC_NAME(lanes_at)(g->scale + c + j * VL, lanes) : (vec){0};
        bias[j] = g->relu ? FC_NAME(lanes_at)(g->bias + c + j * VL, lanes) : (vec){0};
    }
    for (int64_t from = 0; from < g->pixels; from += NORM_CHUNK) {
        const int64_t to = lesser(from + NORM_CHUNK, g->pixels);
        vec sum[4], product[4];
        FC_UNROLL for (int j = 0; j < v; j++) sum[j] = product[j] = (vec){0};
        for (int64_t p = from; p < to; p++)
            FC_UNROLL for (int j = 0; j < v; j++) {
                vec dy = FC_NAME(lanes_at)(g->dy + p * g->dy_ld + c + j * VL, lanes);
                const vec d = FC_NAME(lanes_at)(g->x + p * g->x_ld + c + j * VL, lanes) - mean[j];
                if (g->relu) dy = FC_NAME(passed)(dy, d * scale[j] + bias[j]);
                sum[j] += dy;
                product[j] += dy * d;
            }
        FC_UNROLL for (int j = 0; j < v; j++) {
            real s[VL], q[VL];
            vstore(s, sum[j]), vstore(q, product[j]);
            for (int64_t i = 0; i < lanes; i++) {
                g->sums[c + j * VL + i] += s[i];
                g->sums[g->channels + c + j * VL + i] += q[i];
            }
        }
    }
}

static void norm_grad_sums(const fc_norm *g) { FC_COLUMNS(FC_NAME(norm_grad_sums_body), g->channels, g) }

FC_INLINE void FC_NAME(norm_grad_apply_body)(const int v, int64_t lanes, int64_t c, const fc_norm *g) {
    vec mean[4], scale[4], bias[4], along[4], across[4], shift[4];
    FC_UNROLL for (int j = 0; j < v; j++) {
        mean[j] = FC_NAME(lanes_at)(g->mean + c + j * VL, lanes);
        scale[j] = g->relu ? FC_NAME(lanes_at)(g->scale + c + j * VL, lanes) : (vec){0};
        bias[j] = g->relu ? FC_NAME(lanes_at)(g->bias + c + j * VL, lanes) : (vec){0};
        along[j] = FC_NAME(lanes_at)(g->along + c + j * VL, lanes);
        across[j] = g->across ? FC_NAME(lanes_at)(g->across + c + j * VL, lanes) : (vec){0};
        shift[j] = g->across ? FC_NAME(lanes_at)(g->shift + c + j * VL, lanes) : (vec){0};
    }
    for (int64_t p = 0; p < g->pixels; p++)
        FC_UNROLL for (int j = 0; j < v; j++) {
            vec dy = FC_NAME(lanes_at)(g->dy + p * g->dy_ld + c + j * VL, lanes);
            const vec d = FC_NAME(lanes_at)(g->x + p * g->x_ld + c + j * VL, lanes) - mean[j];
            if (g->relu) dy = FC_NAME(passed)(dy, d * scale[j] + bias[j]);
            dy *= along[j];
            if (g->across) dy += d * across[j] + shift[j];
            store_lanes(g->out + p * g->out_ld + c + j * VL, 1, lanes, dy);
        }
}

static void norm_grad_apply(const fc_norm *g) { FC_COLUMNS(FC_NAME(norm_grad_apply_body), g->channels, g) }

/* Sums of `channels` columns, added to `sums` chunk by chunk. */
FC_INLINE void FC_NAME(column_sums_body)(const int v, int64_t lanes, int64_t c, const fc_norm *g) {
    for (int64_t from = 0; from < g->pixels; from += NORM_CHUNK) {
        const int64_t to = lesser(from + NORM_CHUNK, g->pixels);
        vec sum[4];
        FC_UNROLL for (int j = 0; j < v; j++) sum[j] = (vec){0};
        for (int64_t p = from; p < to; p++)
            FC_UNROLL for (int j = 0; j < v; j++) sum[j] += FC_NAME(lanes_at)(g->dy + p * g->dy_ld + c + j * VL, lanes);
        FC_UNROLL for (int j = 0; j < v; j++) {
            real s[VL];
            vstore(s, sum[j]);
            for (int64_t i = 0; i < lanes; i++) g->sums[c + j * VL + i] += s[i];
        }
    }
}

static void column_sums(const fc_norm *g) { FC_COLUMNS(FC_NAME(column_sums_body), g->channels, g) }

#undef NORM_CHUNK
