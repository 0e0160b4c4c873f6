/* Tiles whose lanes are pixels, on their way to the output; see fc_pixels in fastconv.h. */
#include "kernels.h"
#include "simd.h"

/* Channels side by side: VL pixels x VL channels are transposed in registers. */
FC_INLINE void FC_NAME(pixels_to_channels)(const real *tile, int64_t channels, int64_t n, real *to, int64_t step) {
    for (int64_t c = 0; c < channels; c += VL) {
        const int64_t lanes = lesser(channels - c, VL);
        for (int64_t x = 0; x < n; x += VL) {
            vec r[VL];
    FC_UNROLL for (int i = 0; i < VL; i++) r[i] = i < lanes ? vload(tile + (c + i) * NR + x) : (vec){0};
            FC_NAME(transpose_square)(r);
            /* What a whole vector writes too much, the next pixel overwrites. */
            const int64_t count = lesser(n - x, VL);
            for (int64_t i = 0; i < count; i++) {
                real *at = to + c + (x + i) * step;
                if (channels == step && channels <= VL && (n - x - i) * step >= VL)
                    vstore(at, r[i]);
                else
                    store_few(at, 1, lanes, r[i]);
            }
        }
    }
}

/* Two phases take turns. */
FC_INLINE void FC_NAME(pixels_in_pairs)(const real *even, const real *odd, int64_t n, real *to) {
    for (int64_t x = 0; x < n; x += 2 * VL) {
        vec a = vload(even + x / 2), b = vload(odd + x / 2), low, high;
#ifdef __clang__ /* has no shuffle by a computed mask */
        for (int i = 0; i < VL; i++) {
            low[i] = i % 2 ? b[i / 2] : a[i / 2];
            high[i] = i % 2 ? b[(i + VL) / 2] : a[(i + VL) / 2];
        }
#else
        const mask turns = FC_NAME(iota) / 2 + (FC_NAME(iota) & 1) * VL;
        low = __builtin_shuffle(a, b, turns);
        high = __builtin_shuffle(a, b, turns + VL / 2);
#endif
        store_few(to + x, 1, lesser(n - x, VL), low);
        if (n - x > VL) store_few(to + x + VL, 1, lesser(n - x - VL, VL), high);
    }
}

static void pixels_out(const fc_pixels_out *g) {
    if (g->phases == 1 && g->channel_step == 1 && g->channels > 1) {
        FC_NAME(pixels_to_channels)(g->tile, g->channels, g->n[0], g->to[0], g->step);
        return;
    }
    for (int64_t c = 0; c < g->channels; c++) {
        const real *from = g->tile + c * NR;
        const int64_t at = c * g->channel_step;
        if (g->phases == 1 && g->step == 1) {
            int64_t x = 0;
            for (; x + VL <= g->n[0]; x += VL) vstore(g->to[0] + at + x, vload(from + x));
            if (x < g->n[0]) store_few(g->to[0] + at + x, 1, g->n[0] - x, vload(from + x));
        } else if (g->phases == 2 && g->step == 2 && g->to[1] == g->to[0] + 1 && g->n[0] - g->n[1] <= 1 &&
                   g->n[0] >= g->n[1])
            FC_NAME(pixels_in_pairs)(from, from + g->tile_step, g->n[0] + g->n[1], g->to[0] + at);
        else
            for (int64_t x = 0; x < g->n[0]; x++)
                for (int64_t p = 0; p < g->phases; p++)
                    if (x < g->n[p]) g->to[p][at + x * g->step] = from[p * g->tile_step + x];
    }
}
