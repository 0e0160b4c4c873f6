// A lattice of few channels per group (depthwise and its like), one thread for each output: values of `in` are used
// too few times for a tile to pay. Neighbouring threads write neighbouring elements: channels if CHANNELS_FAST, else pixels.
#include "prim.cuh"
#include "lattice.cuh"

extern "C" __global__ void __launch_bounds__(256, 3)
    conv_direct(const element *__restrict__ in, const element *__restrict__ w, const element *__restrict__ bias,
                const element *__restrict__ add, element *__restrict__ out, const Lattice l, const int relu) {
  const int64 pixels = (int64)l.batch * l.out_size[0] * l.out_size[1] * l.out_size[2];
  const int64 channels = (int64)l.groups * l.out_channels;
  const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= pixels * channels) return;
  int64 channel;
  Digits p;
  if (CHANNELS_FAST) {
    channel = i % channels;
    p = to_digits(i / channels, l.out_size[2], l.out_size[1], l.out_size[0]);
  } else {
    p = to_digits(i, l.out_size[2], l.out_size[1], l.out_size[0]);
    channel = p.v[3] % channels;
    p.v[3] /= (int)channels;
  }
  const int64 group = channel / l.out_channels;
  in += group * l.in_channels * l.in_strides[1];
  w += group * l.w_strides[0] + channel % l.out_channels * l.w_strides[1];
  const Place start = pixel_in(l, p);
  real sum = real(0);
  Digits t;
  for (t.v[3] = 0; t.v[3] < l.taps[0]; t.v[3]++)
    for (t.v[2] = 0; t.v[2] < l.taps[1]; t.v[2]++)
      for (t.v[1] = 0; t.v[1] < l.taps[2]; t.v[1]++) {
        t.v[0] = 0;
        const Place tap = tap_in(l, t);
        const bool valid = inside(l, start, tap);
        const element *x = in + start.offset + tap.offset, *f = w + tap_w(l, t);
#pragma unroll 2 // with 4, sums of 16 bits spill on sm_100
        for (int c = 0; c < l.in_channels; c++)
          sum += (valid ? to_real(__ldg(&x[c * l.in_strides[1]])) : real(0)) * to_real(__ldg(&f[c * l.w_strides[2]]));
      }
  out[l.out_offset + pixel_out(l.out_strides, p) + channel * l.out_strides[1]] =
      finished(l, sum, bias, add, l.add_offset + pixel_out(l.add_strides, p), channel, relu);
}
FC_EXPORT(conv_direct)
