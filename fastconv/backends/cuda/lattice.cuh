// What every pass of a convolution reduces to, see backends/lattice.py:
//
//     out[n, k, o] = sum over taps t, channels c of in[n, c, o * step + tap_at + t * tap_step] * w[k, c, t]
//
// Strides are in elements: (n, c, depth, height, width). Those of w are of the group, the output channel, the input
// channel, and the taps of each axis; channels are those of one group.
struct Lattice {
  int64 in_strides[5], out_strides[5], add_strides[5], w_strides[6];
  int64 in_offset, out_offset, w_offset, add_offset;
  int in_size[3], out_size[3], step[3], taps[3], tap_at[3], tap_step[3];
  int batch, groups, in_channels, out_channels;
};

// A position in a mixed radix, and how to add a constant to it without a division.
struct Digits {
  int v[4];
};
__device__ __forceinline__ void add_digits(Digits &a, const Digits &b, int r0, int r1, int r2) {
  a.v[0] += b.v[0];
  if (a.v[0] >= r0) a.v[0] -= r0, a.v[1]++;
  a.v[1] += b.v[1];
  if (a.v[1] >= r1) a.v[1] -= r1, a.v[2]++;
  a.v[2] += b.v[2];
  if (a.v[2] >= r2) a.v[2] -= r2, a.v[3]++;
  a.v[3] += b.v[3];
}
__device__ __forceinline__ Digits to_digits(int64 n, int r0, int r1, int r2) {
  Digits d;
  d.v[0] = (int)(n % r0), n /= r0;
  d.v[1] = (int)(n % r1), n /= r1;
  d.v[2] = (int)(n % r2), n /= r2;
  d.v[3] = (int)n;
  return d;
}
__device__ __forceinline__ Digits to_small_digits(int n, int r0, int r1, int r2) {
  Digits d;
  d.v[0] = n % r0, n /= r0;
  d.v[1] = n % r1, n /= r1;
  d.v[2] = n % r2;
  d.v[3] = n / r2;
  return d;
}

// Where something starts in an array, and its position along the spatial axes.
struct Place {
  int64 offset;
  int at[3];
};

// The first element that an output pixel reads of `in`; `p` is its position (width, height, depth, sample).
__device__ __forceinline__ Place pixel_in(const Lattice &l, const Digits &p) {
  Place r;
  r.at[0] = p.v[2] * l.step[0];
  r.at[1] = p.v[1] * l.step[1];
  r.at[2] = p.v[0] * l.step[2];
  r.offset = l.in_offset + p.v[3] * l.in_strides[0] + r.at[0] * l.in_strides[2] + r.at[1] * l.in_strides[3] +
             r.at[2] * l.in_strides[4];
  return r;
}
// Of one of the arrays of the output's shape.
__device__ __forceinline__ int64 pixel_out(const int64 (&strides)[5], const Digits &p) {
  return p.v[3] * strides[0] + p.v[2] * strides[2] + p.v[1] * strides[3] + p.v[0] * strides[4];
}
// What a tap and channel add to that; `t` is their position (channel, tap width, height, depth).
__device__ __forceinline__ Place tap_in(const Lattice &l, const Digits &t) {
  Place r;
  r.at[0] = l.tap_at[0] + t.v[3] * l.tap_step[0];
  r.at[1] = l.tap_at[1] + t.v[2] * l.tap_step[1];
  r.at[2] = l.tap_at[2] + t.v[1] * l.tap_step[2];
  r.offset = t.v[0] * l.in_strides[1] + r.at[0] * l.in_strides[2] + r.at[1] * l.in_strides[3] +
             r.at[2] * l.in_strides[4];
  return r;
}
__device__ __forceinline__ int64 tap_w(const Lattice &l, const Digits &t) {
  return l.w_offset + t.v[0] * l.w_strides[2] + t.v[3] * l.w_strides[3] + t.v[2] * l.w_strides[4] +
         t.v[1] * l.w_strides[5];
}
__device__ __forceinline__ bool inside(const Lattice &l, const Place &a, const Place &b) {
  return (unsigned)(a.at[0] + b.at[0]) < (unsigned)l.in_size[0] &&
         (unsigned)(a.at[1] + b.at[1]) < (unsigned)l.in_size[1] &&
         (unsigned)(a.at[2] + b.at[2]) < (unsigned)l.in_size[2];
}
__device__ __forceinline__ void set_outside(Place &p) {
  p.at[0] = p.at[1] = p.at[2] = FC_OUTSIDE;
  p.offset = 0;
}
__device__ __forceinline__ element rectified(real v, int relu) {
  if (relu && v < real(0)) v = real(0); // NaN stays
  return to_element(v);
}
// What becomes of a sum: bias, residual, ReLU. `from` is where the pixel starts in `add`.
__device__ __forceinline__ element finished(const Lattice &l, real v, const element *bias, const element *add, int64 from,
                                            int64 channel, int relu) {
  if (bias) v += to_real(bias[channel]);
  if (add) v += to_real(add[from + channel * l.add_strides[1]]);
  return rectified(v, relu);
}
