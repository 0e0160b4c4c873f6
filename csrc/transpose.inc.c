/* Between NCHW memory and blocks of VL channels, [x][VL], that the transforms work on. */
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

static void channels_in(const real *from, int64_t channel_stride, int64_t x_stride, int64_t channels, int64_t width,
                        real *to) {
    int64_t x = 0;
    if (channels >= VL && x_stride == 1)
        for (; x + VL <= width; x += VL) {
            vec r[VL];
    FC_UNROLL for (int i = 0; i < VL; i++) r[i] = vload(from + i * channel_stride + x);
            FC_NAME(transpose_square)(r);
            FC_UNROLL for (int i = 0; i < VL; i++) vstore(to + (x + i) * VL, r[i]);
        }
    for (; x < width; x++)
        for (int64_t c = 0; c < VL; c++) to[x * VL + c] = c < channels ? from[c * channel_stride + x * x_stride] : 0;
}

static void channels_out(const real *from, int64_t channels, int64_t width, real *to, int64_t channel_stride,
                         int64_t x_stride) {
    int64_t x = 0;
    if (channels >= VL && x_stride == 1)
        for (; x + VL <= width; x += VL) {
            vec r[VL];
            FC_UNROLL for (int i = 0; i < VL; i++) r[i] = vload(from + (x + i) * VL);
            FC_NAME(transpose_square)(r);
            FC_UNROLL for (int i = 0; i < VL; i++) vstore(to + i * channel_stride + x, r[i]);
        }
    for (int64_t c = 0; c < channels && c < VL; c++)
        for (int64_t i = x; i < width; i++) to[c * channel_stride + i * x_stride] = from[i * VL + c];
}
