// The weight gradient of weight_grad_simt.cu on tensor cores: rows are output channels, columns taps and, fastest, input
// channels, and the depth runs over output pixels, BK in each step, which copies of cp.async bring in STAGES steps
// ahead. `in` and dy have their channels side by side, in runs of 16 bytes, so that in shared memory the depth is the
// outer axis of both operands: fragments are read transposed. The channels of the lattice may be more than there are,
// as padding; sums are written of the first in_kept and out_kept of a group.
//
// Compiled for a dtype (FC_DTYPE; float32 is computed in TF32) and a tile of BM x BN, by 8 warps of BM / 2 x BN / 4.
#include "prim.cuh"
#include "lattice.cuh"
#include "mma.cuh"

#define NT 256
#define STAGES 4
#define BK (4 * RUN)
#define LDA (BM + 8) // of a pixel in shared memory: pixels start in different banks
#define LDB (BN + 8)
#define MI (BM / 2 / 16) // fragments of a warp: MI x 16 rows, NI x 8 columns
#define NI (BN / 4 / 8)
#define A_STEP (NT / (BM / RUN)) // pixels that one round of copies brings
#define B_STEP (NT / (BN / RUN))

struct Pixel { // one step in depth
  Place in;
  int64 dy;
};

extern "C" __global__ void __launch_bounds__(NT, 2)
    weight_grad_mma(const element *__restrict__ in, const element *__restrict__ dy, float *__restrict__ sums_out,
                    const Lattice l, const Digits advance, const int splits, const int64 chunk, const int in_kept,
                    const int out_kept) {
  FC_SMEM(memory);
  element *as = reinterpret_cast<element *>(memory);                    // [STAGES][BK][LDA]
  element *bs = as + STAGES * BK * LDA;                                 // [STAGES][BK][LDB]
  Pixel *pixels = reinterpret_cast<Pixel *>(bs + STAGES * BK * LDB); // [2][BK], one step ahead of the copies
  const int tid = threadIdx.x, lane = tid % 32, warp_m = tid / 32 % 2, warp_n = tid / 64;
  const int group = blockIdx.z / splits, split = blockIdx.z % splits, m0 = blockIdx.y * BM;
  const int64 n0 = (int64)blockIdx.x * BN;
  const int taps = l.taps[0] * l.taps[1] * l.taps[2];
  const int64 width = (int64)l.in_channels * taps;
  const int64 start = split * chunk, end = min(start + chunk, (int64)l.batch * l.out_size[0] * l.out_size[1] * l.out_size[2]);
  const int steps = (int)((end - start + BK - 1) / BK);
  in += (int64)group * l.in_channels * l.in_strides[1];
  dy += (int64)group * l.out_channels * l.out_strides[1];

  const int a_run = tid % (BM / RUN) * RUN, b_run = tid % (BN / RUN) * RUN; // what a thread copies of each pixel
  const bool a_valid = m0 + a_run < l.out_channels;
  Place column;
  if (n0 + b_run < width)
    column = tap_in(l, to_digits(n0 + b_run, l.in_channels, l.taps[2], l.taps[1]));
  else
    set_outside(column);
  int64 at = start + tid; // of this thread's pixel
  Digits place = to_digits(at, l.out_size[2], l.out_size[1], l.out_size[0]);
  auto next_pixels = [&](int buffer) {
    if (tid < BK) {
      Pixel &p = pixels[buffer * BK + tid];
      if (at < end) {
        p.in = pixel_in(l, place);
        p.dy = l.out_offset + pixel_out(l.out_strides, place);
      } else {
        set_outside(p.in);
        p.dy = 0;
      }
      add_digits(place, advance, l.out_size[2], l.out_size[1], l.out_size[0]);
      at += BK;
    }
  };
  auto load = [&](int step) {
    const Pixel *p = pixels + step % 2 * BK;
#pragma unroll
    for (int i = 0; i < BK / A_STEP; i++) {
      const int k = tid / (BM / RUN) + i * A_STEP;
      const bool valid = a_valid && p[k].in.at[0] != FC_OUTSIDE;
      fc::cp_async16(&as[(step % STAGES * BK + k) * LDA + a_run], valid ? &dy[p[k].dy + m0 + a_run] : dy, valid);
    }
#pragma unroll
    for (int i = 0; i < BK / B_STEP; i++) {
      const int k = tid / (BN / RUN) + i * B_STEP;
      const bool valid = inside(l, column, p[k].in);
      fc::cp_async16(&bs[(step % STAGES * BK + k) * LDB + b_run], valid ? &in[column.offset + p[k].in.offset] : in, valid);
    }
  };

  float sums[MI][NI][4] = {};
  next_pixels(0);
  __syncthreads();
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load(s);
    fc::cp_commit();
    next_pixels((s + 1) % 2);
    __syncthreads();
  }
  for (int k = 0; k < steps; k++) {
    fc::cp_wait<STAGES - 2>();
    __syncthreads();
    if (k + STAGES - 1 < steps) load(k + STAGES - 1);
    fc::cp_commit();
    next_pixels((k + STAGES) % 2);
    const element *a = as + k % STAGES * BK * LDA + warp_m * (BM / 2), *b = bs + k % STAGES * BK * LDB + warp_n * (BN / 4);
#pragma unroll
    for (int c = 0; c < BK; c += MMA_DEPTH) {
      unsigned fa[MI][4], fb[NI][2];
#if FC_DTYPE == FC_FLOAT32
      const int g = lane / 4, t = lane % 4;
#pragma unroll
      for (int i = 0; i < MI; i++) {
        const element *q = a + (c + t) * LDA + i * 16 + g;
        fa[i][0] = fc::float_to_tf32(q[0]), fa[i][1] = fc::float_to_tf32(q[8]);
        fa[i][2] = fc::float_to_tf32(q[4 * LDA]), fa[i][3] = fc::float_to_tf32(q[4 * LDA + 8]);
      }
#pragma unroll
      for (int j = 0; j < NI; j++) {
        const element *q = b + (c + t) * LDB + j * 8 + g;
        fb[j][0] = fc::float_to_tf32(q[0]), fb[j][1] = fc::float_to_tf32(q[4 * LDB]);
      }
#else
#pragma unroll
      for (int i = 0; i < MI; i++)
        fc::ldmatrix_x4_trans(fa[i], a + (c + lane / 16 * 8 + lane % 8) * LDA + i * 16 + lane / 8 % 2 * 8);
#pragma unroll
      for (int j = 0; j < NI; j += 2) {
        unsigned r[4];
        fc::ldmatrix_x4_trans(r, b + (c + lane % 16) * LDB + j * 8 + lane / 16 * 8);
        fb[j][0] = r[0], fb[j][1] = r[1], fb[j + 1][0] = r[2], fb[j + 1][1] = r[3];
      }
#endif
      multiply(sums, fa, fb);
    }
  }
  float *to = sums_out + ((int64)split * l.groups + group) * out_kept * taps * in_kept;
#pragma unroll
  for (int j = 0; j < NI; j++) {
    const int64 n = n0 + warp_n * (BN / 4) + j * 8 + lane % 4 * 2; // and its neighbour, of the same tap
    const int64 tap = n / l.in_channels;
    const int c = (int)(n % l.in_channels);
    if (tap >= taps) continue;
#pragma unroll
    for (int i = 0; i < MI; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int m = m0 + warp_m * (BM / 2) + i * 16 + lane / 4 + e / 2 * 8;
        if (m < out_kept && c + e % 2 < in_kept) to[(m * (int64)taps + tap) * in_kept + c + e % 2] = sums[i][j][e];
      }
  }
}
FC_EXPORT(weight_grad_mma)
