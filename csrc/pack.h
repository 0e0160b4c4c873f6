/* Packing of weights into panels [tap][channel][lane], lane by lane through transposes in registers. */
#ifndef FC_PACK_H
#define FC_PACK_H

#include "blocking.h"
#include "kernels.h"

/* Most weights of a run; runs of which fewer than one in so many are taps (of a phase of a strided gradient) are not
 * worth a transpose. */
enum { FC_PACK_WIDTH = 256, FC_PACK_SPARSE = 8 };

/* One behind the last element of the weights, from `w`, their first one. */
static inline const real *weights_end(const fc_lattice *l, const real *w) {
    int64_t last = 0, tap = 0;
    const int64_t n[3] = {l->groups, l->out_channels, l->in_channels};
    for (int64_t t = 0; t < l->taps; t++) tap = max64(tap, l->tap_w[t]);
    for (int a = 0; a < 3; a++) last += max64(l->w_stride[a], 0) * max64(n[a] - 1, 0);
    return w + last + tap + 1;
}

/* Copies n elements, a multiple of FC_PIECE, and adds 0 * each to `check`, if given; in vectors of 16 bytes, which every
 * CPU has: this is compiled for none in particular. */
enum { FC_PIECE = 16 / sizeof(real) };
typedef real FC_NAME(piece) __attribute__((vector_size(16), aligned(sizeof(real)), may_alias));
static inline void fc_copy_pieces(const real *from, int64_t n, real *to, real *check) {
    typedef FC_NAME(piece) piece;
    for (int64_t i = 0; i < n; i += FC_PIECE) {
        const piece v = *(const piece *)(from + i);
        *(piece *)(to + i) = v;
        if (check) *(piece *)(check + i) += 0 * v;
    }
}

/* Packs `valid` of `lanes` out channels, from `w` on, to to[(tap * in_channels + channel) * lanes + lane]; lanes behind
 * `valid` are zeros.  0 * each weight is added to `check`, if given. */
static inline void pack_panel(const fc_lattice *l, const real *w, int64_t valid, int64_t lanes, const real *end,
                              real *to, real *check) {
    const fc_kernels *k = l->kernels;
    const int64_t lane_stride = l->w_stride[1], channel_stride = l->w_stride[2], channels = l->in_channels;
    int64_t to_at[2 * FC_PACK_WIDTH], span = 0, low = 0;
    for (int64_t t = 0; t < l->taps; t++) span = max64(span, l->tap_w[t] + 1), low = min64(low, l->tap_w[t]);
    for (int i = 0; check && i < lanes; i++) check[i] = 0;

    /* What lies side by side: taps, those of neighbouring channels too; channels; or lanes, which need no transposes. */
    const int taps_first = low >= 0 && span <= FC_PACK_WIDTH && span > 1 && FC_PACK_SPARSE * l->taps >= span;
    if (lanes % k->vl == 0 && (channel_stride == 1 || taps_first) && lane_stride != 1) {
        const int by_taps = channel_stride != 1;
        int64_t together = by_taps ? 1 : min64(channels, FC_PACK_WIDTH);
        if (by_taps && channel_stride >= span && channel_stride <= FC_PACK_WIDTH)
            together = max64(FC_PACK_WIDTH / channel_stride, 1);
        const int64_t widest = by_taps ? (together - 1) * channel_stride + span : together;
        for (int64_t tap = 0; tap < (by_taps ? 1 : l->taps); tap++) {
            for (int64_t x = 0; x < widest; x++) to_at[x] = by_taps ? -1 : (tap * channels + x) * lanes;
            for (int64_t i = 0; by_taps && i < together; i++)
                for (int64_t t = 0; t < l->taps; t++)
                    to_at[i * channel_stride + l->tap_w[t]] = (t * channels + i) * lanes;
            for (int64_t c = 0; c < channels; c += together) {
                const int64_t n = min64(together, channels - c);
                const int64_t width = by_taps ? (n - 1) * channel_stride + span : n;
                for (int64_t first = 0; first < lanes; first += k->vl)
                    k->pack_lanes(w + first * lane_stride + c * channel_stride + (by_taps ? 0 : l->tap_w[tap]),
                                  lane_stride, min64(valid - first, k->vl), width, end, to_at, to + c * lanes + first,
                                  check ? check + first : NULL);
            }
        }
        return;
    }
    if (lanes % k->vl == 0 && lane_stride == 1) {
        for (int64_t t = 0; t < l->taps; t++, to += channels * lanes)
            k->pack_rows(w + l->tap_w[t], channel_stride, valid, lanes, channels, to, check);
        return;
    }
    for (int64_t t = 0; t < l->taps; t++)
        for (int64_t c = 0; c < channels; c++, to += lanes) {
            const real *from = w + l->tap_w[t] + c * channel_stride;
            if (lane_stride == 1 && valid == lanes && lanes % FC_PIECE == 0) {
                fc_copy_pieces(from, lanes, to, check);
                continue;
            }
            for (int64_t i = 0; i < valid; i++) to[i] = from[i * lane_stride];
            for (int64_t i = valid; i < lanes; i++) to[i] = 0;
            for (int64_t i = 0; check && i < lanes; i++) check[i] += 0 * to[i];
        }
}

/* Lets tile `tile` of `tiles`, which read the same weights one after the other, fetch a share of the n terms that come
 * next: the first two do.  Where weights lie in memory, what is asked for when it is needed comes too late. */
static inline void fetch_weights(fc_gemm *g, const real *next, int64_t n, int64_t tile, int64_t tiles) {
    const int64_t sharing = min64(tiles, 2);
    g->next_step = g->ldb * (int64_t)sizeof(real) / sharing;
    g->next = tile < sharing ? (const char *)next + tile * n * g->next_step : NULL;
}

#endif
