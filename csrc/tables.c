/* The kernel tables of one scalar type, by the name of their ISA.  Every ISA compiles every kernel, so no slot is ever
 * empty. */
#include <stddef.h>
#include <string.h>

#include "kernels.h"

#ifdef FC_F32
#define FC_TABLE(isa) fc_kernels_f32_##isa
#else
#define FC_TABLE(isa) fc_kernels_f64_##isa
#endif

#define FC_ISA_ROW(isa, available) extern const fc_kernels FC_TABLE(isa);
#include "isas.def"
#undef FC_ISA_ROW

const void *FC_NAME(fc_table)(const char *isa) {
#define FC_ISA_ROW(name, available) \
    if (!strcmp(isa, #name)) return &FC_TABLE(name);
#include "isas.def"
#undef FC_ISA_ROW
    return NULL;
}

void FC_NAME(fc_tile)(const void *kernels, int tile[3]) {
    const fc_kernels *k = kernels;
    tile[0] = k->vl, tile[1] = k->mr, tile[2] = k->nr;
}
