/* Weights into panels: lanes are out channels, whose weights lie far apart, each a run of memory. */
#include "kernels.h"
#include "simd.h"

static void pack_lanes(const real *from, int64_t lane_stride, int64_t lanes, int64_t width, const real *end,
                       const int64_t *to_at, real *to, real *check) {
    vec sum = check ? vload(check) : (vec){0};
    for (int64_t x = 0; x < width; x += VL) {
        const int64_t n = lesser(VL, width - x);
        vec r[VL];
    FC_UNROLL for (int i = 0; i < VL; i++) {
            const real *p = from + i * lane_stride + x;
            r[i] = i >= lanes ? (vec){0} : p + VL <= end ? vload(p) : load_lanes(p, 1, n);
        }
        FC_NAME(transpose_square)(r);
        FC_UNROLL for (int i = 0; i < VL; i++) if (i < n && to_at[x + i] >= 0) {
            sum += 0 * r[i];
            vstore(to + to_at[x + i], r[i]);
        }
    }
    if (check) vstore(check, sum);
}
