/* Taps of max pools whose windows overlap (see fc_taps): their layout, and the gradient that reads them.
 *
 * Channels add to inputs of their own, so that a vector of them is a vector of addresses, which no CPU stores well: this is
 * plain C.  Bands of rows (of slices in 3D) of dx are tasks of their own; outputs whose windows reach into two bands are
 * visited twice:
 *
 *      dx     - - - - + + + + + + + + - -    + in the band
 *      dy        |-----|     |-----|         windows that reach into the band, and beyond: what these give to inputs
 *                    |-----|     |-----|     outside of it is another task's                                        */
#include "pool_blocking.h"

/* Numbers of a byte. */
#define TAPS 256
/* A band has so many elements at least, and so many extents of a window; channels are cut, by whole cache lines, where
 * that does not make tasks enough. */
#define BAND_ELEMENTS 32768
#define BAND_EXTENTS 4
#define MIN_TASKS 4
#define CHANNEL_STEP 16
/* Planes that add in turn: neighbouring windows of one often add to the same input, and would wait for each other. */
#define PLANES 8

/* ---- Layout ----------------------------------------------------------------------------------------------------- */

static int64_t blocks_of_image(const fc_pool *p) { return ceil_div(p->channels, p->taps.lanes); }
static int64_t blocks_of_all(const fc_pool *p) {
    return p->taps.together ? ceil_div(p->batch * p->channels, p->taps.lanes) : p->batch * blocks_of_image(p);
}

void FC_NAME(fc_pool_lay_taps)(const fc_kernels *k, fc_pool *p) {
    const int64_t *count = p->taps.count;
    p->taps.bytes = 0;
    if (count[0] * count[1] * count[2] > TAPS || !(p->by_channels || p->by_planes)) return;
    p->taps.lanes = p->by_channels ? 0 : k->vl, p->taps.together = p->images_together;
    p->taps.bytes = volume(p->out_size) * (p->by_channels ? p->batch * p->channels : blocks_of_all(p) * k->vl);
}

uint8_t *FC_NAME(fc_pool_taps_at)(const fc_pool *p, int64_t n, int64_t c) {
    const int64_t pixels = volume(p->out_size), lanes = p->taps.lanes;
    if (lanes == 0) return p->taps.at + n * pixels * p->channels + c;
    const int64_t plane = p->taps.together ? n * p->channels + c : c;
    const int64_t block = plane / lanes + (p->taps.together ? 0 : n * blocks_of_image(p));
    return p->taps.at + block * pixels * lanes + plane % lanes;
}

/* ---- Gradient: blocking ------------------------------------------------------------------------------------------- */

void FC_NAME(fc_pool_block_taps)(fc_pool *p) {
    const int axis = p->band_axis = p->in_size[0] == 1 && p->out_size[0] == 1;
    const fc_windows *w = &p->windows[axis];
    const int64_t inputs = p->in_size[axis], extent = (p->taps.count[axis] - 1) * w->step;
    p->by_channels = p->taps.lanes == 0;
    p->channel_block = p->by_channels ? p->channels : p->taps.lanes;
    const int64_t parts = p->by_channels ? p->batch : blocks_of_all(p);
    const int64_t least = ceil_div(BAND_ELEMENTS * inputs, max64(1, volume(p->in_size) * p->channel_block));
    const int64_t most = inputs / max64(1, max64(least, BAND_EXTENTS * extent));
    p->band = ceil_div(inputs, max64(1, min64(ceil_div(MIN_TASKS, max64(1, parts)), most)));
    p->bands = ceil_div(inputs, p->band);
    if (p->by_channels) {
        const int64_t blocks = ceil_div(MIN_TASKS, max64(1, p->batch * p->bands));
        p->channel_block = align_to(ceil_div(p->channels, blocks), CHANNEL_STEP);
    }
    p->channel_blocks = ceil_div(p->channels, max64(1, p->channel_block));
    p->tasks = (p->by_channels ? p->batch * p->channel_blocks : parts) * p->bands;
    p->workspace_bytes = 0;
}

