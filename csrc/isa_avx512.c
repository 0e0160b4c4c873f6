/* AVX-512: 32 registers, 28 of them accumulators of a 14 x 2-vector tile.  With FC_EMULATE the same source and tile
 * are compiled for narrower registers, so that tests can run them anywhere. */
#if !defined(__AVX512F__) && !defined(FC_EMULATE)
#error "isa_avx512.c needs -mavx512f -mavx512vl -mavx512bw -mavx512dq, after any other flags"
#endif
#define FC_ISA avx512
#define FC_VBYTES 64
#define MR 14
#define NR (2 * VL)
#include "simd.h"

#include "isa.inc.c"
