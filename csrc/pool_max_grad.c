/* The gradient of max pools whose windows overlap, by inputs.
 *
 * Inputs go to their rows of outputs, rather than outputs to rows of inputs: each row of dx is written once, and bands
 * of rows (of slices in 3D) are tasks of their own.  A band begins with those rows before it that share windows with
 * it, which say what maxima are taken:
 *
 *      x      - - - - + + + + + + + +       - before the band, + in it
 *      y         |-----|                    windows that reach into the band
 *                    |-----|
 */
#include <stddef.h>

#include "pool_blocking.h"

/* Elements of x in a band, at least, its rows, and its channels at most. */
#define BAND_ELEMENTS 32768
#define BAND_ROWS 8
#define MAX_CHANNELS 64
/* Fewer bands are cut into blocks of channels, whole cache lines. */
#define MIN_TASKS 4
#define CHANNEL_STEP 16
/* Pixels that are brought to [pixel][lane] at once: x and dx of these stay in the first-level cache. */
#define CHUNK 128

/* The outputs along an axis whose windows reach into the inputs [from, to). */
static void outputs_over(const fc_windows *w, int64_t outputs, int64_t from, int64_t to, int64_t *low, int64_t *high) {
    *low = outputs, *high = 0;
    for (int64_t o = 0; o < outputs; o++)
        if (w->first[o] < to && w->first[o] + (w->count[o] - 1) * w->step >= from) *low = min64(*low, o), *high = o + 1;
    if (*high == 0) *low = 0;
}

/* ---- Which outputs have an input ------------------------------------------------------------------------------------ */

/* Of input i along an axis: at[start[i]] ... at[start[i + 1] - 1]. */
typedef struct {
    int32_t *start, *at;
} cover;

static int64_t covered(const fc_windows *w, int64_t outputs) {
    int64_t total = 0;
    for (int64_t o = 0; o < outputs; o++) total += w->count[o];
    return total;
}

static int64_t cover_bytes(const fc_pool *p, int axis) {
    return align64((p->in_size[axis] + 2) * (int64_t)sizeof(int32_t)) +
           align64(covered(&p->windows[axis], p->out_size[axis]) * (int64_t)sizeof(int32_t));
}

static cover cover_of(const fc_pool *p, int axis, char **workspace) {
    const fc_windows *w = &p->windows[axis];
    const int64_t inputs = p->in_size[axis], outputs = p->out_size[axis];
    cover c = {.start = take(workspace, (inputs + 2) * (int64_t)sizeof(int32_t)),
               .at = take(workspace, covered(w, outputs) * (int64_t)sizeof(int32_t))};
    int32_t *next = c.start +
                    1; /* where the next output of an input goes; in the end, those of the next input begin there */
    for (int64_t i = 0; i < inputs + 2; i++) c.start[i] = 0;
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t t = 0; t < w->count[o]; t++) c.start[w->first[o] + t * w->step + 2]++;
    for (int64_t i = 2; i < inputs + 2; i++) c.start[i] += c.start[i - 1];
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t t = 0; t < w->count[o]; t++) c.at[next[w->first[o] + t * w->step]++] = (int32_t)o;
    return c;
}

/* ---- Blocking ------------------------------------------------------------------------------------------------------- */

/* Rows of outputs for each one along the axis of bands. */
static int64_t rows_of_one(const fc_pool *p) { return p->band_axis == 0 ? p->out_size[1] : 1; }
static int64_t padded(const fc_kernels *k, int64_t channels) { return align_to(channels, k->vl); }
static int64_t chunk_rows(const fc_pool *p) { return max64(1, CHUNK / p->in_size[2]); }