/* ---- Gradient: tasks ---------------------------------------------------------------------------------------------- */

/* A part of an image: channels side by side, or one plane. */
typedef struct {
    int64_t n, c;
    real *dx;
    const real *dy;
    const uint8_t *taps;
} part;

static part part_of(const fc_pool *p, int64_t n, int64_t c) {
    return (part){n, c, real_at(&p->wide, n, c, 0, 0), real_at(&p->narrow, n, c, 0, 0),
                  FC_NAME(fc_pool_taps_at)(p, n, c)};
}

/* The inputs [from, to) along the axis of bands, and the outputs [low, high) whose windows reach into them. */
typedef struct {
    int64_t from, to, low, high;
} band;

static band band_of(const fc_pool *p, int64_t index) {
    const fc_windows *w = &p->windows[p->band_axis];
    const int64_t outputs = p->out_size[p->band_axis];
    band b = {.from = index * p->band, .low = outputs};
    b.to = min64(b.from + p->band, p->in_size[p->band_axis]);
    for (int64_t o = 0; o < outputs; o++)
        if (w->first[o] < b.to && w->first[o] + (w->count[o] - 1) * w->step >= b.from)
            b.low = min64(b.low, o), b.high = o + 1;
    b.low = min64(b.low, b.high);
    return b;
}

#define OUTSIDE INT64_MIN

/* Where the taps of a window lie in dx, from its first input on; of output o along the axis of bands, if that is not
 * negative: OUTSIDE if they do not lie in the band. */
static void place_taps(const fc_pool *p, const band *b, int64_t o, int64_t places[TAPS]) {
    const fc_windows *w = p->windows, *across = &w[p->band_axis];
    const int64_t *s = p->wide.stride, *count = p->taps.count;
    for (int64_t i = 0; i < count[0]; i++)
        for (int64_t j = 0; j < count[1]; j++) {
            const int64_t at = o < 0 ? b->from : across->first[o] + (p->band_axis == 0 ? i : j) * across->step;
            for (int64_t t = 0; t < count[2]; t++)
                *places++ = at < b->from || at >= b->to
                                ? OUTSIDE
                                : i * w[0].step * s[2] + j * w[1].step * s[3] + t * w[2].step * s[4];
        }
}

/* Whether the window of output o along the axis of bands lies in the band. */
static int lies_within(const fc_pool *p, const band *b, int64_t o) {
    const fc_windows *w = &p->windows[p->band_axis];
    return w->first[o] >= b->from && w->first[o] + (w->count[o] - 1) * w->step < b->to;
}

static inline __attribute__((always_inline)) void give(const int checked, real *dx, int64_t place, real dy) {
    if (!checked || place != OUTSIDE) dx[place] += dy;
}

/* A row of outputs gives to the windows that begin in the row `dx`: channels side by side. */
static inline __attribute__((always_inline)) void give_channels(const fc_pool *p, const int checked, const int dense,
                                                                const part *row, int64_t channels,
                                                                const int64_t places[TAPS]) {
    const int64_t dx_step = dense ? 1 : p->wide.stride[1], dy_step = dense ? 1 : p->narrow.stride[1];
    for (int64_t o = 0; o < p->out_size[2]; o++) {
        real *dx = row->dx + p->windows[2].first[o] * p->wide.stride[4];
        const real *dy = row->dy + o * p->narrow.stride[4];
        const uint8_t *taps = row->taps + o * p->channels;
        _Pragma("GCC unroll 8") for (int64_t c = 0; c < channels; c++)
            give(checked, dx + c * dx_step, places[taps[c]], dy[c * dy_step]);
    }
}

/* The same for `planes` planes in turn. */
static inline __attribute__((always_inline)) void give_planes(const fc_pool *p, const int checked, const int planes,
                                                              const part rows[PLANES], const int64_t places[TAPS]) {
    for (int64_t o = 0; o < p->out_size[2]; o++) {
        const int64_t first = p->windows[2].first[o] * p->wide.stride[4];
        _Pragma("GCC unroll 8") for (int i = 0; i < planes; i++) give(
            checked, rows[i].dx + first, places[rows[i].taps[o * p->taps.lanes]], rows[i].dy[o * p->narrow.stride[4]]);
    }
}

