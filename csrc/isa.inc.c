/* Every kernel of one ISA and one scalar type, and the table of them: the only symbol that the object exports. */
#include "depthwise.inc.c"
#include "depthwise_edges.inc.c"
#include "depthwise_plane.inc.c"
#include "elementwise.inc.c"
#include "gather.inc.c"
#include "gemm.inc.c"
#include "norm.inc.c"
#include "transpose.inc.c"

#include "pack.inc.c" /* uses transpose_square */
#include "pixels.inc.c"
#include "pool.inc.c"

#include "pool_max.inc.c" /* use pool.inc.c */
#include "pool_sum.inc.c"

#include "winograd.inc.c"

#include "wgrad.inc.c" /* uses the points of winograd.inc.c */

#define FC_GLUE3(a, b, c) a##_##b##_##c
#define FC_TABLE_NAME(type, isa) FC_GLUE3(fc_kernels, type, isa)
#ifdef FC_F32
#define FC_TABLE FC_TABLE_NAME(f32, FC_ISA)
#else
#define FC_TABLE FC_TABLE_NAME(f64, FC_ISA)
#endif
#define FC_TEXT_(x) #x
#define FC_TEXT(x) FC_TEXT_(x)

extern const fc_kernels FC_TABLE;
const fc_kernels FC_TABLE = {
    .isa = FC_TEXT(FC_ISA),
    .vl = VL,
    .mr = MR,
    .nr = NR,
    .edge_rows = EDGE_ROWS,
    .masked = FC_MASKED,
#define FC_KERNEL(slot, result, parameters) .slot = slot,
#include "kernels.def"
#undef FC_KERNEL
};
