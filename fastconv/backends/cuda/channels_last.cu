// Copies an array (N, C, spatial) of any strides so that tensor cores can read it: [n, d, h, w][group][c], with c padded
// with zeros to a multiple of RUN. Results are written in runs of 16 bytes.
//
// Compiled for a dtype of at most 32 bits (FC_DTYPE), in one of two ways. TILES: neighbouring pixels lie closer together
// than channels, and of those there are many; a block moves a tile of PIXELS x CHANNELS through shared memory, and reads
// 16, 8 or 4 bytes of a channel at once where they lie together. Otherwise each thread gathers one run; neighbours take
// runs of the same pixel, if channels lie closer together (CHANNELS_FAST), or else neighbouring pixels.
#include "prim.cuh"
#include "lattice.cuh"

#define NT 256

struct Source {
  int64 strides[5];
  int size[3];
  int batch, groups, channels, padded; // channels of a group, and that many with zeros behind
  int together; // bytes of pixels that can be read at once, a power of two up to 16, where `in` is a multiple of it
};

#if FC_DTYPE == FC_FLOAT32
typedef unsigned bits;
#else
typedef uint16_t bits;
#endif
// What one access moves.
template <int BYTES> struct __attribute__((aligned(BYTES))) Part {
  unsigned v[BYTES / 4];
};
template <> struct Part<2> {
  uint16_t v;
};

__device__ __forceinline__ int64 pixels_of(const Source &s) {
  return (int64)s.batch * s.size[0] * s.size[1] * s.size[2];
}
// Where a pixel starts in `in`; divisions in 64 bits take long.
__device__ __forceinline__ int64 place_of(const Source &s, int64 pixel) {
  return pixel_out(s.strides, pixel < 1ll << 31 ? to_small_digits((int)pixel, s.size[2], s.size[1], s.size[0])
                                                : to_digits(pixel, s.size[2], s.size[1], s.size[0]));
}

#if TILES
#define CHANNELS 64
#define ROW 32                             // words of a channel of a tile: 128 bytes
#define WORD ((int)(4 / sizeof(bits)))     // pixels of a word
#define PIXELS (ROW * WORD)

// A word of a tile. Words of 16 bytes stay together. What a warp accesses at once lies in different banks: neighbouring
// words of a channel, or four of them of each of eight channels that are RUN apart.
__device__ __forceinline__ int at(int channel, int word) { return channel * ROW + (word ^ channel / RUN % 8 * 4); }

// Reads `channels` of a tile from its first pixel and channel on, BYTES at once; all of it is on its way at the same time.
template <int BYTES>
__device__ __forceinline__ void load(const Source &s, const bits *__restrict__ in, int64 p0, int channels, unsigned *tile) {
  const int across = ROW * 4 / BYTES, rows = NT / across, x = threadIdx.x % across, row = threadIdx.x / across;
  const int64 pixel = p0 + x * (BYTES / (int)sizeof(bits)), step = rows * s.strides[1];
  if (pixel >= pixels_of(s)) channels = 0;
  const bits *from = in + row * s.strides[1];
  if (channels > 0) from += place_of(s, pixel);
  Part<BYTES> parts[CHANNELS / rows];
#pragma unroll
  for (int i = 0; i < CHANNELS / rows; i++) {
    parts[i] = Part<BYTES>();
    if (row + i * rows < channels) parts[i] = *reinterpret_cast<const Part<BYTES> *>(from + i * step);
  }
#pragma unroll
  for (int i = 0; i < CHANNELS / rows; i++) {
    unsigned *word = &tile[at(row + i * rows, x * BYTES / 4)];
    reinterpret_cast<Part<BYTES> *>(word)[BYTES < 4 ? x % 2 : 0] = parts[i];
  }
}

extern "C" __global__ void __launch_bounds__(NT, 5)
    channels_last(const bits *__restrict__ in, bits *__restrict__ out, const Source s) {
  FC_SMEM(memory);
  unsigned *tile = reinterpret_cast<unsigned *>(memory); // [CHANNELS][ROW]
  // Blocks that run together write whole pixels.
  const int deep = (s.padded + CHANNELS - 1) / CHANNELS, part = blockIdx.x % (s.groups * deep);
  const int group = part / deep, c0 = part % deep * CHANNELS, all = s.groups * s.padded;
  const int64 p0 = (int64)(blockIdx.x / (s.groups * deep)) * PIXELS, pixels = pixels_of(s);
  const int together = s.together | (int)((uintptr_t)in % 16), channels = s.channels - c0;
  in += ((int64)group * s.channels + c0) * s.strides[1];
  if (together % 16 == 0)
    load<16>(s, in, p0, channels, tile);
  else if (together % 8 == 0)
    load<8>(s, in, p0, channels, tile);
#if FC_DTYPE == FC_FLOAT32
  else
    load<4>(s, in, p0, channels, tile);
#else
  else if (together % 4 == 0)
    load<4>(s, in, p0, channels, tile);
  else
    load<2>(s, in, p0, channels, tile);
#endif
  __syncthreads();
#pragma unroll
  for (int e = threadIdx.x; e < ROW * CHANNELS / RUN; e += NT) {
    const int c = (e % 8 + e / (8 * ROW) * 8) * RUN, word = e / 8 % ROW;
    if (c0 + c >= s.padded) continue;
    unsigned words[RUN];
#pragma unroll
    for (int k = 0; k < RUN; k++) words[k] = tile[at(c + k, word)];
#pragma unroll
    for (int h = 0; h < WORD; h++) {
      const int64 p = p0 + word * WORD + h;
      if (p >= pixels) continue;
      Part<16> run;
#pragma unroll
      for (int k = 0; k < 4; k++)
#if FC_DTYPE == FC_FLOAT32
        run.v[k] = words[k];
#else
        run.v[k] = (words[2 * k] >> 16 * h & 0xffff) | words[2 * k + 1] >> 16 * h << 16;
#endif
      *reinterpret_cast<Part<16> *>(&out[p * all + group * s.padded + c0 + c]) = run;
    }
  }
}
#else
struct __attribute__((aligned(16))) Gathered {
  bits v[RUN];
};

extern "C" __global__ void __launch_bounds__(NT, 6)
    channels_last(const bits *__restrict__ in, bits *__restrict__ out, const Source s) {
  const int64 e = (int64)blockIdx.x * NT + threadIdx.x, pixels = pixels_of(s);
  const int all = s.groups * s.padded, runs = all / RUN;
  if (e >= pixels * runs) return;
#if CHANNELS_FAST
  const int64 p = e < 1ll << 31 ? (int)e / runs : e / runs;
  const int c = (int)(e - p * runs) * RUN;
#else
  const int64 slow = e < pixels ? 0 : e / pixels, p = e - slow * pixels;
  const int c = (int)slow * RUN;
#endif
  const int group = c / s.padded, channel = c - group * s.padded;
  const bits *from = in + place_of(s, p) + ((int64)group * s.channels + channel) * s.strides[1];
  Gathered run;
#pragma unroll
  for (int k = 0; k < RUN; k++) run.v[k] = channel + k < s.channels ? __ldg(&from[k * s.strides[1]]) : bits(0);
  *reinterpret_cast<Gathered *>(&out[p * all + c]) = run;
}
#endif
FC_EXPORT(channels_last)
