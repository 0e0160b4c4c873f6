/* AVX2 and FMA: 16 registers, 12 of them accumulators of a 6 x 2-vector tile. */
#if !defined(__AVX2__) || !defined(__FMA__)
#error "isa_avx2.c needs -mavx2 -mfma, after any other flags"
#endif
#define FC_ISA avx2
#define FC_VBYTES 32
#define MR 6
#define NR (2 * VL)
#include "simd.h"

#include "isa.inc.c"
