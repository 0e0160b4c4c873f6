// The product of a warp on tensor cores (mma.sync, sm_80 on), sums in float32: of 16 bits, or of float32 in TF32.
#define MMA_DEPTH (2 * RUN) // 8 of TF32, 16 of 16 bits
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if FC_DTYPE == FC_FLOAT32
  fc::mma_tf32(d, a, b);
#elif FC_DTYPE == FC_FLOAT16
  fc::mma_half(d, a, b);
#else
  fc::mma_bfloat16(d, a, b);
#endif
}
// All products of a warp's fragments.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void multiply(float (&sums)[ROWS][COLUMNS][4], const unsigned (&a)[ROWS][4],
                                         const unsigned (&b)[COLUMNS][2]) {
#pragma unroll
  for (int i = 0; i < ROWS; i++)
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) mma(sums[i][j], a[i], b[j]);
}
