/* What this CPU can run, and the step from a plan to the functions of its scalar type. */
#include "fastconv.h"

#include <stddef.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

const char *fc_isa_name(int index) {
    static const char *const names[] = {
#define FC_ISA_ROW(isa, available) #isa,
#include "isas.def"
#undef FC_ISA_ROW
    };
    return index >= 0 && index < (int)(sizeof names / sizeof *names) ? names[index] : NULL;
}

static int cpu_has(const char *isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#define FC_ISA_ROW(name, available) \
    if (!strcmp(isa, #name)) return (available) != 0;
#include "isas.def"
#undef FC_ISA_ROW
    return 0;
}

int fc_fma_rate(const char *isa) {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (!strcmp(isa, "avx512") && __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx &&
        __get_cpuid(1, &a, &b, &c, &d)) {
        const unsigned family = (a >> 8 & 15) + (a >> 20 & 255);
        if (family == 0x19) return 1; /* Zen 4 runs the halves of a vector one after the other */
    }
#else
    (void)isa;
#endif
    return 2;
}

const char *fc_kernel_name(int index) {
    static const char *const names[] = {
#define FC_KERNEL(slot, result, parameters) #slot,
#include "kernels.def"
#undef FC_KERNEL
    };
    return index >= 0 && index < (int)(sizeof names / sizeof *names) ? names[index] : NULL;
}

const char *fc_wino_shape(int index, int outputs[3], int points[3], int *taps) {
    static const struct {
        const char *name;
        int points[3], outputs[3], taps;
    } rows[] = {
#define FC_WINO(name, nz, ny, nx, mz, my, mx, r) {#name, {nz, ny, nx}, {mz, my, mx}, r},
#include "winograd.def"
#undef FC_WINO
    };
    if (index < 0 || index >= (int)(sizeof rows / sizeof *rows)) return NULL;
    memcpy(outputs, rows[index].outputs, sizeof rows[index].outputs);
    memcpy(points, rows[index].points, sizeof rows[index].points);
    *taps = rows[index].taps;
    return rows[index].name;
}

const void *fc_table_f32(const char *isa);
const void *fc_table_f64(const char *isa);

const void *fc_kernel_table(const char *isa, int is_double) {
    if (!cpu_has(isa)) return NULL;
    return is_double ? fc_table_f64(isa) : fc_table_f32(isa);
}

/* The two status bits FTZ and DAZ of x86, FZ of AArch64. */
uint64_t fc_flush_denormals(void) {
#if defined(__x86_64__)
    const unsigned state = _mm_getcsr();
    _mm_setcsr(state | 0x8040u);
    return state;
#elif defined(__aarch64__)
    uint64_t state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state));
    __asm__ volatile("msr fpcr, %0" : : "r"(state | (UINT64_C(1) << 24)));
    return state;
#else
    return 0;
#endif
}

void fc_restore_denormals(uint64_t state) {
#if defined(__x86_64__)
    _mm_setcsr((unsigned)state);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(state));
#else
    (void)state;
#endif
}

#define FC_BY_TYPE(result, name, parameters, is_double, arguments) \
    result name##_f32 parameters;                                  \
    result name##_f64 parameters;                                  \
    result name parameters { return is_double ? name##_f64 arguments : name##_f32 arguments; }

void fc_tile_f32(const void *kernels, int tile[3]);
void fc_tile_f64(const void *kernels, int tile[3]);

void fc_tile(const void *kernels, int is_double, int tile[3]) {
    (is_double ? fc_tile_f64 : fc_tile_f32)(kernels, tile);
}

FC_BY_TYPE(void, fc_conv_block, (fc_conv *p), p->l.is_double, (p))
FC_BY_TYPE(void, fc_conv_pack, (const fc_conv *p, const void *w, void *packed, int64_t task), p->l.is_double,
           (p, w, packed, task))
FC_BY_TYPE(int, fc_conv_run,
           (const fc_conv *p, const void *in, const void *packed, const void *bias, void *out, void *workspace,
            int64_t task),
           p->l.is_double, (p, in, packed, bias, out, workspace, task))
FC_BY_TYPE(void, fc_direct_block, (fc_direct * p), p->l.is_double, (p))
FC_BY_TYPE(void, fc_direct_pack, (const fc_direct *p, const void *w, void *packed, int64_t task), p->l.is_double,
           (p, w, packed, task))
FC_BY_TYPE(int, fc_direct_run,
           (const fc_direct *p, const void *in, const void *packed, const void *bias, void *out, void *workspace,
            int64_t task),
           p->l.is_double, (p, in, packed, bias, out, workspace, task))
FC_BY_TYPE(void, fc_direct_raw_block, (fc_direct_raw * p), p->l.is_double, (p))
FC_BY_TYPE(int, fc_direct_raw_run,
           (const fc_direct_raw *p, const void *in, const void *w, const void *bias, void *out, void *workspace,
            int64_t task),
           p->l.is_double, (p, in, w, bias, out, workspace, task))
FC_BY_TYPE(void, fc_pixels_block, (fc_pixels * p), p->phases->is_double, (p))
FC_BY_TYPE(void, fc_pixels_pack, (const fc_pixels *p, const void *w, void *packed, int64_t task), p->l.is_double,
           (p, w, packed, task))
FC_BY_TYPE(int, fc_pixels_run,
           (const fc_pixels *p, const void *in, const void *packed, const void *bias, void *out, void *workspace,
            int64_t task),
           p->l.is_double, (p, in, packed, bias, out, workspace, task))
FC_BY_TYPE(void, fc_wino_block, (fc_wino *p), p->l.is_double, (p))
FC_BY_TYPE(void, fc_wino_pack, (const fc_wino *p, const void *w, void *packed, int64_t task), p->l.is_double,
           (p, w, packed, task))
FC_BY_TYPE(int, fc_wino_run,
           (const fc_wino *p, const void *in, const void *packed, const void *bias, void *out, void *workspace,
            int64_t task),
           p->l.is_double, (p, in, packed, bias, out, workspace, task))
FC_BY_TYPE(void, fc_channelwise_block, (fc_channelwise *p), p->l.is_double, (p))
FC_BY_TYPE(void, fc_channelwise_pack, (const fc_channelwise *p, const void *w, void *packed, int64_t task),
           p->l.is_double, (p, w, packed, task))
FC_BY_TYPE(int, fc_channelwise_run,
           (const fc_channelwise *p, const void *in, const void *packed, const void *bias, void *out, void *workspace,
            int64_t task),
           p->l.is_double, (p, in, packed, bias, out, workspace, task))
FC_BY_TYPE(void, fc_wgrad_block, (fc_wgrad *p), p->l.is_double, (p))
FC_BY_TYPE(int, fc_wgrad_run,
           (const fc_wgrad *p, const void *in, const void *dy, void *dw, void *partial, void *workspace, int64_t task),
           p->l.is_double, (p, in, dy, dw, partial, workspace, task))
FC_BY_TYPE(void, fc_wgrad_merge, (const fc_wgrad *p, const void *partial, void *dw, void *workspace, int64_t task),
           p->l.is_double, (p, partial, dw, workspace, task))
