// Copies an array (N, C, spatial) of any strides so that tensor cores can read it: [n, d, h, w][group][c], with c padded
// with zeros to a multiple of RUN. A block moves a tile of PIXELS x CHANNELS through shared memory, so that neighbouring
// threads read along the axis that lies closer together, channels if CHANNELS_FAST, and write runs of 16 bytes.
#include "prim.cuh"
#include "lattice.cuh"

#define NT 256
#define PIXELS 64
#define CHANNELS 32
#define LD (PIXELS + 2)

struct Source {
  int64 strides[5];
  int size[3];
  int batch, groups, channels, padded; // channels of a group, and that many with zeros behind
};

extern "C" __global__ void __launch_bounds__(NT, 4)
    channels_last(const element *__restrict__ in, element *__restrict__ out, const Source s) {
  FC_SMEM(memory);
  int64 *places = reinterpret_cast<int64 *>(memory);            // [PIXELS]
  element *tile = reinterpret_cast<element *>(places + PIXELS); // [CHANNELS][LD]
  const int tid = threadIdx.x, c0 = blockIdx.y * CHANNELS, all = s.groups * s.padded;
  const int64 p0 = (int64)blockIdx.x * PIXELS, pixels = (int64)s.batch * s.size[0] * s.size[1] * s.size[2];
  if (tid < PIXELS && p0 + tid < pixels)
    places[tid] = pixel_out(s.strides, to_digits(p0 + tid, s.size[2], s.size[1], s.size[0]));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PIXELS * CHANNELS / NT; i++) {
    const int e = tid + i * NT, p = CHANNELS_FAST ? e / CHANNELS : e % PIXELS, c = CHANNELS_FAST ? e % CHANNELS : e / PIXELS;
    const int group = (c0 + c) / s.padded, channel = (c0 + c) % s.padded;
    const bool valid = p0 + p < pixels && c0 + c < all && channel < s.channels;
    tile[c * LD + p] = valid ? __ldg(&in[places[p] + ((int64)group * s.channels + channel) * s.strides[1]]) : element(0);
  }
  __syncthreads();
#pragma unroll
  for (int e = tid; e < PIXELS * CHANNELS / RUN; e += NT) {
    const int p = e / (CHANNELS / RUN), c = e % (CHANNELS / RUN) * RUN;
    if (p0 + p >= pixels || c0 + c >= all) continue;
    Run run;
#pragma unroll
    for (int k = 0; k < RUN; k++) run.v[k] = tile[(c + k) * LD + p];
    *reinterpret_cast<Run *>(&out[(p0 + p) * all + c0 + c]) = run;
  }
}
FC_EXPORT(channels_last)