void FC_NAME(fc_pool_block_inputs)(const fc_kernels *k, fc_pool *p) {
    const int axis = p->band_axis = p->in_size[0] == 1 && p->out_size[0] == 1;
    const int64_t inputs = p->in_size[axis], inner = volume(p->in_size) / inputs;
    p->channel_block = p->by_planes ? k->vl : min64(p->channels, MAX_CHANNELS);
    int64_t extent = 0;
    for (int64_t o = 0; o < p->out_size[axis]; o++) extent = max64(extent, p->windows[axis].count[o] - 1);
    p->band = max64(max64(BAND_ROWS, BAND_ELEMENTS / (inner * p->channel_block)), 4 * extent * p->windows[axis].step);
    p->band = ceil_div(inputs, ceil_div(inputs, p->band));
    p->bands = ceil_div(inputs, p->band);
    if (p->by_channels) {
        const int64_t blocks = ceil_div(MIN_TASKS, max64(1, p->batch * p->bands));
        p->channel_block = min64(p->channel_block, align_to(ceil_div(p->channels, blocks), CHANNEL_STEP));
    }
    p->channel_blocks = ceil_div(p->by_planes ? p->planes : p->channels, p->channel_block);
    p->tasks = (p->by_planes && p->images_together ? 1 : p->batch) * p->channel_blocks * p->bands;

    int64_t most = 0; /* rows of outputs of a band */
    for (int64_t from = 0, low, high; from < inputs; from += p->band) {
        outputs_over(&p->windows[axis], p->out_size[axis], from, from + p->band, &low, &high);
        most = max64(most, (high - low) * rows_of_one(p));
    }
    p->narrow_pixels = most * p->out_size[2];
    const int64_t row = padded(k, p->channel_block) * (int64_t)sizeof(real);
    p->workspace_bytes = 2 * align64(most * (int64_t)sizeof(real *)) + 2 * align64(p->narrow_pixels * row);
    for (int i = 0; i < 2; i++) p->workspace_bytes += cover_bytes(p, i);
    p->workspace_bytes += (p->by_planes ? 2 * chunk_rows(p) : 1) * align64(p->in_size[2] * row);
}

/* ---- Tasks ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t n, c, channels;  /* by planes: those of all images count on */
    int64_t begin, from, to; /* inputs along the axis of bands: of its windows, its own */
    int64_t low, high;       /* outputs along that axis */
} band;

static band band_of(const fc_pool *p, int64_t task) {
    const fc_windows *w = &p->windows[p->band_axis];
    const int64_t block = task / p->bands;
    band b = {.n = block / p->channel_blocks,
              .c = block % p->channel_blocks * p->channel_block,
              .from = task % p->bands * p->band};
    b.channels = min64(p->channel_block, (p->by_planes ? p->planes : p->channels) - b.c);
    b.begin = b.from, b.to = min64(b.from + p->band, p->in_size[p->band_axis]);
    outputs_over(w, p->out_size[p->band_axis], b.from, b.to, &b.low, &b.high);
    for (int64_t o = b.low; o < b.high; o++) b.begin = min64(b.begin, w->first[o]);
    return b;
}

/* Where x is NaN for the last time in the window of output o; NULL if that is outside the band. */
static real *last_nan(const fc_pool *p, const band *b, int64_t c, const int64_t o[3]) {
    real *last = NULL;
    int64_t at[3];
    for (int64_t i = 0; i < p->windows[0].count[o[0]]; i++)
        for (int64_t j = 0; j < p->windows[1].count[o[1]]; j++)
            for (int64_t t = 0; t < p->windows[2].count[o[2]]; t++) {
                const int64_t tap[3] = {i, j, t};
                for (int axis = 0; axis < 3; axis++)
                    at[axis] = p->windows[axis].first[o[axis]] + tap[axis] * p->windows[axis].step;
                const real x = real_at(&p->x, b->n, c, at[0], at[1])[at[2] * p->x.stride[4]];
                if (x == x) continue;
                const int inside = at[p->band_axis] >= b->from && at[p->band_axis] < b->to;
                last = inside ? real_at(&p->wide, b->n, c, at[0], at[1]) + at[2] * p->wide.stride[4] : NULL;
            }
    return last;
}

/* What the windows give whose maximum is NaN. */
static void give_nans(const fc_pool *p, const band *b) {
    const int64_t rows = rows_of_one(p);
    for (int64_t c = b->c; c < b->c + b->channels; c++)
        for (int64_t row = b->low * rows; row < b->high * rows; row++)
            for (int64_t w = 0; w < p->out_size[2]; w++) {
                const int64_t o[3] = {row / p->out_size[1], row % p->out_size[1], w};
                const real y = real_at(&p->y, b->n, c, o[0], o[1])[w * p->y.stride[4]];
                real *to = y == y ? NULL : last_nan(p, b, c, o);
                if (to) *to += real_at(&p->narrow, b->n, c, o[0], o[1])[w * p->narrow.stride[4]];
            }
}

/* Whether windows along the width are next to each other and cut off at the borders only, as kernels can slide along. */
static void find_slide(const fc_pool *p, fc_pool_inputs *g) {
    const fc_windows *w = &p->windows[2];
    g->count = w->count[w->run], g->run_step = w->run_step, g->first = w->first[w->run] - w->run * w->run_step;
    int regular = w->step == 1 && w->run_step > 0 && g->first <= 0;
    for (int64_t o = 0; o < p->out_size[2] && regular; o++) {
        const int64_t first = g->first + o * g->run_step, end = min64(first + g->count, p->in_size[2]);
        regular = w->first[o] == max64(first, 0) && w->count[o] == end - w->first[o];
    }
    if (!regular) g->count = 0;
}

