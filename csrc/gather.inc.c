/* Patches of the input as an operand of the product: the implicit im2col, a cache-sized block at a time. */
#include "kernels.h"
#include "simd.h"

/* Most runs are shorter than a call of memcpy takes; setup.py keeps the compiler from making one of these loops. */
FC_INLINE void FC_NAME(copy)(real *restrict to, const real *restrict from, int64_t n, int64_t stride) {
    int64_t i = 0;
    if (stride == 1)
        for (; i + VL <= n; i += VL) vstore(to + i, vload(from + i));
    for (; i < n; i++) to[i] = from[i * stride];
}

FC_INLINE void FC_NAME(zero)(real *to, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) vstore(to + i, (vec){0});
    for (; i < n; i++) to[i] = 0;
}

/* The element offset of the input row under one tap for the output row (d, h), or -1 if it lies in the padding.
 * (Offsets may be negative for arrays with negative strides, hence the flag beside it.) */
FC_INLINE int FC_NAME(input_row)(const fc_gather *g, const int64_t *at, int64_t d, int64_t h, int64_t *offset) {
    const int64_t z = d * g->step[0] + at[0], y = h * g->step[1] + at[1];
    *offset = z * g->in_stride[1] + y * g->in_stride[2];
    return z >= 0 && z < g->in_size[0] && y >= 0 && y < g->in_size[1];
}

static void gather_rows(const fc_gather *g, real *to) {
    const int64_t channels = g->in_channels, first_tap = g->r0 / channels, first_channel = g->r0 % channels;
    int64_t w = g->pixel % g->out_size[2], h = g->pixel / g->out_size[2] % g->out_size[1];
    int64_t d = g->pixel / g->out_size[2] / g->out_size[1];
    for (int64_t p = 0; p < g->pixels; p++, to += g->ld) {
        const int64_t *at = g->tap_at + 3 * first_tap;
        int64_t c = first_channel;
        for (int64_t r = g->r0; r < g->r1; at += 3, c = 0) {
            const int64_t n = channels - c < g->r1 - r ? channels - c : g->r1 - r;
            const int64_t x = w * g->step[2] + at[2];
            int64_t row;
            if (FC_NAME(input_row)(g, at, d, h, &row) && x >= 0 && x < g->in_size[2]) FC_NAME(copy)
            (to + (r - g->r0), g->in + c * g->in_stride[0] + row + x * g->in_stride[3], n, g->in_stride[0]);
            else FC_NAME(zero)(to + (r - g->r0), n);
            r += n;
        }
        if (++w == g->out_size[2]) {
            w = 0;
            if (++h == g->out_size[1]) h = 0, d++;
        }
    }
}

/* The lanes [lane, lane + count) of a panel: pixels of one output row, which starts at column w of row (d, h). */
FC_INLINE void FC_NAME(gather_segment)(const fc_gather *g, int64_t d, int64_t h, int64_t w, int64_t lane, int64_t count,
                                       real *to) {
    const int64_t channels = g->in_channels, stride = g->step[2] * g->in_stride[3];
    const int64_t *at = g->tap_at + 3 * (g->r0 / channels);
    int64_t c = g->r0 % channels;
    real *next = to + lane;
    for (int64_t r = g->r0; r < g->r1; at += 3, c = 0) {
        const int64_t n = channels - c < g->r1 - r ? channels - c : g->r1 - r;
        const int64_t x = w * g->step[2] + at[2];
        int64_t row, low = 0, high = 0; /* lanes [low, high) of the segment lie inside the input */
        if (FC_NAME(input_row)(g, at, d, h, &row) && x < g->in_size[2]) {
            low = x < 0 ? -x : 0;
            high = g->in_size[2] - x;
            if (g->step[2] != 1) { /* a division costs as much as copying several vectors */
                low = (low + g->step[2] - 1) / g->step[2];
                high = (high - 1) / g->step[2] + 1;
            }
            if (low > count) low = count;
            if (high > count) high = count;
            if (high < low) high = low;
        }
        const real *from = g->in + c * g->in_stride[0] + row + x * g->in_stride[3];
        if (count == NR && low == 0 && high == NR && stride == 1)
            for (int64_t i = 0; i < n; i++, next += g->ld, from += g->in_stride[0]) {
                vstore(next, vload(from));
                vstore(next + VL, vload(from + VL));
            }
        else
            for (int64_t i = 0; i < n; i++, next += g->ld, from += g->in_stride[0]) {
                FC_NAME(zero)(next, low);
                FC_NAME(copy)(next + low, from + low * stride, high - low, stride);
                FC_NAME(zero)(next + high, count - high);
            }
        r += n;
    }
}

static void gather_panel(const fc_gather *g, real *to) {
    int64_t w = g->pixel % g->out_size[2], h = g->pixel / g->out_size[2] % g->out_size[1];
    int64_t d = g->pixel / g->out_size[2] / g->out_size[1];
    for (int64_t lane = 0; lane < g->pixels; w = 0) {
        const int64_t left = g->pixels - lane, in_row = g->out_size[2] - w, count = left < in_row ? left : in_row;
        FC_NAME(gather_segment)(g, d, h, w, lane, count, to);
        lane += count;
        if (++h == g->out_size[1]) h = 0, d++;
    }
    if (g->pixels < g->width)
        for (int64_t r = 0; r < g->r1 - g->r0; r++) FC_NAME(zero)(to + r * g->ld + g->pixels, g->width - g->pixels);
}
