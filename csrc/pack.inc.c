/* Weights into panels: lanes are out channels. */
#include "kernels.h"
#include "simd.h"

/* Lanes whose weights lie far apart, each a run of memory. */
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

/* Rows ahead of what is copied that are fetched: they lie far apart, and no CPU foresees them. */
enum { AHEAD = 8 };

FC_INLINE void pack_vectors(const int vectors, const real *from, int64_t stride, int64_t valid, int64_t lanes,
                            int64_t width, real *to, real *check) {
    vec sum[2] = {{0}, {0}};
    FC_UNROLL for (int v = 0; v < vectors; v++) if (check) sum[v] = vload(check + v * VL);
    for (int64_t x = 0; x < width; x++, from += stride, to += lanes)
        FC_UNROLL for (int v = 0; v < vectors; v++) {
            __builtin_prefetch(from + AHEAD * stride + v * VL);
            const vec r = load_lanes(from + v * VL, 1, lesser(VL, valid - v * VL));
            sum[v] += 0 * r;
            vstore(to + v * VL, r);
        }
    FC_UNROLL for (int v = 0; v < vectors; v++) if (check) vstore(check + v * VL, sum[v]);
}

/* Lanes whose weights lie side by side. */
static void pack_rows(const real *from, int64_t stride, int64_t valid, int64_t lanes, int64_t width, real *to,
                      real *check) {
    for (int64_t first = 0; first < lanes; first += 2 * VL) {
        real *sums = check ? check + first : NULL;
        if (lanes - first > VL)
            pack_vectors(2, from + first, stride, valid - first, lanes, width, to + first, sums);
        else
            pack_vectors(1, from + first, stride, valid - first, lanes, width, to + first, sums);
    }
}
