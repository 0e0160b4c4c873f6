// The product of a block without tensor cores: sums of BM x BN, TM x TN of them in each thread, from tiles of BK steps that
// lie in shared memory as [BK][LDA] and [BK][LDB].
#define NT ((BM / TM) * (BN / TN)) // threads
#define LDA (BM + FC_PACK)
#define LDB (BN + FC_PACK)

// As many values as one access of 16 bytes moves.
#define FC_PACK ((int)(16 / sizeof(real)))
struct __attribute__((aligned(16))) Pack {
  real v[16 / sizeof(real)];
};

// A thread's rows and columns of the tile come in packs, which are spread so that a warp's accesses do not collide: value
// `i` of `thread` of `threads`.
__device__ __forceinline__ int in_tile(int i, int thread, int threads) {
  return (i / FC_PACK * threads + thread) * FC_PACK + i % FC_PACK;
}
__device__ __forceinline__ void multiply(real (&sums)[TM][TN], const real *as, const real *bs, int tx, int ty) {
#pragma unroll
  for (int k = 0; k < BK; k++) {
    Pack a[TM / FC_PACK], b[TN / FC_PACK];
#pragma unroll
    for (int i = 0; i < TM / FC_PACK; i++)
      a[i] = *reinterpret_cast<const Pack *>(&as[k * LDA + in_tile(i * FC_PACK, ty, BM / TM)]);
#pragma unroll
    for (int j = 0; j < TN / FC_PACK; j++)
      b[j] = *reinterpret_cast<const Pack *>(&bs[k * LDB + in_tile(j * FC_PACK, tx, BN / TN)]);
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
      for (int j = 0; j < TN; j++) sums[i][j] += a[i / FC_PACK].v[i % FC_PACK] * b[j / FC_PACK].v[j % FC_PACK];
  }
}
