/* The vector vocabulary: GNU vector types of FC_VBYTES bytes, which GCC and Clang compile to whatever the flags of the
 * file allow (and split, correctly but slowly, if they are wider than the registers). */
#ifndef FC_SIMD_H
#define FC_SIMD_H

#include <stdint.h>
#include <string.h>

#include "real.h"

#ifndef FC_VBYTES
#error "an ISA file defines FC_VBYTES before it includes simd.h"
#endif

#define VL ((int)(FC_VBYTES / sizeof(real))) /* lanes */

typedef real vec __attribute__((vector_size(FC_VBYTES)));
typedef lane mask __attribute__((vector_size(FC_VBYTES)));

#define FC_INLINE static inline __attribute__((always_inline))
/* Unrolled loops keep arrays of vectors in registers.  Builds for tests do without: instrumented or split vectors do not
 * fit anyway, and would take minutes to compile. */
#if defined(__SANITIZE_ADDRESS__) || defined(FC_EMULATE)
#define FC_UNROLL
#else
#define FC_UNROLL _Pragma("GCC unroll 64")
#endif

/* Keeps v in a register: GCC would rather load it again for each use, as an operand from memory. */
#if defined(FC_EMULATE) || !(defined(__x86_64__) || defined(__aarch64__))
#define FC_KEEP(v) (void)0
#elif defined(__aarch64__)
#define FC_KEEP(v) __asm__("" : "+w"(v))
#elif defined(__AVX512F__)
#define FC_KEEP(v) __asm__("" : "+v"(v))
#else
#define FC_KEEP(v) __asm__("" : "+x"(v))
#endif

/* Hides what an integer or a pointer is made of. */
#define FC_OPAQUE(v) __asm__("" : "+r"(v))

/* Unaligned, and free to alias anything. */
FC_INLINE vec vload(const real *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

FC_INLINE void vstore(real *p, vec v) { memcpy(p, &v, sizeof v); }

FC_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

/* With AVX-512, loads and stores of some lanes, side by side or every second, are instructions (Clang has no shuffle by a
 * computed mask). */
#if defined(__AVX512F__) && FC_VBYTES == 64 && !defined(FC_EMULATE) && !defined(__clang__)
#include <immintrin.h>
#define FC_MASKED 1
#ifdef FC_F32
typedef __mmask16 lane_mask;
FC_INLINE vec load_chosen(const real *p, lane_mask m) { return (vec)_mm512_maskz_loadu_ps(m, p); }
FC_INLINE vec load_over(vec v, const real *p, lane_mask m) { return (vec)_mm512_mask_loadu_ps((__m512)v, m, p); }
FC_INLINE vec vblend_chosen(vec a, vec b, lane_mask m) { return (vec)_mm512_mask_blend_ps(m, (__m512)a, (__m512)b); }
FC_INLINE lane_mask are_unordered(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q); }
FC_INLINE void store_chosen(real *p, lane_mask m, vec v) { _mm512_mask_storeu_ps(p, m, (__m512)v); }
#else
typedef __mmask8 lane_mask;
FC_INLINE vec load_chosen(const real *p, lane_mask m) { return (vec)_mm512_maskz_loadu_pd(m, p); }
FC_INLINE vec load_over(vec v, const real *p, lane_mask m) { return (vec)_mm512_mask_loadu_pd((__m512d)v, m, p); }
FC_INLINE vec vblend_chosen(vec a, vec b, lane_mask m) { return (vec)_mm512_mask_blend_pd(m, (__m512d)a, (__m512d)b); }
FC_INLINE lane_mask are_unordered(vec a, vec b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_UNORD_Q); }
FC_INLINE void store_chosen(real *p, lane_mask m, vec v) { _mm512_mask_storeu_pd(p, m, (__m512d)v); }
#endif
FC_INLINE lane_mask first_lanes(int64_t n) { return (lane_mask)(n <= 0 ? 0 : n >= VL ? -1 : (1 << n) - 1); }
/* Lanes that stand for the columns [0, columns), if lane 0 stands for column `first`. */
FC_INLINE lane_mask lanes_inside(int64_t first, int64_t columns) {
    return (lane_mask)(first_lanes(columns - first) & ~first_lanes(-first));
}
FC_INLINE vec load_first(const real *p, int64_t n) { return load_chosen(p, first_lanes(n)); }
FC_INLINE void store_first(real *p, int64_t n, vec v) { store_chosen(p, first_lanes(n), v); }
FC_INLINE vec load_seconds(const real *p, int64_t n) {
    mask even = {0};
    FC_UNROLL for (int i = 0; i < VL; i++) even[i] = 2 * i;
    return __builtin_shuffle(load_first(p, 2 * n - 1), load_first(p + VL, 2 * n - 1 - VL), even);
}
FC_INLINE void store_seconds(real *p, int64_t n, vec v) {
    mask twice = {0};
    FC_UNROLL for (int i = 0; i < VL; i++) twice[i] = i / 2;
    const lane_mask even = (lane_mask)0x5555;
    store_chosen(p, even & first_lanes(2 * n), __builtin_shuffle(v, twice));
    store_chosen(p + VL, even & first_lanes(2 * n - VL), __builtin_shuffle(v, twice + VL / 2));
}
#else
#define FC_MASKED 0
#endif

