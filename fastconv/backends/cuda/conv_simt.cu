// A lattice as an implicit matrix product: rows are output pixels, columns output channels, and the depth runs over
// taps and, fastest, input channels. Exact arithmetic of the dtype (16-bit types: of float32), any strides.
//
// Compiled for a dtype (FC_DTYPE), a tile of BM x BN x BK, TM x TN values of it per thread, and which of the two axes of
// a tile lies closer together in memory: PIXELS_FAST for `in`, OUT_FAST for w.
#include "prim.cuh"
#include "lattice.cuh"
#include "simt.cuh"
#include "results.cuh"

#define NA (BM * BK / NT) // values that a thread loads of each tile
#define NB ((BN * BK + NT - 1) / NT)

struct Column { // one step in depth
  Place in;
  int64 w;
};
struct __attribute__((aligned(16 / sizeof(real) * sizeof(element)))) Results {
  element v[16 / sizeof(real)];
};

extern "C" __global__ void __launch_bounds__(NT, 2)
    conv_simt(const element *__restrict__ in, const element *__restrict__ w, const element *__restrict__ bias,
              const element *__restrict__ add, element *__restrict__ out, const Lattice l, const Digits advance,
              const int relu) {
  FC_SMEM(memory);
  real *as = reinterpret_cast<real *>(memory); // [2][BK][LDA]
  real *bs = as + 2 * BK * LDA;                // [2][BK][LDB]
  Place *rows = reinterpret_cast<Place *>(bs + 2 * BK * LDB);
  Column *columns = reinterpret_cast<Column *>(rows + BM); // [2][BK]
  const int tid = threadIdx.x, group = blockIdx.z, n0 = blockIdx.y * BN;
  const int64 m0 = (int64)blockIdx.x * BM;
  const int64 pixels = (int64)l.batch * l.out_size[0] * l.out_size[1] * l.out_size[2];
  const int64 depth = (int64)l.in_channels * l.taps[0] * l.taps[1] * l.taps[2];
  in += (int64)group * l.in_channels * l.in_strides[1];
  w += group * l.w_strides[0];

  for (int i = tid; i < BM; i += NT) {
    if (m0 + i < pixels)
      rows[i] = pixel_in(l, to_digits(m0 + i, l.out_size[2], l.out_size[1], l.out_size[0]));
    else
      set_outside(rows[i]);
  }
  Digits place = to_digits(tid, l.in_channels, l.taps[2], l.taps[1]);
  auto next_columns = [&](int buffer) {
    if (tid < BK) {
      Column &c = columns[buffer * BK + tid];
      if (place.v[3] < l.taps[0]) {
        c.in = tap_in(l, place);
        c.w = tap_w(l, place);
      } else {
        set_outside(c.in);
      }
      add_digits(place, advance, l.in_channels, l.taps[2], l.taps[1]);
    }
  };
  real a_next[NA], b_next[NB];
  auto load = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < NA; i++) {
      const int e = tid + i * NT, m = PIXELS_FAST ? e % BM : e / BK, k = PIXELS_FAST ? e / BM : e % BK;
      const Place &row = rows[m], &column = columns[buffer * BK + k].in;
      a_next[i] = inside(l, row, column) ? to_real(__ldg(&in[row.offset + column.offset])) : real(0);
    }
#pragma unroll
    for (int i = 0; i < NB; i++) {
      const int e = tid + i * NT, n = n0 + (OUT_FAST ? e % BN : e / BK), k = OUT_FAST ? e / BN : e % BK;
      b_next[i] = real(0);
      if ((BN * BK % NT == 0 || e < BN * BK) && n < l.out_channels) {
        const Column &column = columns[buffer * BK + k];
        if (column.in.at[0] != FC_OUTSIDE) b_next[i] = to_real(__ldg(&w[n * l.w_strides[1] + column.w]));
      }
    }
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < NA; i++) {
      const int e = tid + i * NT, m = PIXELS_FAST ? e % BM : e / BK, k = PIXELS_FAST ? e / BM : e % BK;
      as[(buffer * BK + k) * LDA + m] = a_next[i];
    }
#pragma unroll
    for (int i = 0; i < NB; i++) {
      const int e = tid + i * NT, n = OUT_FAST ? e % BN : e / BK, k = OUT_FAST ? e / BN : e % BK;
      if (BN * BK % NT == 0 || e < BN * BK) bs[(buffer * BK + k) * LDB + n] = b_next[i];
    }
  };

  const int tx = tid % (BN / TN), ty = tid / (BN / TN);
  real sums[TM][TN];
#pragma unroll
  for (int i = 0; i < TM; i++)
#pragma unroll
    for (int j = 0; j < TN; j++) sums[i][j] = real(0);
  next_columns(0);
  __syncthreads();
  load(0);
  next_columns(1);
  store(0);
  __syncthreads();
  for (int64 k0 = 0; k0 < depth; k0 += BK) {
    const int buffer = (int)(k0 / BK) & 1;
    const bool more = k0 + BK < depth;
    if (more) {
      load(buffer ^ 1);
      next_columns(buffer);
    }
    multiply(sums, as + buffer * BK * LDA, bs + buffer * BK * LDB, tx, ty);
    if (more) store(buffer ^ 1);
    __syncthreads();
  }

  const bool whole = whole_runs<FC_PACK>(l, nullptr, out);
#pragma unroll
  for (int i = 0; i < TM; i++) {
    const int64 m = m0 + in_tile(i, ty, BM / TM);
    if (m >= pixels) continue;
    const Digits p = to_digits(m, l.out_size[2], l.out_size[1], l.out_size[0]);
    const int64 to = l.out_offset + pixel_out(l.out_strides, p), from = l.add_offset + pixel_out(l.add_strides, p);
#pragma unroll
    for (int j = 0; j < TN; j += FC_PACK) {
      const int left = l.out_channels - n0 - in_tile(j, tx, BN / TN);
      const int64 channel = (int64)(group + 1) * l.out_channels - left;
      Results results;
#pragma unroll
      for (int k = 0; k < FC_PACK; k++)
        if (k < left) results.v[k] = finished(l, sums[i][j + k], bias, add, from, channel + k, relu);
      if (whole && left > 0) {
        *reinterpret_cast<Results *>(&out[to + channel]) = results;
      } else {
#pragma unroll
        for (int k = 0; k < FC_PACK; k++)
          if (k < left) out[to + (channel + k) * l.out_strides[1]] = results.v[k];
      }
    }
  }
}
FC_EXPORT(conv_simt)
