/* The scalar type of this compilation: sources that include this file are compiled once with FC_F32 and once with
 * FC_F64.  FC_NAME(gemm) is gemm_f32 or gemm_f64. */
#ifndef FC_REAL_H
#define FC_REAL_H

#include <stdint.h>

#if defined(FC_F32) && !defined(FC_F64)
typedef float real;
typedef int32_t lane; /* of a mask of vectors */
#define FC_NAME(name) name##_f32
#elif defined(FC_F64) && !defined(FC_F32)
typedef double real;
typedef int64_t lane;
#define FC_NAME(name) name##_f64
#else
#error "compile with exactly one of -DFC_F32 and -DFC_F64"
#endif

#endif
