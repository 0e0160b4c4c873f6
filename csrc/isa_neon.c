/* NEON (AArch64): 32 registers of 16 bytes, 16 of them accumulators of an 8 x 2-vector tile. */
#if !defined(__aarch64__)
#error "isa_neon.c is for AArch64"
#endif
#define FC_ISA neon
#define FC_VBYTES 16
#define MR 8
#define NR (2 * VL)
#include "simd.h"

#include "isa.inc.c"
