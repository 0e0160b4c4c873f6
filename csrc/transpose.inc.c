/* Between NCHW memory and pixels of VL channels, [x][ld], that transforms and products work on. */
#include "kernels.h"
#include "simd.h"

#if FC_VBYTES == 64 && defined(FC_F32)
static const mask FC_NAME(iota) = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif FC_VBYTES / 8 == 8 || (FC_VBYTES == 32 && defined(FC_F32))
static const mask FC_NAME(iota) = {0, 1, 2, 3, 4, 5, 6, 7};
#elif FC_VBYTES == 32 || defined(FC_F32)
static const mask FC_NAME(iota) = {0, 1, 2, 3};
#else
static const mask FC_NAME(iota) = {0, 1};
#endif

/* Transposes VL x VL in registers: at distance s, lanes with and without bit s trade places between rows that differ
 * in that bit. */
FC_INLINE void FC_NAME(transpose_square)(vec r[VL]) {
#ifdef __clang__ /* has no shuffle by a computed mask; a loop is what its vectoriser understands */
    vec t[VL];
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < VL; j++) t[i][j] = r[j][i];
    for (int i = 0; i < VL; i++) r[i] = t[i];
#else
    FC_UNROLL for (int s = 1; s < VL; s *= 2) {
        const mask high = (FC_NAME(iota) & s) != 0;
        const mask first = (high & (FC_NAME(iota) + VL - s)) | (~high & FC_NAME(iota));
        const mask second = (high & (FC_NAME(iota) + VL)) | (~high & (FC_NAME(iota) + s));
        FC_UNROLL for (int i = 0; i < VL; i++) if (!(i & s)) {
            const vec a = r[i], b = r[i + s];
            r[i] = __builtin_shuffle(a, b, first);
            r[i + s] = __builtin_shuffle(a, b, second);
        }
    }
#endif
}

enum { FEW = 4 }; /* pixels that are not worth a square */

/* Whole squares, the last of which overlaps the one before; or squares that are not full. */
static __attribute__((noinline)) void channels_in(const real *from, int64_t channel_stride, int64_t x_stride,
                                                  int64_t channels, int64_t width, real *to, int64_t ld) {
    if (x_stride == 1 && width >= VL && (channels >= VL || ld >= VL)) {
        for (int64_t next = 0; next < width; next += VL) {
            const int64_t x = lesser(next, width - VL);
            vec r[VL];
    FC_UNROLL for (int i = 0; i < VL; i++) r[i] = i < channels ? vload(from + i * channel_stride + x) : (vec){0};
            FC_NAME(transpose_square)(r);
            FC_UNROLL for (int i = 0; i < VL; i++) vstore(to + (x + i) * ld, r[i]);
        }
        return;
    }
    if (FC_MASKED && x_stride <= 2 && x_stride > 0 && width >= FEW && (channels >= VL || ld >= VL)) {
        for (int64_t x = 0; x < width; x += VL) {
            const int64_t n = lesser(width - x, VL);
            vec r[VL];
    FC_UNROLL for (int i = 0; i < VL; i++) r[i] = i < channels
                                                          ? load_lanes(from + i * channel_stride + x * x_stride, x_stride, n)
                                                          : (vec){0};
            FC_NAME(transpose_square)(r);
            FC_UNROLL for (int i = 0; i < VL; i++) if (i < n) vstore(to + (x + i) * ld, r[i]);
        }
        return;
    }
    const int64_t lanes = lesser(ld, VL);
    for (int64_t x = 0; x < width; x++)
        for (int64_t c = 0; c < lanes; c++) to[x * ld + c] = c < channels ? from[c * channel_stride + x * x_stride] : 0;
}

static void channels_out(const real *from, int64_t ld, int64_t channels, int64_t width, real *to,
                         int64_t channel_stride, int64_t x_stride) {
    if (x_stride == 1 && width >= VL) {
        for (int64_t next = 0; next < width; next += VL) {
            const int64_t x = lesser(next, width - VL);
            vec r[VL];
    FC_UNROLL for (int i = 0; i < VL; i++) r[i] = vload(from + (x + i) * ld);
            FC_NAME(transpose_square)(r);
            FC_UNROLL for (int i = 0; i < VL; i++) if (i < channels) vstore(to + i * channel_stride + x, r[i]);
        }
        return;
    }
    if (FC_MASKED && x_stride <= 2 && x_stride > 0 && width >= FEW) {
        for (int64_t x = 0; x < width; x += VL) {
            const int64_t n = lesser(width - x, VL);
            vec r[VL];
    FC_UNROLL for (int i = 0; i < VL; i++) r[i] = i < n ? vload(from + (x + i) * ld) : (vec){0};
            FC_NAME(transpose_square)(r);
            FC_UNROLL for (int i = 0; i < VL; i++) if (i < channels)
                store_lanes(to + i * channel_stride + x * x_stride, x_stride, n, r[i]);
        }
        return;
    }
    for (int64_t c = 0; c < channels && c < VL; c++)
        for (int64_t x = 0; x < width; x++) to[c * channel_stride + x * x_stride] = from[x * ld + c];
}
