// Adds the sums [split][group, k, tap, c] that the kernels of weight gradients leave, in the order of the splits, and
// writes them to dw, which has any strides. One thread for each weight.
#include "prim.cuh"
#include "lattice.cuh"

extern "C" __global__ void __launch_bounds__(256)
    weight_grad_finish(const real *__restrict__ sums, element *__restrict__ dw, const Lattice l, const int splits) {
  const int64 width = (int64)l.in_channels * l.taps[0] * l.taps[1] * l.taps[2];
  const int64 each = (int64)l.groups * l.out_channels * width;
  const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= each) return;
  real total = real(0);
  for (int s = 0; s < splits; s++) total += sums[s * each + i];
  const int64 row = i / width;
  const Digits t = to_digits(i % width, l.in_channels, l.taps[2], l.taps[1]);
  dw[row / l.out_channels * l.w_strides[0] + row % l.out_channels * l.w_strides[1] + tap_w(l, t)] = to_element(total);
}
FC_EXPORT(weight_grad_finish)
