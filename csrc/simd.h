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
#ifdef FC_F32
typedef int32_t mask __attribute__((vector_size(FC_VBYTES)));
#else
typedef int64_t mask __attribute__((vector_size(FC_VBYTES)));
#endif

#define FC_INLINE static inline __attribute__((always_inline))
/* Unrolled loops keep arrays of vectors in registers.  Builds for tests do without: instrumented or split vectors do not
 * fit anyway, and would take minutes to compile. */
#if defined(__SANITIZE_ADDRESS__) || defined(FC_EMULATE)
#define FC_UNROLL
#else
#define FC_UNROLL _Pragma("GCC unroll 64")
#endif

/* Unaligned, and free to alias anything. */
FC_INLINE vec vload(const real *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

FC_INLINE void vstore(real *p, vec v) { memcpy(p, &v, sizeof v); }

FC_INLINE vec vset(real s) { return s - (vec){0}; }

/* Lanes of b where m is set, else of a. */
FC_INLINE vec vblend(vec a, vec b, mask m) { return (vec)(((mask)a & ~m) | ((mask)b & m)); }

/* max(v, 0) that lets NaN through. */
FC_INLINE vec vrelu(vec v) { return (vec)((mask)v & ~(mask)(v < (vec){0})); }

#endif
