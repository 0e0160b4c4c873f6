// What a CUDA source sees when g++ compiles it for the emulator (-include cuda_emulator.h): the built-ins of CUDA and
// the device primitives of prim.cuh, as ordinary C++. runtime.cpp schedules the threads. For tests only.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>
// Not <math.h>, which in C++ takes as long to read as most kernels take to compile.
extern "C" {
double pow(double, double) noexcept;
double sqrt(double) noexcept;
}
inline float pow(float x, float p) { return __builtin_powf(x, p); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
#define FC_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emu::self->tid)
#define blockIdx (emu::block.index)
#define blockDim (emu::block.threads)
#define gridDim (emu::block.grid)
// All shared memory is dynamic, so that it has guards and is poisoned for each block.
#define FC_SMEM(p) unsigned char *p = emu::block.smem

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emu {
enum Flags : unsigned { REVERSE = 1, SHUFFLE = 2, CP_ASYNC_EAGER = 4 };
struct Thread {
  dim3 tid;
  int lane = 0, warp = 0;
};
struct Block {
  dim3 index, threads, grid;
  unsigned char *smem = nullptr;
  unsigned flags = 0;
  size_t smem_bytes = 0;
};

#pragma GCC visibility push(default)
extern Thread *self;
extern Block block;
void fail(const char *message);
void sync_block();
// Rendezvous of the 32 lanes of a warp: the last one to come runs f on the operands of all.
void sync_warp(const char *op, void *mine, void (*f)(void **all));
void cp_async(void *to, const void *from, int bytes, bool valid);
void cp_commit();
void cp_wait(int pending);
void mbarrier_init(unsigned long long *barrier, int count);
void mbarrier_arrive(unsigned long long *barrier, int bytes); // that copies will owe
void mbarrier_wait(unsigned long long *barrier, int parity);
void tma(void *to, const void *map, unsigned long long *barrier, const int *at, int axes, const int *taps);
void wgmma(float *d, int columns, unsigned long long a, unsigned long long b, float (*convert)(uint16_t));
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
#pragma GCC visibility pop

template <class T, void (*F)(T **)> inline void warp_op(const char *op, T &mine) {
  sync_warp(op, &mine, [](void **all) { F(reinterpret_cast<T **>(all)); });
}

template <size_t... I> struct Indices {};
template <size_t N, size_t... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <size_t... I> struct MakeIndices<0, I...> {
  typedef Indices<I...> type;
};
template <class T> struct Plain {
  typedef T type;
};
template <class T> struct Plain<const T> {
  typedef T type;
};
template <class... A, size_t... I> inline int unpack(void (*kernel)(A...), void **args, const size_t *sizes, Indices<I...>) {
  const size_t wanted[] = {sizeof(A)..., 0};
  for (size_t i = 0; i < sizeof...(A); i++)
    if (sizes[i] != wanted[i]) return int(i) + 1;
  if (args) kernel(*static_cast<typename Plain<A>::type *>(args[I])...);
  return sizes[sizeof...(A)] == ~size_t(0) ? 0 : int(sizeof...(A)) + 1;
}
template <class... A> inline int call(void (*kernel)(A...), void **args, const size_t *sizes) {
  return unpack(kernel, args, sizes, typename MakeIndices<sizeof...(A)>::type());
}
} // namespace emu

// fc_entry_NAME runs one thread, or, without arguments, compares their sizes with what the host wants to pass.
#define FC_EXPORT(name)                                                                                               \
  extern "C" __attribute__((visibility("default"))) int fc_entry_##name(void **args, const size_t *sizes) {           \
    return emu::call(&name, args, sizes);                                                                             \
  }

