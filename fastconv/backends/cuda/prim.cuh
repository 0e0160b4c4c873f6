// Element types, and the only inline PTX. The emulator of the tests has the primitives under the same names. No header of
// CUDA's is included, so that no toolkit is needed; 16-bit numbers are bits.
#ifndef FC_EMULATOR
typedef unsigned short uint16_t;
typedef unsigned long long uintptr_t;
#define FC_SMEM(p) extern __shared__ __align__(128) unsigned char p[]
#define FC_EXPORT(name)
namespace fc {
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

// As many values as one access of 16 bytes moves.
#define FC_PACK ((int)(16 / sizeof(real)))
struct __attribute__((aligned(16))) Pack {
  real v[16 / sizeof(real)];
};

typedef long long int64;
// A position that lies outside of every array, and still does after a tap is added.
#define FC_OUTSIDE (1 << 29)
