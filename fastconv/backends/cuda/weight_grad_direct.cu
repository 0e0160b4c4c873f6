// The weight gradient of a lattice of few channels per group. A thread sums TAPS taps of one pair (output channel, input
// channel of its group) over some pixels of a split; threads of the same pair add their sums in shared memory, in a
// fixed order. LANES neighbouring threads work on neighbouring pairs (memory with channels last), the others on pixels.
#include "prim.cuh"
#include "lattice.cuh"

#define NT 256
#define PIXELS (NT / LANES) // threads of one pair

extern "C" __global__ void __launch_bounds__(NT, 2)
    weight_grad_direct(const element *__restrict__ in, const element *__restrict__ dy, real *__restrict__ sums_out,
                       const Lattice l, const Digits advance, const int64 chunk) {
  FC_SMEM(memory);
  real *shared = reinterpret_cast<real *>(memory); // [PIXELS][LANES]
  const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES, tap0 = blockIdx.y * TAPS, split = blockIdx.z;
  const int64 pixels = (int64)l.batch * l.out_size[0] * l.out_size[1] * l.out_size[2];
  const int taps = l.taps[0] * l.taps[1] * l.taps[2];
  const int pairs = l.groups * l.out_channels * l.in_channels, pair = blockIdx.x * LANES + lane;
  const int channel = pair / l.in_channels, c = pair % l.in_channels; // of dy, and of the group of in
  const int64 start = split * chunk, end = min(start + chunk, pixels);

  Place places[TAPS];
#pragma unroll
  for (int t = 0; t < TAPS; t++) {
    if (tap0 + t < taps) {
      Digits d = to_small_digits(tap0 + t, l.taps[2], l.taps[1], l.taps[0]);
      Digits at = {{c, d.v[0], d.v[1], d.v[2]}};
      places[t] = tap_in(l, at);
    } else {
      set_outside(places[t]);
    }
  }
  real sums[TAPS];
#pragma unroll
  for (int t = 0; t < TAPS; t++) sums[t] = real(0);
  if (pair < pairs) {
    in += (int64)(channel / l.out_channels) * l.in_channels * l.in_strides[1];
    dy += l.out_offset + (int64)channel * l.out_strides[1];
    Digits p = to_digits(start + first, l.out_size[2], l.out_size[1], l.out_size[0]);
    for (int64 i = start + first; i < end; i += PIXELS) {
      const Place place = pixel_in(l, p);
      const real d = to_real(__ldg(&dy[pixel_out(l.out_strides, p)]));
#pragma unroll
      for (int t = 0; t < TAPS; t++)
        sums[t] += d * (inside(l, place, places[t]) ? to_real(__ldg(&in[place.offset + places[t].offset])) : real(0));
      add_digits(p, advance, l.out_size[2], l.out_size[1], l.out_size[0]);
    }
  }
#pragma unroll
  for (int t = 0; t < TAPS; t++) {
    shared[first * LANES + lane] = sums[t];
    __syncthreads();
    for (int half = PIXELS / 2; half > 0; half /= 2) {
      if (first < half) shared[first * LANES + lane] += shared[(first + half) * LANES + lane];
      __syncthreads();
    }
    if (first == 0 && pair < pairs && tap0 + t < taps)
      sums_out[((int64)split * pairs / l.in_channels * taps + (int64)channel * taps + tap0 + t) * l.in_channels + c] = shared[lane];
    __syncthreads();
  }
}
FC_EXPORT(weight_grad_direct)