inline void __syncthreads() { emu::sync_block(); }
inline void emu_nothing(int **) {}
inline void __syncwarp(unsigned = ~0u) {
  int nothing = 0;
  emu::warp_op<int, emu_nothing>("__syncwarp", nothing);
}
template <class T> struct EmuShuffle {
  T value;
  int source;
  T result;
};
template <class T> inline void emu_shuffle(EmuShuffle<T> **lanes) {
  for (int l = 0; l < 32; l++) lanes[l]->result = lanes[unsigned(lanes[l]->source) < 32 ? lanes[l]->source : l]->value;
}
template <class T> inline T __shfl_xor_sync(unsigned, T v, int mask) {
  EmuShuffle<T> a{v, emu::self->lane ^ mask, v};
  emu::warp_op<EmuShuffle<T>, emu_shuffle<T>>("__shfl_xor_sync", a);
  return a.result;
}
template <class T> inline T __shfl_sync(unsigned, T v, int source) {
  EmuShuffle<T> a{v, source, v};
  emu::warp_op<EmuShuffle<T>, emu_shuffle<T>>("__shfl_sync", a);
  return a.result;
}
struct EmuMatch {
  long long value;
  unsigned same;
};
inline void emu_match(EmuMatch **lanes) {
  for (int l = 0; l < 32; l++) {
    lanes[l]->same = 0;
    for (int m = 0; m < 32; m++) lanes[l]->same |= unsigned(lanes[m]->value == lanes[l]->value) << m;
  }
}
inline unsigned __match_any_sync(unsigned, long long v) {
  EmuMatch a{v, 0};
  emu::warp_op<EmuMatch, emu_match>("__match_any_sync", a);
  return a.same;
}
struct EmuBallot {
  bool vote;
  unsigned all;
};
inline void emu_ballot(EmuBallot **lanes) {
  unsigned all = 0;
  for (int l = 0; l < 32; l++) all |= unsigned(lanes[l]->vote) << l;
  for (int l = 0; l < 32; l++) lanes[l]->all = all;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  EmuBallot a{vote, 0};
  emu::warp_op<EmuBallot, emu_ballot>("__ballot_sync", a);
  return a.all;
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T> inline T __ldg(const T *p) { return *p; }
inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

// ---- the device primitives of prim.cuh ---------------------------------------------------------------------------------
namespace fc {
struct TensorMap { // a description as provider.py encodes it
  unsigned long long words[16];
};
// Shared memory does not start with a multiple of 1024 bytes, so that who needs one must round.
inline unsigned shared_address(const void *p) { return unsigned(static_cast<const unsigned char *>(p) - emu::block.smem) + 1152; }
inline float half_to_float(uint16_t h) {
  _Float16 x;
  memcpy(&x, &h, 2);
  return float(x);
}
inline uint16_t float_to_half(float f) {
  _Float16 x = _Float16(f);
  uint16_t h;
  memcpy(&h, &x, 2);
  return h;
}
inline float bfloat16_to_float(uint16_t b) { return __uint_as_float(unsigned(b) << 16); }
inline uint16_t float_to_bfloat16(float f) { // round to nearest, ties to even
  unsigned u = __float_as_uint(f);
  return f != f ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline unsigned float_to_tf32(float f) { // round to nearest, ties away from zero
  unsigned u = __float_as_uint(f);
  return (u & 0x7f800000) == 0x7f800000 ? u : (u + 0x1000) & ~0x1fffu;
}
inline void cp_async16(void *to, const void *from, bool valid) { emu::cp_async(to, from, 16, valid); }
inline void cp_commit() { emu::cp_commit(); }
template <int PENDING> inline void cp_wait() { emu::cp_wait(PENDING); }

struct Mma {
  float *d;
  const unsigned *a, *b;
};
// The fragment layouts of mma.m16n8k8 (tf32) and mma.m16n8k16 (16 bits), as the PTX manual gives them.
template <int K, void (*GET)(const unsigned *, const unsigned *, int, int, float (*)[16], float (*)[8])>
inline void mma_lanes(Mma **lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; l++) GET(lanes[l]->a, lanes[l]->b, l >> 2, l & 3, a, b);
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) {
      int row = (l >> 2) + (i >> 1) * 8, column = 2 * (l & 3) + (i & 1);
      float sum = 0;
      for (int k = 0; k < K; k++) sum += a[row][k] * b[k][column];
      lanes[l]->d[i] += sum;
    }
}
inline void get_tf32(const unsigned *a, const unsigned *b, int g, int t, float (*A)[16], float (*B)[8]) {
  const unsigned kept = ~0x1fffu; // the unit ignores the low 13 bits
  for (int i = 0; i < 4; i++) A[g + (i & 1) * 8][t + (i >> 1) * 4] = __uint_as_float(a[i] & kept);
  for (int i = 0; i < 2; i++) B[t + i * 4][g] = __uint_as_float(b[i] & kept);
}
template <float (*CONVERT)(uint16_t)>
inline void get_16(const unsigned *a, const unsigned *b, int g, int t, float (*A)[16], float (*B)[8]) {
  for (int h = 0; h < 2; h++) {
    for (int i = 0; i < 4; i++) A[g + (i & 1) * 8][2 * t + h + (i >> 1) * 8] = CONVERT(uint16_t(a[i] >> 16 * h));
    for (int i = 0; i < 2; i++) B[2 * t + h + i * 8][g] = CONVERT(uint16_t(b[i] >> 16 * h));
  }
}
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Mma m{d, a, b};
  emu::warp_op<Mma, mma_lanes<8, get_tf32>>("mma_tf32", m);
}
inline void mma_half(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Mma m{d, a, b};
  emu::warp_op<Mma, mma_lanes<16, get_16<half_to_float>>>("mma_half", m);
}
inline void mma_bfloat16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  Mma m{d, a, b};
  emu::warp_op<Mma, mma_lanes<16, get_16<bfloat16_to_float>>>("mma_bfloat16", m);
}
struct Ldmatrix {
  const unsigned char *row;
  unsigned *result;
};
inline void ldmatrix_lanes(Ldmatrix **lanes) {
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) memcpy(&lanes[l]->result[i], lanes[i * 8 + (l >> 2)]->row + 4 * (l & 3), 4);
}
inline void ldmatrix_trans_lanes(Ldmatrix **lanes) {
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) {
      uint16_t pair[2];
      for (int h = 0; h < 2; h++) memcpy(&pair[h], lanes[i * 8 + 2 * (l & 3) + h]->row + 2 * (l >> 2), 2);
      memcpy(&lanes[l]->result[i], pair, 4);
    }
}
template <void (*F)(Ldmatrix **)> inline void emu_ldmatrix(const char *op, unsigned *result, const void *row) {
  if (reinterpret_cast<uintptr_t>(row) & 15) emu::fail("ldmatrix: the address of a row is not a multiple of 16 bytes");
  Ldmatrix m{static_cast<const unsigned char *>(row), result};
  emu::warp_op<Ldmatrix, F>(op, m);
}
inline void ldmatrix_x4(unsigned (&r)[4], const void *row) { emu_ldmatrix<ldmatrix_lanes>("ldmatrix_x4", r, row); }
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
  emu_ldmatrix<ldmatrix_trans_lanes>("ldmatrix_x4_trans", r, row);
}

