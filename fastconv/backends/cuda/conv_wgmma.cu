// A lattice of one group as an implicit matrix product on the tensor cores of sm_90a: rows are output pixels, columns output
// channels, and each step in depth is one tap and BK input channels. One thread has the tensor memory accelerator bring in
// tiles, of `in` in its im2col mode, which knows the padding, and of the packed weights ([k][tap][c], c padded with zeros
// to a multiple of BK); two warpgroups multiply, each 64 rows. `full` says that a stage has come, `empty` that both
// warpgroups have done with it.
//
// Compiled for a dtype of 16 bits (FC_DTYPE), a tile of 128 x BN (BM: 128) in STAGES stages, BLOCKS of which share a
// multiprocessor, the spatial axes of the map (AXES: 2 or 3), and whether
// neighbouring pixels of `out` lie closer together than neighbouring channels: OUT_PIXELS_FAST.
#include "prim.cuh"
#include "lattice.cuh"
#include "results.cuh"

#define NT 288 // two warpgroups that multiply, and a warp that copies
#define BK 64 // elements, 128 bytes: a row of a tile
#define CONSUMERS 8 // warps
// Results go through shared memory, by channels or by pixels; those that a warp stores at once lie in different banks.
#define LDO (OUT_PIXELS_FAST ? BM + 4 : BN + 8)

typedef unsigned long long barrier_t;

// What wgmma reads: rows of 128 bytes from an address on, eight of which make a block of the 128B swizzle.
__device__ __forceinline__ unsigned long long descriptor_of(const void *tile) {
  const unsigned long long rows_of_8 = 8 * 128 >> 4, swizzle_128 = 1;
  return (fc::shared_address(tile) & 0x3ffff) >> 4 | 1ull << 16 | rows_of_8 << 32 | swizzle_128 << 62;
}
__device__ __forceinline__ void multiply(float (&d)[BN / 2], unsigned long long a, unsigned long long b) {
#if FC_DTYPE == FC_FLOAT16
  fc::wgmma_half(d, a, b);
#else
  fc::wgmma_bfloat16(d, a, b);
#endif
}

extern "C" __global__ void __launch_bounds__(NT, BLOCKS)
    conv_wgmma(const __grid_constant__ fc::TensorMap in, const __grid_constant__ fc::TensorMap w,
               const element *__restrict__ bias, const element *__restrict__ add, element *__restrict__ out,
               const Lattice l, const int blocks, const int relu) {
  FC_SMEM(memory);
  // Blocks of the swizzle start with multiples of 1024 bytes.
  unsigned char *tiles = memory + (1024 - fc::shared_address(memory) % 1024) % 1024;
  element *as = reinterpret_cast<element *>(tiles);                      // [STAGES][BM][BK]
  element *bs = as + STAGES * BM * BK;                                   // [STAGES][BN][BK]
  barrier_t *full = reinterpret_cast<barrier_t *>(bs + STAGES * BN * BK); // [STAGES]
  barrier_t *empty = full + STAGES;                                      // [STAGES]
  Target *targets = reinterpret_cast<Target *>(empty + STAGES);          // [BM]
  const int tid = threadIdx.x, lane = tid % 32;
  const int64 m0 = (int64)blockIdx.x * BM;
  const int n0 = blockIdx.y * BN;
  const int64 pixels = (int64)l.batch * l.out_size[0] * l.out_size[1] * l.out_size[2];
  const int steps = blocks * l.taps[0] * l.taps[1] * l.taps[2];

  if (tid == 0) {
    for (int s = 0; s < STAGES; s++) {
      fc::mbarrier_init(&full[s], 1);
      fc::mbarrier_init(&empty[s], CONSUMERS);
    }
    fc::mbarrier_fence();
  }
  __syncthreads();
  float sums[BN / 2] = {};
  const int row = tid / 32 % 4 * 16 + lane / 4, consumer = tid / 128;
  if (tid == CONSUMERS * 32) {
    const Digits p = to_digits(m0, l.out_size[2], l.out_size[1], l.out_size[0]);
    const int x = p.v[0] * l.step[2] + l.tap_at[2], y = p.v[1] * l.step[1] + l.tap_at[1];
    Digits t = {{0, 0, 0, 0}}; // block of channels, tap width, height, depth
    for (int k = 0; k < steps; k++) {
      const int stage = k % STAGES;
      fc::mbarrier_wait(&empty[stage], (k / STAGES & 1) ^ 1);
      fc::mbarrier_expect(&full[stage], (BM + BN) * BK * 2);
#if AXES == 2
      fc::tma_image(as + stage * BM * BK, in, &full[stage], t.v[0] * BK, x, y, p.v[3], t.v[1] * l.tap_step[2],
                    t.v[2] * l.tap_step[1]);
#else
      fc::tma_volume(as + stage * BM * BK, in, &full[stage], t.v[0] * BK, x, y, p.v[2] * l.step[0] + l.tap_at[0], p.v[3],
                     t.v[1] * l.tap_step[2], t.v[2] * l.tap_step[1], t.v[3] * l.tap_step[0]);
#endif
      fc::tma_matrix(bs + stage * BN * BK, w, &full[stage], k * BK, n0);
      if (++t.v[0] == blocks) {
        t.v[0] = 0;
        if (++t.v[1] == l.taps[2]) {
          t.v[1] = 0;
          if (++t.v[2] == l.taps[1]) t.v[2] = 0, t.v[3]++;
        }
      }
    }
  } else if (tid < CONSUMERS * 32) {
    find_targets<CONSUMERS * 32, BM>(l, m0, targets);
    for (int k = 0; k < steps; k++) {
      const int stage = k % STAGES;
      fc::mbarrier_wait(&full[stage], k / STAGES & 1);
      const unsigned long long a = descriptor_of(as + (stage * BM + consumer * 64) * BK);
      const unsigned long long b = descriptor_of(bs + stage * BN * BK);
      fc::wgmma_fence();
#pragma unroll
      for (int c = 0; c < BK / 16; c++) multiply(sums, a + c * (16 * 2 >> 4), b + c * (16 * 2 >> 4));
      fc::wgmma_commit();
      fc::wgmma_wait<1>();
      if (k > 0 && lane == 0) fc::mbarrier_arrive(&empty[(k - 1) % STAGES]);
    }
    fc::wgmma_wait<0>();
  }
  __syncthreads();
  float *results = reinterpret_cast<float *>(tiles); // [BN][LDO] or [BM][LDO]
  if (tid < CONSUMERS * 32) {
#pragma unroll
    for (int i = 0; i < BN / 2; i += 2) {
      const int m = consumer * 64 + row + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2;
#if OUT_PIXELS_FAST
      results[n * LDO + m] = sums[i], results[(n + 1) * LDO + m] = sums[i + 1];
#else
      *reinterpret_cast<float2 *>(&results[m * LDO + n]) = {sums[i], sums[i + 1]};
#endif
    }
  }
  __syncthreads();
  if (tid >= CONSUMERS * 32) return;
#if OUT_PIXELS_FAST
  write_pixels<CONSUMERS * 32, BM, BN, LDO>(l, results, targets, pixels, m0, n0, 0, bias, add, out, relu);
#else
  write_channels<CONSUMERS * 32, BM, BN, LDO>(l, results, targets, pixels, m0, n0, 0, bias, add, out, relu);
#endif
}
FC_EXPORT(conv_wgmma)
