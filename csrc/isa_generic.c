/* Plain vectors of 16 bytes: SSE2 on x86-64, whatever there is elsewhere. */
#define FC_ISA generic
#define FC_VBYTES 16
#define MR 4
#define NR (2 * VL)
#include "simd.h"

#include "isa.inc.c"