inline void mbarrier_init(unsigned long long *barrier, int count) { emu::mbarrier_init(barrier, count); }
inline void mbarrier_fence() {}
inline void mbarrier_arrive(unsigned long long *barrier) { emu::mbarrier_arrive(barrier, 0); }
inline void mbarrier_expect(unsigned long long *barrier, int bytes) { emu::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(unsigned long long *barrier, int parity) { emu::mbarrier_wait(barrier, parity); }
inline void tma_matrix(void *to, const TensorMap &map, unsigned long long *barrier, int x, int y) {
  const int at[] = {x, y};
  emu::tma(to, &map, barrier, at, 2, nullptr);
}
inline void tma_image(void *to, const TensorMap &map, unsigned long long *barrier, int c, int w, int h, int n, int tap_w,
                      int tap_h) {
  const int at[] = {c, w, h, n}, taps[] = {tap_w, tap_h};
  emu::tma(to, &map, barrier, at, 4, taps);
}
inline void tma_volume(void *to, const TensorMap &map, unsigned long long *barrier, int c, int w, int h, int d, int n,
                       int tap_w, int tap_h, int tap_d) {
  const int at[] = {c, w, h, d, n}, taps[] = {tap_w, tap_h, tap_d};
  emu::tma(to, &map, barrier, at, 5, taps);
}
inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int PENDING> inline void wgmma_wait() { emu::wgmma_wait(PENDING); }
template <int D> inline void wgmma_half(float (&d)[D], unsigned long long a, unsigned long long b) {
  emu::wgmma(d, 2 * D, a, b, half_to_float);
}
template <int D> inline void wgmma_bfloat16(float (&d)[D], unsigned long long a, unsigned long long b) {
  emu::wgmma(d, 2 * D, a, b, bfloat16_to_float);
}
} // namespace fc
