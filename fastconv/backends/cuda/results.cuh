// How a block of threads writes a tile of results, whose sums lie in shared memory: ROWS of all pixels by COLUMNS channels of
// a group.

// Where a pixel starts in the arrays of the result's shape.
struct Target {
  int64 out, add;
};
// Those of the tile's pixels from m0 on. Divisions take long, so call it where copies are waited for anyway.
template <int THREADS, int ROWS> __device__ __forceinline__ void find_targets(const Lattice &l, int64 m0, Target *targets) {
  for (int row = threadIdx.x; row < ROWS; row += THREADS) {
    const Digits p = to_digits(m0 + row, l.out_size[2], l.out_size[1], l.out_size[0]);
    targets[row].out = l.out_offset + pixel_out(l.out_strides, p);
    targets[row].add = l.add_offset + pixel_out(l.add_strides, p);
  }
}
// Whether N channels of a pixel can be accessed at once in `out` and in `add`, if the first is a multiple of N.
template <int N> __device__ __forceinline__ bool whole_runs(const Lattice &l, const element *add, const element *out) {
  const int64 *o = l.out_strides, *a = l.add_strides;
  const int bytes = N * (int)sizeof(element);
  return l.out_channels % N == 0 && o[1] == 1 && ((o[0] | o[2] | o[3] | o[4] | l.out_offset) & (N - 1)) == 0 &&
         reinterpret_cast<uintptr_t>(out) % bytes == 0 &&
         (!add || (a[1] == 1 && ((a[0] | a[2] | a[3] | a[4] | l.add_offset) & (N - 1)) == 0 &&
                   reinterpret_cast<uintptr_t>(add) % bytes == 0));
}

// Where pixels lie side by side: sums are [COLUMNS][LD], and a warp writes neighbouring pixels of one channel.
template <int THREADS, int ROWS, int COLUMNS, int LD>
__device__ __forceinline__ void write_pixels(const Lattice &l, const float *sums, const Target *targets, int64 pixels,
                                             int64 m0, int n0, int group, const element *bias, const element *add,
                                             element *out, int relu) {
  const int row = threadIdx.x % ROWS;
  if (m0 + row >= pixels) return;
  const Target to = targets[row];
#pragma unroll 4
  for (int n = threadIdx.x / ROWS; n < COLUMNS && n0 + n < l.out_channels; n += THREADS / ROWS) {
    const int64 channel = (int64)group * l.out_channels + n0 + n;
    out[to.out + channel * l.out_strides[1]] = finished(l, sums[n * LD + row], bias, add, to.add, channel, relu);
  }
}
// Where channels do: sums are [ROWS][LD], and a thread writes a run of channels of one pixel, at once if the arrays allow.
template <int THREADS, int ROWS, int COLUMNS, int LD>
__device__ __forceinline__ void write_channels(const Lattice &l, const float *sums, const Target *targets, int64 pixels,
                                               int64 m0, int n0, int group, const element *bias, const element *add,
                                               element *out, int relu) {
  const int column = threadIdx.x % (COLUMNS / RUN) * RUN, left = l.out_channels - n0 - column;
  if (left <= 0) return;
  const int64 channel = (int64)group * l.out_channels + n0 + column;
  const bool whole = whole_runs<RUN>(l, add, out);
  // Which half of a run to read first: by turns, so that eight threads read from different banks.
  const int first = RUN == 8 ? threadIdx.x / 4 % 2 * 4 : 0;
  real shift[RUN];
#pragma unroll
  for (int k = 0; k < RUN; k++) shift[k] = bias && k < left ? to_real(bias[channel + k]) : real(0);
#pragma unroll 2
  for (int row = threadIdx.x / (COLUMNS / RUN); row < ROWS && m0 + row < pixels; row += THREADS / (COLUMNS / RUN)) {
    const Target to = targets[row];
    float4 q[RUN / 4];
    real v[RUN];
#pragma unroll
    for (int k = 0; k < RUN; k += 4) q[k / 4] = *reinterpret_cast<const float4 *>(&sums[row * LD + column + (k ^ first)]);
    if (first) {
      const float4 other = q[0];
      q[0] = q[RUN / 4 - 1], q[RUN / 4 - 1] = other;
    }
#pragma unroll
    for (int k = 0; k < RUN; k += 4) {
      const float4 &s = q[k / 4];
      v[k] = s.x + shift[k], v[k + 1] = s.y + shift[k + 1], v[k + 2] = s.z + shift[k + 2], v[k + 3] = s.w + shift[k + 3];
    }
    if (whole) {
      Run run;
      if (add) {
        run = *reinterpret_cast<const Run *>(&add[to.add + channel]);
#pragma unroll
        for (int k = 0; k < RUN; k++) v[k] += to_real(run.v[k]);
      }
#pragma unroll
      for (int k = 0; k < RUN; k++) run.v[k] = rectified(v[k], relu);
      *reinterpret_cast<Run *>(&out[to.out + channel]) = run;
    } else {
#pragma unroll
      for (int k = 0; k < RUN; k++)
        if (k < left)
          out[to.out + (channel + k) * l.out_strides[1]] = finished(l, v[k], nullptr, add, to.add, channel + k, relu);
    }
  }
}
