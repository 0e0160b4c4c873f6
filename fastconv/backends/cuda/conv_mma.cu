// A lattice as an implicit matrix product on tensor cores (mma.sync, sm_80 on), sums in float32. Rows are output pixels,
// columns output channels; the depth runs over taps and, fastest, runs of input channels of 16 bytes, four of them in
// each step, which copies of cp.async bring in STAGES steps ahead. `in` has its channels side by side, in whole runs (the
// last one may be padded with zeros); w comes packed as [group, k][tap][c], padded alike (pack_weights.cu).
//
// Compiled for a dtype (FC_DTYPE; float32 is computed in TF32), a tile of BM x BN, by 8 warps of 64 x BN / 4, in STAGES
// stages, BLOCKS of which share a multiprocessor, and whether neighbouring pixels of `out` lie closer together than
// neighbouring channels: OUT_PIXELS_FAST.
#include "prim.cuh"
#include "lattice.cuh"
#include "mma.cuh"
#include "results.cuh"

#define NT 256
#define BK (4 * RUN)
#define LD (BK + RUN) // of a row in shared memory: rows start in different banks
#define MI 4          // fragments of a warp: 4 x 16 rows, NI x 8 columns
#define NI (BN / 4 / 8)
#define A_COPIES (BM * 4 / NT)
#define B_COPIES (BN * 4 / NT)
// Results go through shared memory, by channels or by pixels; those that a warp stores at once lie in different banks.
#define LDO (OUT_PIXELS_FAST ? BM + 4 : BN + 8)

extern "C" __global__ void __launch_bounds__(NT, BLOCKS)
    conv_mma(const element *__restrict__ in, const element *__restrict__ w, const element *__restrict__ bias,
             const element *__restrict__ add, element *__restrict__ out, const Lattice l, const Digits advance,
             const int steps, const int relu) {
  FC_SMEM(memory);
  element *as = reinterpret_cast<element *>(memory); // [STAGES][BM][LD]
  element *bs = as + STAGES * BM * LD;               // [STAGES][BN][LD]
  Target *targets = reinterpret_cast<Target *>(bs + STAGES * BN * LD); // [BM]
  const int tid = threadIdx.x, lane = tid % 32, warp_m = tid / 32 % 2, warp_n = tid / 64, group = blockIdx.z;
  const int64 m0 = (int64)blockIdx.x * BM;
  const int n0 = blockIdx.y * BN, chunk = tid % 4 * RUN;
  const int64 pixels = (int64)l.batch * l.out_size[0] * l.out_size[1] * l.out_size[2];
  const int runs = l.in_channels / RUN; // of a tap
  const int64 depth = (int64)l.taps[0] * l.taps[1] * l.taps[2] * l.in_channels;
  in += (int64)group * l.in_channels;
  w += group * l.out_channels * depth;

  Place rows[A_COPIES];
#pragma unroll
  for (int i = 0; i < A_COPIES; i++) {
    const int64 m = m0 + tid / 4 + i * (NT / 4);
    if (m < pixels)
      rows[i] = pixel_in(l, to_digits(m, l.out_size[2], l.out_size[1], l.out_size[0]));
    else
      set_outside(rows[i]);
  }
  Digits place = to_small_digits(tid % 4, runs, l.taps[2], l.taps[1]); // of this thread's run: run, taps
  int64 run = chunk;                                                   // and in a row of w
  auto load = [&](int stage) {
    const Digits t = {{place.v[0] * RUN, place.v[1], place.v[2], place.v[3]}};
    const Place at = tap_in(l, t);
    const bool deep = run < depth;
#pragma unroll
    for (int i = 0; i < A_COPIES; i++) {
      const bool valid = deep && inside(l, rows[i], at);
      fc::cp_async16(&as[(stage * BM + tid / 4 + i * (NT / 4)) * LD + chunk],
                     valid ? &in[rows[i].offset + at.offset] : in, valid);
    }
#pragma unroll
    for (int i = 0; i < B_COPIES; i++) {
      const int n = tid / 4 + i * (NT / 4);
      const bool valid = deep && n0 + n < l.out_channels;
      fc::cp_async16(&bs[(stage * BN + n) * LD + chunk], valid ? &w[(n0 + n) * depth + run] : w, valid);
    }
    add_digits(place, advance, runs, l.taps[2], l.taps[1]);
    run += BK;
  };

  float sums[MI][NI][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load(s);
    fc::cp_commit();
  }
  find_targets<NT, BM>(l, m0, targets);
  for (int k = 0; k < steps; k++) {
    fc::cp_wait<STAGES - 2>();
    __syncthreads();
    if (k + STAGES - 1 < steps) load((k + STAGES - 1) % STAGES);
    fc::cp_commit();
    const element *a = as + (k % STAGES * BM + warp_m * (BM / 2)) * LD, *b = bs + (k % STAGES * BN + warp_n * (BN / 4)) * LD;
#pragma unroll
    for (int c = 0; c < BK; c += MMA_DEPTH) {
      unsigned fa[MI][4], fb[NI][2];
#if FC_DTYPE == FC_FLOAT32
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int i = 0; i < MI; i++) {
        const element *q = a + (i * 16 + g) * LD + c + t;
        fa[i][0] = fc::float_to_tf32(q[0]), fa[i][1] = fc::float_to_tf32(q[8 * LD]);
        fa[i][2] = fc::float_to_tf32(q[4]), fa[i][3] = fc::float_to_tf32(q[8 * LD + 4]);
      }
#pragma unroll
      for (int j = 0; j < NI; j++) {
        const element *q = b + (j * 8 + g) * LD + c + t;
        fb[j][0] = fc::float_to_tf32(q[0]), fb[j][1] = fc::float_to_tf32(q[4]);
      }
#else
#pragma unroll
      for (int i = 0; i < MI; i++) fc::ldmatrix_x4(fa[i], a + (i * 16 + lane % 16) * LD + c + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < NI; j += 2) {
        unsigned r[4];
        fc::ldmatrix_x4(r, b + (j * 8 + lane / 16 * 8 + lane % 8) * LD + c + lane / 8 % 2 * 8);
        fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
      }
#endif
      multiply(sums, fa, fb);
    }
  }
  float *results = reinterpret_cast<float *>(memory); // [BN][LDO] or [BM][LDO]
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MI; i++)
#pragma unroll
    for (int j = 0; j < NI; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int m = warp_m * (BM / 2) + i * 16 + lane / 4 + h * 8, n = warp_n * (BN / 4) + j * 8 + lane % 4 * 2;
        const float2 pair = {sums[i][j][h * 2], sums[i][j][h * 2 + 1]};
#if OUT_PIXELS_FAST
        results[n * LDO + m] = pair.x, results[(n + 1) * LDO + m] = pair.y;
#else
        *reinterpret_cast<float2 *>(&results[m * LDO + n]) = pair;
#endif
      }
  __syncthreads();
#if OUT_PIXELS_FAST
  write_pixels<NT, BM, BN, LDO>(l, results, targets, pixels, m0, n0, group, bias, add, out, relu);
#else
  write_channels<NT, BM, BN, LDO>(l, results, targets, pixels, m0, n0, group, bias, add, out, relu);
#endif
}
FC_EXPORT(conv_mma)
