// Element types, and the only inline PTX. The emulator of the tests has the primitives under the same names. No header of
// CUDA's is included, so that no toolkit is needed; 16-bit numbers are bits.
#ifndef FC_EMULATOR
typedef unsigned short uint16_t;
typedef unsigned long long uintptr_t;
#define FC_SMEM(p) extern __shared__ __align__(128) unsigned char p[]
#define FC_EXPORT(name)
namespace fc {
struct __attribute__((aligned(64))) TensorMap { // what the driver makes of a description, see device.py
  unsigned long long words[16];
};
__device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float half_to_float(uint16_t h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ uint16_t float_to_half(float f) {
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ float bfloat16_to_float(uint16_t b) { return __uint_as_float((unsigned)b << 16); }
__device__ __forceinline__ uint16_t float_to_bfloat16(float f) { // round to nearest, ties to even
  unsigned u = __float_as_uint(f);
  return f != f ? 0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned float_to_tf32(float f) {
  unsigned u;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(f));
  return u;
}
// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void cp_async16(void *to, const void *from, bool valid) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#define FC_MMA(name, op)                                                                                              \
  __device__ __forceinline__ void name(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {               \
    asm volatile(op " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                 \
  }
FC_MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
FC_MMA(mma_half, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
FC_MMA(mma_bfloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
#endif
#if __CUDA_ARCH_FEAT_SM90_ALL // sm_90a
// Barriers of shared memory that also count the bytes that copies still owe. A wait for a parity ends when the phase of
// that parity is over; before the first phase ends, the one of parity 1 counts as over.
__device__ __forceinline__ void mbarrier_init(unsigned long long *barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(unsigned long long *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(unsigned long long *barrier, int bytes) { // and arrive
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(unsigned long long *barrier, int parity) {
  asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(
                   shared_address(barrier)),
               "r"(parity)
               : "memory");
}
// Tiles by the tensor memory accelerator, whose bytes `barrier` counts: of a matrix; and of the pixels of an image from
// (w, h, n) on, as its map's box goes through them, moved by (tap_w, tap_h).
__device__ __forceinline__ void tma_matrix(void *to, const TensorMap &map, unsigned long long *barrier, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
                   "r"(shared_address(to)), "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tma_image(void *to, const TensorMap &map, unsigned long long *barrier, int c, int w, int h,
                                          int n, int tap_w, int tap_h) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"((uint16_t)tap_w),
               "h"((uint16_t)tap_h)
               : "memory");
}
__device__ __forceinline__ void tma_volume(void *to, const TensorMap &map, unsigned long long *barrier, int c, int w, int h,
                                           int d, int n, int tap_w, int tap_h, int tap_d) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};" ::"r"(shared_address(to)),
               "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "h"((uint16_t)tap_w),
               "h"((uint16_t)tap_h), "h"((uint16_t)tap_d)
               : "memory");
}
// Products of a warpgroup: 64 rows of a, N of b, 16 deep, both in shared memory in rows of 128 bytes (128B swizzle).
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
#define FC_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FC_D32(i) FC_D8(i), FC_D8(i + 8), FC_D8(i + 16), FC_D8(i + 24)
#define FC_D64(i) FC_D32(i), FC_D32(i + 32)
#define FC_R32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
  "%27,%28,%29,%30,%31"
#define FC_R64 \
  FC_R32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56," \
  "%57,%58,%59,%60,%61,%62,%63"
#define FC_R128 \
  FC_R64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88," \
  "%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110," \
  "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FC_WGMMA(name, op, n, registers, a_b, ...)                                                                    \
  __device__ __forceinline__ void name(float (&d)[n], unsigned long long a, unsigned long long b) {                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned." op " {" registers "}, " a_b    \
                 ", p, 1, 1, 0, 0;\n}"                                                                                \
                 : __VA_ARGS__                                                                                        \
                 : "l"(a), "l"(b));                                                                                   \
  }
FC_WGMMA(wgmma_half, "m64n64k16.f32.f16.f16", 32, FC_R32, "%32, %33", FC_D32(0))
FC_WGMMA(wgmma_half, "m64n128k16.f32.f16.f16", 64, FC_R64, "%64, %65", FC_D64(0))
FC_WGMMA(wgmma_half, "m64n256k16.f32.f16.f16", 128, FC_R128, "%128, %129", FC_D64(0), FC_D64(64))
FC_WGMMA(wgmma_bfloat16, "m64n64k16.f32.bf16.bf16", 32, FC_R32, "%32, %33", FC_D32(0))
FC_WGMMA(wgmma_bfloat16, "m64n128k16.f32.bf16.bf16", 64, FC_R64, "%64, %65", FC_D64(0))
FC_WGMMA(wgmma_bfloat16, "m64n256k16.f32.bf16.bf16", 128, FC_R128, "%128, %129", FC_D64(0), FC_D64(64))
#endif
} // namespace fc
#endif

// FC_DTYPE: what arrays hold, and what sums are taken in.
#define FC_FLOAT32 0
#define FC_FLOAT64 1
#define FC_FLOAT16 2
#define FC_BFLOAT16 3
#if FC_DTYPE == FC_FLOAT64
typedef double element;
typedef double real;
#else
typedef float real;
#endif
#if FC_DTYPE == FC_FLOAT32
typedef float element;
#elif FC_DTYPE == FC_FLOAT16 || FC_DTYPE == FC_BFLOAT16
typedef uint16_t element;
#endif
// As many elements as one access of 16 bytes moves.
#define RUN ((int)(16 / sizeof(element)))
struct __attribute__((aligned(16))) Run {
  element v[16 / sizeof(element)];
};
__device__ __forceinline__ real to_real(element v) {
#if FC_DTYPE == FC_FLOAT16
  return fc::half_to_float(v);
#elif FC_DTYPE == FC_BFLOAT16
  return fc::bfloat16_to_float(v);
#else
  return v;
#endif
}
__device__ __forceinline__ element to_element(real v) {
#if FC_DTYPE == FC_FLOAT16
  return fc::float_to_half(v);
#elif FC_DTYPE == FC_BFLOAT16
  return fc::float_to_bfloat16(v);
#else
  return v;
#endif
}

typedef long long int64;
// A position that lies outside of every array, and still does after a tap is added.
#define FC_OUTSIDE (1 << 29)
