// The weights of a lattice, of any strides, as [group, k][tap][c] with c padded with zeros: what conv_mma.cu reads.
#include "prim.cuh"
#include "lattice.cuh"

extern "C" __global__ void __launch_bounds__(256)
    pack_weights(const element *__restrict__ w, element *__restrict__ packed, const Lattice l, const int padded) {
  const int64 width = (int64)l.taps[0] * l.taps[1] * l.taps[2] * padded, rows = (int64)l.groups * l.out_channels;
  const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * width) return;
  const int64 row = i / width;
  const Digits t = to_digits(i % width, padded, l.taps[2], l.taps[1]);
  const int64 from = row / l.out_channels * l.w_strides[0] + row % l.out_channels * l.w_strides[1] + tap_w(l, t);
  packed[i] = t.v[0] < l.in_channels ? w[from] : to_element(real(0));
}
FC_EXPORT(pack_weights)