/* The first `lanes` lanes are p[0], p[step], ...; the others are 0. */
FC_INLINE vec load_lanes(const real *p, int64_t step, int64_t lanes) {
    if (step == 1 && lanes == VL) return vload(p);
#if FC_MASKED
    if (step == 1) return load_first(p, lanes);
    if (step == 2) return load_seconds(p, lanes);
#endif
    real v[VL] = {0};
    for (int64_t i = 0; i < lanes; i++) v[i] = p[i * step];
    return vload(v);
}

FC_INLINE void store_lanes(real *p, int64_t step, int64_t lanes, vec v) {
    if (step == 1 && lanes == VL) {
        vstore(p, v);
        return;
    }
#if FC_MASKED
    if (step == 1) {
        store_first(p, lanes, v);
        return;
    }
    if (step == 2) {
        store_seconds(p, lanes, v);
        return;
    }
#endif
    real from[VL];
    vstore(from, v);
    for (int64_t i = 0; i < lanes; i++) p[i * step] = from[i];
}

/* The same with fewer loads and stores for few lanes side by side. */
FC_INLINE vec load_few(const real *p, int64_t lanes) {
    if (lanes == VL || FC_MASKED) return load_lanes(p, 1, lanes);
    real v[VL] = {0};
    int64_t done = 0;
    FC_UNROLL for (int piece = VL / 2; piece > 0; piece /= 2) if (lanes & piece) {
        memcpy(v + done, p + done, piece * sizeof(real));
        done += piece;
    }
    return vload(v);
}

FC_INLINE void store_few(real *p, int64_t step, int64_t lanes, vec v) {
    if (step != 1 || lanes == VL || FC_MASKED) {
        store_lanes(p, step, lanes, v);
        return;
    }
    real from[VL];
    vstore(from, v);
    int64_t done = 0;
    FC_UNROLL for (int piece = VL / 2; piece > 0; piece /= 2) if (lanes & piece) {
        memcpy(p + done, from + done, piece * sizeof(real));
        done += piece;
    }
}

FC_INLINE vec vset(real s) { return s - (vec){0}; }

/* Lanes of b where m is set, else of a. */
FC_INLINE vec vblend(vec a, vec b, mask m) { return (vec)(((mask)a & ~m) | ((mask)b & m)); }

/* max(v, 0) that lets NaN through. */
FC_INLINE vec vrelu(vec v) { return (vec)((mask)v & ~(mask)(v < (vec){0})); }

#endif