void FC_NAME(fc_pool_run_inputs)(const fc_kernels *k, const fc_pool *p, char *workspace, int64_t task) {
    const band b = band_of(p, task);
    const int64_t *in = p->in_size, *out = p->out_size;
    const int64_t first_row = b.low * rows_of_one(p), rows = (b.high - b.low) * rows_of_one(p);
    const int64_t ld = padded(k, p->channel_block), bytes = ld * (int64_t)sizeof(real);
    cover covers[2];
    for (int i = 0; i < 2; i++) covers[i] = cover_of(p, i, &workspace);
    fc_pool_inputs g = {.x_step = p->by_planes ? ld : p->x.stride[4],
                        .columns = in[2],
                        .channels = p->by_planes ? ld : b.channels,
                        .open = take(&workspace, max64(rows, 1) * (int64_t)sizeof(real *)),
                        .dy = take(&workspace, max64(rows, 1) * (int64_t)sizeof(real *)),
                        .windows = p->windows[2],
                        .outputs = out[2]};
    find_slide(p, &g);

    real *open = take(&workspace, rows * out[2] * bytes), *dy = take(&workspace, rows * out[2] * bytes);
    int nan = 0;
    if (p->by_planes) {
        const int64_t at = first_row * out[2], pixels = rows * out[2];
        k->channels_in(real_at(&p->y, b.n, b.c, 0, 0) + at, p->y.stride[1], 1, b.channels, pixels, open, ld);
        k->channels_in(real_at(&p->narrow, b.n, b.c, 0, 0) + at, p->narrow.stride[1], 1, b.channels, pixels, dy, ld);
        nan = k->pool_max_open(open, ld, pixels, ld, open);
    }
    for (int64_t i = 0; i < rows && !p->by_planes; i++) {
        const int64_t d = (first_row + i) / out[1], h = (first_row + i) % out[1];
        const int64_t at = i * out[2] * ld;
        nan |= k->pool_max_open(real_at(&p->y, b.n, b.c, d, h), p->y.stride[4], out[2], b.channels, open + at);
        k->pool_max_open(real_at(&p->narrow, b.n, b.c, d, h), p->narrow.stride[4], out[2], b.channels, dy + at);
    }

    /* rows of inputs: those before the band, and its own */
    const int64_t one = p->band_axis == 0 ? in[1] : 1, chunk = chunk_rows(p);
    real *x_chunk = NULL, *dx_chunk = take(&workspace, (p->by_planes ? chunk : 1) * in[2] * bytes);
    if (p->by_planes) x_chunk = take(&workspace, chunk * in[2] * bytes);
    for (int64_t row = b.begin * one, end; row < b.to * one; row = end) {
        const int inside = row >= b.from * one;
        end = min64(row + chunk, inside ? b.to * one : b.from * one);
        const int64_t at = row * in[2], pixels = (end - row) * in[2];
        if (p->by_planes)
            k->channels_in(real_at(&p->x, b.n, b.c, 0, 0) + at, p->x.stride[1], 1, b.channels, pixels, x_chunk, ld);
        for (int64_t i = row; i < end; i++) {
            const int64_t d = i / in[1], h = i % in[1];
            if (p->by_planes) {
                g.x = x_chunk + (i - row) * in[2] * ld;
                g.dx = dx_chunk + (i - row) * in[2] * ld, g.dx_step = ld;
            } else {
                g.x = real_at(&p->x, b.n, b.c, d, h);
                g.dx = inside ? real_at(&p->wide, b.n, b.c, d, h) : dx_chunk;
                g.dx_step = inside ? p->wide.stride[4] : ld;
            }
            g.rows = 0;
            for (int32_t j = covers[0].start[d]; j < covers[0].start[d + 1]; j++)
                for (int32_t l = covers[1].start[h]; l < covers[1].start[h + 1]; l++) {
                    const int64_t od = covers[0].at[j], oh = covers[1].at[l], o = od * out[1] + oh - first_row;
                    if (o < 0 || o >= rows) continue; /* reaches no input of the band */
                    g.open[g.rows] = open + o * out[2] * ld;
                    g.dy[g.rows++] = dy + o * out[2] * ld;
                }
            k->pool_max_give(&g);
        }
        if (p->by_planes && inside)
            k->channels_out(dx_chunk, ld, b.channels, pixels, real_at(&p->wide, b.n, b.c, 0, 0) + at, p->wide.stride[1],
                            1);
    }
    if (nan) give_nans(p, &b);
}
