// The weight gradient of a lattice as an implicit matrix product: rows are output channels, columns taps and, fastest,
// input channels, and the depth runs over output pixels. The depth is cut into splits, each of which writes sums of its
// own, and weight_grad_finish adds them in order: the same bits at every run.
//
//     dw[k, c, t] = sum over n, o of dy[n, k, o] * in[n, c, o * step + tap_at + t * tap_step]
//
// Compiled for a dtype (FC_DTYPE), a tile of BM x BN x BK, TM x TN values of it per thread, and whether pixels lie
// closer together in memory than channels: DY_PIXELS_FAST, IN_PIXELS_FAST.
#include "prim.cuh"
#include "lattice.cuh"
#include "simt.cuh"

#define NA (BM * BK / NT)
#define NB (BN * BK / NT)

struct Pixel { // one step in depth
  Place in;
  int64 dy;
};

extern "C" __global__ void __launch_bounds__(NT, 2)
    weight_grad_simt(const element *__restrict__ in, const element *__restrict__ dy, real *__restrict__ sums_out,
                     const Lattice l, const Digits advance, const int splits, const int64 chunk) {
  FC_SMEM(memory);
  real *as = reinterpret_cast<real *>(memory); // [2][BK][LDA]
  real *bs = as + 2 * BK * LDA;                // [2][BK][LDB]
  Place *columns = reinterpret_cast<Place *>(bs + 2 * BK * LDB);
  Pixel *steps = reinterpret_cast<Pixel *>(columns + BN); // [2][BK]
  const int tid = threadIdx.x, group = blockIdx.z / splits, split = blockIdx.z % splits;
  const int m0 = blockIdx.y * BM;
  const int64 n0 = (int64)blockIdx.x * BN;
  const int64 pixels = (int64)l.batch * l.out_size[0] * l.out_size[1] * l.out_size[2];
  const int64 width = (int64)l.in_channels * l.taps[0] * l.taps[1] * l.taps[2];
  const int64 start = split * chunk, end = min(start + chunk, pixels);
  in += (int64)group * l.in_channels * l.in_strides[1];
  dy += (int64)group * l.out_channels * l.out_strides[1];

  for (int i = tid; i < BN; i += NT) {
    if (n0 + i < width)
      columns[i] = tap_in(l, to_digits(n0 + i, l.in_channels, l.taps[2], l.taps[1]));
    else
      set_outside(columns[i]);
  }
  int64 at = start + tid; // of this thread's step
  Digits place = to_digits(at, l.out_size[2], l.out_size[1], l.out_size[0]);
  auto next_steps = [&](int buffer) {
    if (tid < BK) {
      Pixel &s = steps[buffer * BK + tid];
      if (at < end) {
        s.in = pixel_in(l, place);
        s.dy = l.out_offset + pixel_out(l.out_strides, place);
      } else {
        set_outside(s.in);
      }
      add_digits(place, advance, l.out_size[2], l.out_size[1], l.out_size[0]);
      at += BK;
    }
  };
  real a_next[NA], b_next[NB];
  auto load = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < NA; i++) {
      const int e = tid + i * NT, m = m0 + (DY_PIXELS_FAST ? e / BK : e % BM), k = DY_PIXELS_FAST ? e % BK : e / BM;
      const Pixel &s = steps[buffer * BK + k];
      const bool valid = m < l.out_channels && s.in.at[0] != FC_OUTSIDE;
      a_next[i] = valid ? to_real(__ldg(&dy[s.dy + m * l.out_strides[1]])) : real(0);
    }
#pragma unroll
    for (int i = 0; i < NB; i++) {
      const int e = tid + i * NT, n = IN_PIXELS_FAST ? e / BK : e % BN, k = IN_PIXELS_FAST ? e % BK : e / BN;
      const Place &column = columns[n], &s = steps[buffer * BK + k].in;
      b_next[i] = inside(l, column, s) ? to_real(__ldg(&in[column.offset + s.offset])) : real(0);
    }
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < NA; i++) {
      const int e = tid + i * NT, m = DY_PIXELS_FAST ? e / BK : e % BM, k = DY_PIXELS_FAST ? e % BK : e / BM;
      as[(buffer * BK + k) * LDA + m] = a_next[i];
    }
#pragma unroll
    for (int i = 0; i < NB; i++) {
      const int e = tid + i * NT, n = IN_PIXELS_FAST ? e / BK : e % BN, k = IN_PIXELS_FAST ? e % BK : e / BN;
      bs[(buffer * BK + k) * LDB + n] = b_next[i];
    }
  };

  const int tx = tid % (BN / TN), ty = tid / (BN / TN);
  real sums[TM][TN];
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) sums[i][j] = real(0);
  next_steps(0);
  __syncthreads();
  load(0);
  next_steps(1);
  store(0);
  __syncthreads();
  for (int64 k0 = start; k0 < end; k0 += BK) {
    const int buffer = (int)((k0 - start) / BK) & 1;
    const bool more = k0 + BK < end;
    if (more) {
      load(buffer ^ 1);
      next_steps(buffer);
    }
    multiply(sums, as + buffer * BK * LDA, bs + buffer * BK * LDB, tx, ty);
    if (more) store(buffer ^ 1);
    __syncthreads();
  }
  real *to = sums_out + ((int64)split * l.groups + group) * l.out_channels * width;
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) {
      const int m = m0 + in_tile(i, ty, BM / TM);
      const int64 n = n0 + in_tile(j, tx, BN / TN);
      if (m < l.out_channels && n < width) to[m * width + n] = sums[i][j];
    }
}
FC_EXPORT(weight_grad_simt)
