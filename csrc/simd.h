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

/* The first `lanes` lanes are p[0], p[step], ...; the others are 0. */
FC_INLINE vec load_lanes(const real *p, int64_t step, int64_t lanes) {
    if (step == 1 && lanes == VL) return vload(p);
    real v[VL] = {0};
    for (int64_t i = 0; i < lanes; i++) v[i] = p[i * step];
    return vload(v);
}

FC_INLINE void store_lanes(real *p, int64_t step, int64_t lanes, vec v) {
    if (step == 1 && lanes == VL) {
        vstore(p, v);
        return;
    }
    real from[VL];
    vstore(from, v);
    for (int64_t i = 0; i < lanes; i++) p[i * step] = from[i];
}

/* The same with fewer loads and stores for few lanes side by side. */
FC_INLINE vec load_few(const real *p, int64_t lanes) {
    if (lanes == VL) return vload(p);
    real v[VL] = {0};
    int64_t done = 0;
    FC_UNROLL for (int piece = VL / 2; piece > 0; piece /= 2) if (lanes & piece) {
        memcpy(v + done, p + done, piece * sizeof(real));
        done += piece;
    }
    return vload(v);
}

FC_INLINE void store_few(real *p, int64_t step, int64_t lanes, vec v) {
    if (step != 1 || lanes == VL) {
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