/* Adds a row of outputs of `parts` planes, or of one part of `channels` channels. */
static void give_row(const fc_pool *p, int checked, const part *rows, int64_t parts, int64_t channels,
                     const int64_t places[TAPS]) {
    const int dense = p->wide.stride[1] == 1 && p->narrow.stride[1] == 1;
    if (p->by_channels && dense && !checked)
        give_channels(p, 0, 1, rows, channels, places);
    else if (p->by_channels && dense)
        give_channels(p, 1, 1, rows, channels, places);
    else if (p->by_channels)
        give_channels(p, 1, 0, rows, channels, places);
    else if (parts == PLANES && !checked)
        give_planes(p, 0, PLANES, rows, places);
    else
        for (int64_t i = 0; i < parts; i++) give_planes(p, 1, 1, rows + i, places);
}

static void give_band(const fc_pool *p, const band *b, const part *parts, int64_t count, int64_t channels) {
    const fc_windows *depth = &p->windows[0], *height = &p->windows[1];
    const int64_t *out = p->out_size, *dx = p->wide.stride, *dy = p->narrow.stride;
    const int64_t step = p->by_channels ? p->channels : p->taps.lanes;
    const int64_t slice = p->band_axis == 0 ? p->in_size[1] : 1, rows = p->band_axis == 0 ? out[1] : 1;
    int64_t places[TAPS], cut[TAPS], zeroed = b->from * slice;
    place_taps(p, b, -1, places);
    for (int64_t row = b->low * rows; row < b->high * rows; row++) {
        const int64_t d = row / out[1], h = row % out[1];
        const int64_t last_d = depth->first[d] + (depth->count[d] - 1) * depth->step;
        const int64_t last_h = height->first[h] + (height->count[h] - 1) * height->step;
        const int64_t end = min64(last_d * p->in_size[1] + last_h + 1, b->to * slice);
        part at[PLANES];
        for (int64_t i = 0; i < count; i++) {
            const part *whole = &parts[i];
            zero_rows(p, whole->n, whole->c, channels, zeroed, end);
            at[i] = (part){.dx = whole->dx + depth->first[d] * dx[2] + height->first[h] * dx[3],
                           .dy = whole->dy + d * dy[2] + h * dy[3],
                           .taps = whole->taps + row * out[2] * step};
        }
        zeroed = max64(zeroed, end);
        const int64_t o = p->band_axis == 0 ? d : h;
        const int checked = !lies_within(p, b, o);
        if (checked) place_taps(p, b, o, cut);
        give_row(p, checked, at, count, channels, checked ? cut : places);
    }
    for (int64_t i = 0; i < count; i++) zero_rows(p, parts[i].n, parts[i].c, channels, zeroed, b->to * slice);
}

void FC_NAME(fc_pool_run_taps)(const fc_pool *p, int64_t task) {
    const band b = band_of(p, task % p->bands);
    const int64_t block = task / p->bands, lanes = p->taps.lanes;
    if (p->by_channels) {
        const int64_t c = block % p->channel_blocks * p->channel_block;
        const part all = part_of(p, block / p->channel_blocks, c);
        give_band(p, &b, &all, 1, min64(p->channel_block, p->channels - c));
        return;
    }
    const int64_t image = p->taps.together ? 0 : block / blocks_of_image(p);
    const int64_t planes = p->channels * (p->taps.together ? p->batch : 1);
    const int64_t from = (block - image * blocks_of_image(p)) * lanes, to = min64(from + lanes, planes);
    for (int64_t plane = from; plane < to; plane += PLANES) {
        const int64_t count = min64(PLANES, to - plane);
        part parts[PLANES];
        for (int64_t i = 0; i < count; i++)
            parts[i] = part_of(p, image + (plane + i) / p->channels, (plane + i) % p->channels);
        give_band(p, &b, parts, count, 1);
    }
}
