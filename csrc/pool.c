/* Pools: blocking, and the operations by index, which no vector serves. */
#include <math.h>
#include <string.h>

#include "pool_blocking.h"

/* Elements that a task of a forward pass or a sample's channels in a gradient should touch: enough to hide the cost of
 * starting it, few enough to stay in the second-level cache. */
#define TASK_ELEMENTS 16384
/* A gradient with lanes of channels is cut into blocks of channels, whole cache lines, if it has fewer samples. */
#define MIN_TASKS 4
#define CHANNEL_STEP 16
/* Columns that the rows kernels reduce at once, so that they stay in the first-level cache. */
#define LINE 2048
/* Columns of a task at least, if lanes are channels. */
#define MIN_COLUMNS 16
/* Bytes of the planes of a vector of channels: those of a band of a forward pass, which stay in the second-level cache, and
 * the most of a gradient, whose windows lie apart or have inputs in common, so that rows serve badly.  Columns of a forward
 * pass with which rows serve better: of windows that lie apart and of maxima of three columns, two apart; of three columns,
 * one apart; of others. */
#define BAND_BYTES (384 * 1024)
#define APART_BYTES (2 << 20)
#define COMMON_BYTES (16 << 20)
#define WIDE_ROW 32
#define WIDE_ROW_BY_ONE 24
#define WIDE_ROW_MASKED 12
#define WIDE_ROW_COMMON 120
/* The widest vector of any ISA, by which kernels may write beyond the columns of a buffer. */
#define MAX_LANES 16

#ifdef FC_F32
#define POWER powf
#else
#define POWER pow
#endif

/* ---- Blocking ------------------------------------------------------------------------------------------------- */

static void find_run(fc_windows *w, int64_t outputs) {
    int64_t longest = 0;
    w->run = w->run_end = 0;
    w->run_step = 1;
    for (int64_t o = 0, end; o < outputs; o = end) {
        const int64_t step = o + 1 < outputs ? w->first[o + 1] - w->first[o] : 1;
        for (end = o + 1; end < outputs && w->first[end] - w->first[end - 1] == step && w->count[end] == w->count[o] &&
                          w->extent[end] == w->extent[o];)
            end++;
        if (end - o > longest) longest = end - o, w->run = o, w->run_end = end, w->run_step = step;
    }
}

static int are_apart(const fc_windows *w, int64_t outputs) {
    for (int64_t o = 1; o < outputs; o++)
        if (w->first[o] <= w->first[o - 1] + (w->count[o - 1] - 1) * w->step) return 0;
    return 1;
}

/* Whether every input along an axis is in one window and no more. */
static int are_a_tiling(const fc_windows *w, int64_t outputs, int64_t inputs) {
    int64_t covered = 0;
    for (int64_t o = 0; o < outputs; o++) covered += w->count[o];
    return covered == inputs && are_apart(w, outputs);
}

/* Gradients that spread outputs over their windows. */
static int spreads(const fc_pool *p) { return p->op == FC_SUM_POOL_GRAD || p->op == FC_MAX_POOL_INPUT_GRAD; }
static int uses_windows(const fc_pool *p) {
    return p->op <= FC_SUM_POOL || spreads(p) || p->op == FC_MAX_POOL_TAPS_GRAD;
}
static int is_forward(const fc_pool *p) { return p->op == FC_MAX_POOL || p->op == FC_SUM_POOL; }

/* See fc_pool_row; a line has at most LINE outputs. */
static int64_t buffer_bytes(const fc_pool *p) {
    return p->line ? align64((p->line + MAX_LANES + LINE) * (int64_t)sizeof(real)) : 0;
}
static int64_t rows_bytes(const fc_pool *p) {
    return p->line ? align64((p->line + MAX_LANES) * (int64_t)sizeof(real)) : 0;
}

/* Whether tasks are ranges of output rows: not where a gradient adds to rows in common, or multiplies all in the end. */
static int cuts_rows(const fc_pool *p) {
    return is_forward(p) || (spreads(p) && p->by_channels && p->tiles && !(p->op == FC_SUM_POOL_GRAD && p->x.at));
}

static int has_stride_1(const fc_view *v) { return v->at == NULL || v->stride[1] == 1; }

/* Whether an axis has one output, of which the window is the whole axis. */
static int is_global(const fc_pool *p, int axis) {
    const fc_windows *w = &p->windows[axis];
    return p->out_size[axis] == 1 && w->count[0] == p->in_size[axis] && (w->step == 1 || w->count[0] == 1);
}

/* Of a global pool of a plane without gaps, make one of a line. */
static void merge_axes(fc_pool *p) {
    static const int64_t zero = 0, one = 1;
    fc_windows *width = &p->windows[2];
    for (int i = 1; i >= 0 && is_global(p, i) && is_global(p, 2); i--) {
        const int64_t columns = p->in_size[2];
        if (p->wide.stride[2 + i] != columns * p->wide.stride[4]) return;
        if (p->x.at && p->x.stride[2 + i] != columns * p->x.stride[4]) return;
        p->merged_count = width->count[0] * p->windows[i].count[0];
        p->merged_extent = width->extent[0] * p->windows[i].extent[0];
        *width = (fc_windows){.first = &zero, .count = &p->merged_count, .extent = &p->merged_extent, .step = 1};
        p->windows[i] = (fc_windows){.first = &zero, .count = &one, .extent = &one, .step = 1};
        p->in_size[2] = p->merged_count;
        p->in_size[i] = 1;
    }
}

static int has_dense_planes(const fc_view *v, const int64_t size[3]) {
    return v->at == NULL || (v->stride[4] == 1 && (size[1] == 1 || v->stride[3] == size[2]) &&
                             (size[0] == 1 || v->stride[2] == size[1] * size[2]));
}

static int has_even_planes(const fc_pool *p, const fc_view *v) {
    return v->at == NULL || v->stride[0] == p->channels * v->stride[1];
}

/* Inputs [*low, *high) along an axis under its outputs [from, to). */
static void inputs_under(const fc_windows *w, int64_t from, int64_t to, int64_t *low, int64_t *high) {
    *low = INT64_MAX, *high = 0;
    for (int64_t o = from; o < to; o++) {
        *low = min64(*low, w->first[o]);
        *high = max64(*high, w->first[o] + (w->count[o] - 1) * w->step + 1);
    }
}

/* Cuts the outputs along an axis into bands whose planes take BAND_BYTES, and returns the bytes that they do take. */
static int64_t cut_bands(const fc_kernels *k, fc_pool *p) {
    const int axis = p->band_axis = p->in_size[0] == 1 && p->out_size[0] == 1;
    const int64_t outputs = p->out_size[axis], inner = volume(p->in_size) / p->in_size[axis];
    const int64_t inner_out = volume(p->out_size) / outputs;
    for (p->bands = 1;; p->bands = min64(2 * p->bands, outputs)) {
        p->band = ceil_div(outputs, p->bands), p->bands = ceil_div(outputs, p->band);
        int64_t inputs = is_forward(p) ? 0 : p->in_size[axis];
        for (int64_t o = 0, low, high; o < outputs && is_forward(p); o += p->band) {
            inputs_under(&p->windows[axis], o, min64(o + p->band, outputs), &low, &high);
            inputs = max64(inputs, high - low);
        }
        p->wide_pixels = inputs * inner, p->narrow_pixels = p->band * inner_out;
        const int64_t pixels = (1 + (p->x.at != NULL)) * p->wide_pixels + (1 + (p->y.at != NULL)) * p->narrow_pixels;
        const int64_t bytes = pixels * k->vl * (int64_t)sizeof(real);
        if (bytes <= BAND_BYTES || !is_forward(p) || p->band == 1) return bytes;
    }
}

/* Columns with which a forward pass is faster row by row than with planes as lanes; see lines_in_registers. */
static int64_t wide_row(const fc_kernels *k, const fc_pool *p) {
    const fc_windows *w = &p->windows[2];
    if (p->apart) return WIDE_ROW;
    const int three = p->taps.count[2] == 3 && w->step == 1 && p->out_size[2] > 2 && p->power == 1;
    const int64_t distance = three ? w->first[2] - w->first[1] : 0;
    if (distance == 1) return k->masked ? WIDE_ROW_MASKED : WIDE_ROW_BY_ONE;
    return distance == 2 && p->op == FC_MAX_POOL ? WIDE_ROW : WIDE_ROW_COMMON;
}

/* Whether lanes are to be planes.  Bands of a gradient would have inputs in common, so that it has one. */
static int serves_planes(const fc_kernels *k, fc_pool *p) {
    if (p->by_channels || !uses_windows(p) || p->indices.at || volume(p->out_size) <= 1) return 0;
    if (!has_dense_planes(&p->wide, p->in_size) || !has_dense_planes(&p->x, p->in_size) ||
        !has_dense_planes(&p->narrow, p->out_size) || !has_dense_planes(&p->y, p->out_size))
        return 0;
    p->images_together = has_even_planes(p, &p->wide) && has_even_planes(p, &p->narrow) && has_even_planes(p, &p->x) &&
                         has_even_planes(p, &p->y);
    p->planes = p->images_together ? p->batch * p->channels : p->channels;
    if (is_forward(p) && !p->taps.wanted && p->in_size[2] >= wide_row(k, p)) return 0;
    const int64_t counted = p->batch_invariant ? p->channels : p->planes;
    if (2 * counted < k->vl) return 0;
    return cut_bands(k, p) <= (p->apart ? APART_BYTES : COMMON_BYTES);
}

int FC_NAME(fc_pool_block)(const void *kernels, fc_pool *p) {
    const fc_kernels *k = kernels;
    for (int i = 0; i < 3 && uses_windows(p); i++) p->taps.count[i] = largest(p->windows[i].count, p->out_size[i]);
    if (p->op == FC_MAX_POOL_TAPS_GRAD) {
        FC_NAME(fc_pool_block_taps)(p);
        return FC_POOL_OK;
    }
    p->by_channels = p->channels > 1 && has_stride_1(&p->wide) && has_stride_1(&p->narrow) &&
                     has_stride_1(&p->indices) && has_stride_1(&p->x) && has_stride_1(&p->y);
    p->apart = p->tiles = 1;
    for (int i = 0; i < 3 && uses_windows(p); i++) {
        p->apart = p->apart && are_apart(&p->windows[i], p->out_size[i]);
        p->tiles = p->tiles && are_a_tiling(&p->windows[i], p->out_size[i], p->in_size[i]);
    }
    if (p->op == FC_MAX_POOL_INPUT_GRAD && !p->apart) return FC_POOL_WINDOWS_OVERLAP;
    p->by_planes = serves_planes(k, p);
    if (p->taps.wanted) FC_NAME(fc_pool_lay_taps)(k, p);
    if (uses_windows(p) && !p->by_channels && !p->by_planes) merge_axes(p);
    for (int i = 0; i < 3 && uses_windows(p); i++) find_run(&p->windows[i], p->out_size[i]);
    const int64_t plane = max64(1, volume(p->in_size)), rows = p->out_size[0] * p->out_size[1];
    p->channel_block = p->channels;
    p->row_block = max64(1, rows);
    if (!p->by_channels)
        p->channel_block = min64(p->channels, max64(1, TASK_ELEMENTS / plane));
    else if (!cuts_rows(p)) {
        const int64_t block = ceil_div(p->channels, ceil_div(MIN_TASKS, max64(1, p->batch)));
        p->channel_block = ceil_div(block, CHANNEL_STEP) * CHANNEL_STEP;
    }
    if (cuts_rows(p)) p->row_block = max64(1, rows / max64(1, ceil_div(plane * p->channel_block, TASK_ELEMENTS)));
    p->column_block = max64(1, p->out_size[2]);
    if (cuts_rows(p) && p->by_channels && p->row_block == 1) { /* long rows are cut */
        const int64_t row = p->channels * plane / max64(1, rows);
        p->column_block = max64(MIN_COLUMNS, p->column_block / max64(1, row / TASK_ELEMENTS));
    }
    p->column_blocks = ceil_div(max64(1, p->out_size[2]), p->column_block);
    p->channel_blocks = ceil_div(p->channels, max64(1, p->channel_block));
    p->row_blocks = cuts_rows(p) ? ceil_div(rows, p->row_block) : 1;
    p->tasks = p->batch * p->channel_blocks * p->row_blocks * p->column_blocks;
    if (p->by_planes) {
        p->plane_blocks = ceil_div(p->planes, k->vl);
        p->tasks = (p->images_together ? 1 : p->batch) * p->plane_blocks * p->bands;
    }
    p->line = 0;
    if (uses_windows(p) && !p->by_channels && !p->by_planes)
        p->line = min64(p->in_size[2], max64(LINE, largest(p->windows[2].count, p->out_size[2]) * p->windows[2].step));
    p->workspace_bytes = buffer_bytes(p) + rows_bytes(p);
    if (p->by_planes)
        p->workspace_bytes = (1 + (p->x.at != NULL)) * align64(p->wide_pixels * k->vl * (int64_t)sizeof(real)) +
                             (1 + (p->y.at != NULL)) * align64(p->narrow_pixels * k->vl * (int64_t)sizeof(real));
    if (p->op == FC_MAX_POOL) {
        int64_t span = 0, stride = 1;
        for (int i = 2; i >= 0; stride *= p->in_size[i], i--)
            span += (largest(p->windows[i].count, p->out_size[i]) - 1) * p->windows[i].step * stride;
        if (span > INT32_MAX) return FC_POOL_WINDOW_TOO_LARGE;
    }
    return FC_POOL_OK;
}

/* ---- Tasks ---------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t n, c, channels, row, row_end, column, column_end;
} pool_task;

static pool_task task_of(const fc_pool *p, int64_t task) {
    const int64_t column = task % p->column_blocks * p->column_block, rows = p->out_size[0] * p->out_size[1];
    task /= p->column_blocks;
    const int64_t block = task / p->row_blocks;
    pool_task t = {.n = block / p->channel_blocks, .c = block % p->channel_blocks * p->channel_block};
    t.channels = min64(p->channel_block, p->channels - t.c);
    t.row = task % p->row_blocks * p->row_block;
    t.row_end = min64(t.row + p->row_block, rows);
    t.column = column, t.column_end = min64(column + p->column_block, p->out_size[2]);
    return t;
}

/* Narrows the row to the outputs [o, end). */
static void cut_outputs(const fc_pool *p, int64_t o, int64_t end, fc_pool_row *r) {
    const fc_windows *w = &p->windows[2];
    r->windows = (fc_windows){.first = w->first + o,
                              .count = w->count + o,
                              .extent = w->extent + o,
                              .step = w->step,
                              .run = max64(w->run - o, 0),
                              .run_end = min64(w->run_end, end) - o,
                              .run_step = w->run_step};
    r->outputs = end - o;
}

/* Narrows the row to the outputs from `o` on whose windows lie in p->line columns, and returns the first one left.  Those of
 * the run are counted, not visited. */
static int64_t cut_line(const fc_pool *p, int64_t o, fc_pool_row *r) {
    const fc_windows *w = &p->windows[2];
    const int64_t most = min64(p->out_size[2], o + LINE);
    int64_t low = w->first[o], high = low, end = o;
    while (end < most) {
        const int64_t span = (w->count[end] - 1) * w->step + 1;
        const int64_t new_low = min64(low, w->first[end]), new_high = max64(high, w->first[end] + span);
        if (end > o && new_high - new_low > p->line) break;
        low = new_low, high = new_high;
        if (end >= w->run && end + 1 < w->run_end && w->run_step > 0) {
            const int64_t fit = (low + p->line - w->first[end] - span) / w->run_step;
            end += max64(min64(fit, min64(w->run_end, most) - end - 1), 0);
            high = max64(high, w->first[end] + span);
        }
        end++;
    }
    cut_outputs(p, o, end, r);
    r->column = low, r->columns = high - low;
    return end;
}

/* Calls the kernel for the rows of the task, from output column o on. */
static void run_lines(const fc_pool *p, const pool_task *t, int64_t c, int64_t o, fc_pool_row *r,
                      void (*kernel)(const fc_pool_row *)) {
    const fc_windows *depth = &p->windows[0], *height = &p->windows[1];
    const int64_t *s = p->indices.stride;
    /* the first line sets whole rows to zero */
    const int writes_wide = spreads(p) && o == 0 && !(p->by_channels && p->tiles);
    int64_t zeroed = 0;
    int64_t d = t->row / p->out_size[1], h = t->row % p->out_size[1];
    for (int64_t row = t->row; row < t->row_end; row += r->lines, h += r->lines) {
        if (h == p->out_size[1]) d++, h = 0;
        r->lines = 1;
        if (r->line_narrow && h >= height->run && h < height->run_end)
            r->lines = min64(height->run_end - h, t->row_end - row);
        r->wide = real_at(&p->wide, t->n, c, depth->first[d], height->first[h]) + r->column * r->wide_step;
        r->narrow = real_at(&p->narrow, t->n, c, d, h) + o * r->narrow_step;
        if (p->x.at) r->x = real_at(&p->x, t->n, c, depth->first[d], height->first[h]) + r->column * r->x_step;
        if (p->y.at) r->y = real_at(&p->y, t->n, c, d, h) + o * r->y_step;
        if (p->taps.at)
            r->taps = FC_NAME(fc_pool_taps_at)(p, t->n, c) +
                      ((d * p->out_size[1] + h) * p->out_size[2] + o) * p->channels;
        if (p->indices.at)
            r->indices = (int64_t *)p->indices.at + t->n * s[0] + c * s[1] + d * s[2] + h * s[3] + o * s[4];
        r->rows[0] = depth->count[d];
        r->rows[1] = height->count[h];
        r->index = (depth->first[d] * p->in_size[1] + height->first[h]) * p->in_size[2] + r->column;
        r->extent = (double)(depth->extent[d] * height->extent[h]);
        if (writes_wide) {
            const int64_t last_d = depth->first[d] + (depth->count[d] - 1) * depth->step;
            const int64_t last_h = height->first[h] + (height->count[h] - 1) * height->step;
            zeroed = zero_rows(p, t->n, c, r->channels, zeroed, last_d * p->in_size[1] + last_h + 1);
        }
        kernel(r);
    }
    if (writes_wide) zero_rows(p, t->n, c, r->channels, zeroed, p->in_size[0] * p->in_size[1]);
}

/* Whether the task is the means of whole planes without gaps, which merge_axes has made lines, neither short nor so long
 * that their sums need several parts, or the gradient of these. */
static int is_means_of_lines(const fc_kernels *k, const fc_pool *p) {
    return (p->op == FC_SUM_POOL || (p->op == FC_SUM_POOL_GRAD && !p->x.at)) && p->power == 1 &&
           volume(p->out_size) == 1 && volume(p->in_size) == p->in_size[2] && is_global(p, 2) &&
           p->wide.stride[4] == 1 && p->in_size[2] >= k->vl && p->in_size[2] <= 80 * k->vl;
}

/* Calls the row kernel for every output row of the task; a rows kernel for each channel and cache-sized line. */
static void run_rows(const fc_kernels *k, const fc_pool *p, const pool_task *t, void (*kernel)(const fc_pool_row *),
                     void *workspace) {
    const fc_windows *depth = &p->windows[0], *height = &p->windows[1];
    fc_pool_row r = {
        .wide_step = p->wide.stride[4],
        .wide_row = {depth->step * p->wide.stride[2], height->step * p->wide.stride[3]},
        .x_step = p->x.stride[4],
        .x_row = {depth->step * p->x.stride[2], height->step * p->x.stride[3]},
        .narrow_step = p->narrow.stride[4],
        .y_step = p->y.stride[4],
        .indices_step = p->indices.stride[4],
        .channels = p->by_channels ? t->channels : 1,
        .columns = p->in_size[2],
        .outputs = p->out_size[2],
        .taps_step = p->channels,
        .tap_row = {p->taps.count[1] * p->taps.count[2], p->taps.count[2]},
        .index_row = {depth->step * p->in_size[1] * p->in_size[2], height->step * p->in_size[2]},
        .windows = p->windows[2],
        .volume = p->volume,
        .divisor = p->divisor,
        .apart = p->apart,
        .power = (real)p->power,
    };
    if (p->by_channels) {
        cut_outputs(p, t->column, t->column_end, &r);
        run_lines(p, t, t->c, t->column, &r, kernel);
        return;
    }
    if (is_means_of_lines(k, p)) {
        const fc_windows *w = p->windows;
        const double extent = (double)(w[0].extent[0] * w[1].extent[0] * w[2].extent[0]);
        const real divisor = (real)(p->divisor != 0 ? p->divisor : extent / p->volume);
        real *wide = real_at(&p->wide, t->n, t->c, 0, 0), *narrow = real_at(&p->narrow, t->n, t->c, 0, 0);
        if (p->op == FC_SUM_POOL)
            k->pool_sum_lines(wide, p->wide.stride[1], t->channels, p->in_size[2], divisor, narrow,
                              p->narrow.stride[1]);
        else
            k->pool_spread_lines(narrow, p->narrow.stride[1], t->channels, divisor, wide, p->wide.stride[1],
                                 p->in_size[2]);
        return;
    }
    char *memory = workspace;
    r.buffer = take(&memory, buffer_bytes(p));
    r.buffer_rows = take(&memory, rows_bytes(p));
    if (is_forward(p) && !p->indices.at) {
        r.line_wide = height->run_step * p->wide.stride[3];
        r.line_narrow = p->narrow.stride[3];
    }
    for (int64_t c = t->c; c < t->c + t->channels; c++)
        for (int64_t o = 0, end; o < p->out_size[2]; o = end) {
            end = cut_line(p, o, &r);
            run_lines(p, t, c, o, &r, kernel);
        }
}

/* dx *= x^(power - 1), the inner derivative of Lp. */
static void lp_inner(const fc_pool *p, const pool_task *t) {
    const real q = (real)(p->power - 1);
    const int outer_axis = p->by_channels ? 4 : 1, inner_axis = p->by_channels ? 1 : 4;
    const int64_t outer = p->by_channels ? p->in_size[2] : t->channels;
    const int64_t inner = p->by_channels ? t->channels : p->in_size[2];
    const int64_t dx_stride = p->wide.stride[inner_axis], x_stride = p->x.stride[inner_axis];
    for (int64_t d = 0; d < p->in_size[0]; d++)
        for (int64_t h = 0; h < p->in_size[1]; h++)
            for (int64_t i = 0; i < outer; i++) {
                real *dx = real_at(&p->wide, t->n, t->c, d, h) + i * p->wide.stride[outer_axis];
                const real *x = real_at(&p->x, t->n, t->c, d, h) + i * p->x.stride[outer_axis];
                for (int64_t j = 0; j < inner; j++)
                    dx[j * dx_stride] *= q == 1 ? x[j * x_stride] : POWER(x[j * x_stride], q);
            }
}

/* ---- By index ------------------------------------------------------------------------------------------------- */

typedef struct {
    const int64_t *indices;
    real *narrow, *wide;
    int64_t outer, inner; /* columns and channels, or 1 and columns */
} index_block;

/* The largest index of a block; as unsigned numbers, negative ones are larger than all. */
static uint64_t last_index(const fc_pool *p, const index_block *b) {
    const int64_t inner = p->indices.stride[p->by_channels ? 1 : 4], outer = p->indices.stride[4];
    uint64_t last = 0;
    for (int64_t i = 0; i < b->outer; i++)
        for (int64_t j = 0; j < b->inner; j++) {
            const uint64_t at = (uint64_t)b->indices[i * outer + j * inner];
            if (at > last) last = at;
        }
    return last;
}

/* Whether the plane is one line of stride stride[4], and the inner axis of narrow and indices has stride 1. */
static int is_simple(const fc_pool *p) {
    const int64_t *in = p->in_size, *s = p->wide.stride;
    const int inner = p->by_channels ? 1 : 4;
    return (in[1] == 1 || s[3] == in[2] * s[4]) && (in[0] == 1 || s[2] == in[1] * in[2] * s[4]) &&
           p->narrow.stride[inner] == 1 && p->indices.stride[inner] == 1;
}

/* For every narrow element of a block, in order, what `op` does with the wide element that its index names. */
static inline __attribute__((always_inline)) void move_block(const fc_pool *p, const index_block *b, int op,
                                                             int simple) {
    const int64_t *in = p->in_size, *s = p->wide.stride;
    const int axis = p->by_channels ? 1 : 4;
    const int64_t narrow_inner = simple ? 1 : p->narrow.stride[axis],
                  index_inner = simple ? 1 : p->indices.stride[axis];
    const int64_t wide_inner = p->by_channels ? s[1] : 0, column = s[4];
    for (int64_t i = 0; i < b->outer; i++) {
        real *narrow = b->narrow + i * p->narrow.stride[4];
        const int64_t *indices = b->indices + i * p->indices.stride[4];
        for (int64_t j = 0; j < b->inner; j++) {
            const int64_t at = indices[j * index_inner];
            int64_t offset = at * column;
            if (!simple) offset = at / (in[1] * in[2]) * s[2] + at / in[2] % in[1] * s[3] + at % in[2] * column;
            real *there = b->wide + j * wide_inner + offset, *here = narrow + j * narrow_inner;
            if (op == FC_MAX_POOL_GRAD)
                *there += *here;
            else if (op == FC_MAX_UNPOOL)
                *there = *here;
            else
                *here = *there;
        }
    }
}

static inline __attribute__((always_inline)) int by_index(const fc_pool *p, const pool_task *t, int op) {
    const int64_t *s = p->indices.stride, rows = p->in_size[0] * p->in_size[1];
    const uint64_t plane = (uint64_t)volume(p->in_size);
    const int64_t channels = p->by_channels ? t->channels : 1, writes_wide = op != FC_MAX_UNPOOL_GRAD;
    const int simple = is_simple(p);
    for (int64_t c = t->c; c < t->c + t->channels; c += channels) {
        int64_t zeroed = 0;
        for (int64_t d = 0; d < p->out_size[0]; d++)
            for (int64_t h = 0; h < p->out_size[1]; h++) {
                const index_block b = {
                    .indices = (int64_t *)p->indices.at + t->n * s[0] + c * s[1] + d * s[2] + h * s[3],
                    .narrow = real_at(&p->narrow, t->n, c, d, h),
                    .wide = real_at(&p->wide, t->n, c, 0, 0),
                    .outer = p->by_channels ? p->out_size[2] : 1,
                    .inner = p->by_channels ? channels : p->out_size[2],
                };
                const uint64_t last = last_index(p, &b);
                if (last >= plane) return FC_POOL_INDEX_OUT_OF_RANGE;
                if (writes_wide) zeroed = zero_rows(p, t->n, c, channels, zeroed, (int64_t)last / p->in_size[2] + 1);
                if (simple)
                    move_block(p, &b, op, 1);
                else
                    move_block(p, &b, op, 0);
            }
        if (writes_wide) zero_rows(p, t->n, c, channels, zeroed, rows);
    }
    return FC_POOL_OK;
}

/* ---- Planes as lanes -------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t n, c, planes;
    int64_t from[2], pixels[2]; /* of a plane: first one and how many, of the wide and the narrow arrays */
} plane_block;

/* The view of a copy, [pixel][vl] from the block's first pixel on, and the copy if the array is read. */
static fc_view planes_in(const fc_kernels *k, const plane_block *b, int narrow, const fc_view *v, const int64_t size[3],
                         int read, char **workspace) {
    const int64_t row = size[2] * k->vl, from = b->from[narrow], pixels = b->pixels[narrow];
    real *copy = take(workspace, pixels * k->vl * (int64_t)sizeof(real));
    if (read) k->channels_in(real_at(v, b->n, b->c, 0, 0) + from, v->stride[1], 1, b->planes, pixels, copy, k->vl);
    return (fc_view){copy - from * k->vl, {0, 1, size[1] * row, row, k->vl}};
}

static void planes_out(const fc_kernels *k, const plane_block *b, int narrow, const fc_view *copy, const fc_view *v) {
    const int64_t from = b->from[narrow];
    k->channels_out((const real *)copy->at + from * k->vl, k->vl, b->planes, b->pixels[narrow],
                    real_at(v, b->n, b->c, 0, 0) + from, v->stride[1], 1);
}

/* A task by planes: those of a vector are the channels of a pool of their own. */
static void run_planes(const fc_kernels *k, const fc_pool *p, int64_t task, void (*kernel)(const fc_pool_row *),
                       char *workspace) {
    const int axis = p->band_axis;
    const int64_t from = task % p->bands * p->band, to = min64(from + p->band, p->out_size[axis]);
    const int64_t block = task / p->bands, inner = volume(p->in_size) / p->in_size[axis];
    const int64_t inner_out = volume(p->out_size) / p->out_size[axis];
    int64_t low = 0, high = p->in_size[axis];
    if (is_forward(p)) inputs_under(&p->windows[axis], from, to, &low, &high);
    plane_block b = {.n = p->images_together ? 0 : block / p->plane_blocks,
                     .c = block % p->plane_blocks * k->vl,
                     .from = {low * inner, from * inner_out},
                     .pixels = {(high - low) * inner, (to - from) * inner_out}};
    b.planes = min64(k->vl, p->planes - b.c);

    fc_pool q = *p;
    q.by_channels = 1, q.channels = k->vl;
    if (p->taps.at) q.taps.at = FC_NAME(fc_pool_taps_at)(p, b.n, b.c), q.taps.lanes = 0;
    q.wide = planes_in(k, &b, 0, &p->wide, p->in_size, is_forward(p), &workspace);
    q.narrow = planes_in(k, &b, 1, &p->narrow, p->out_size, !is_forward(p), &workspace);
    if (p->x.at) q.x = planes_in(k, &b, 0, &p->x, p->in_size, 1, &workspace);
    if (p->y.at) q.y = planes_in(k, &b, 1, &p->y, p->out_size, 1, &workspace);
    const int64_t rows = axis == 0 ? p->out_size[1] : 1;
    const pool_task t = {.channels = k->vl, .row = from * rows, .row_end = to * rows, .column_end = p->out_size[2]};
    run_rows(k, &q, &t, kernel, NULL);
    if (p->op == FC_SUM_POOL_GRAD && p->x.at) lp_inner(&q, &t);
    planes_out(k, &b, is_forward(p), is_forward(p) ? &q.narrow : &q.wide, is_forward(p) ? &p->narrow : &p->wide);
}

/* ---- Run ------------------------------------------------------------------------------------------------------ */

int FC_NAME(fc_pool_run)(const void *kernels, const fc_pool *p, void *workspace, int64_t task) {
    const fc_kernels *k = kernels;
    if (p->op == FC_MAX_POOL_TAPS_GRAD) {
        FC_NAME(fc_pool_run_taps)(p, task);
        return FC_POOL_OK;
    }
    if (p->by_planes) {
        run_planes(k, p, task,
                   p->op == FC_MAX_POOL        ? k->pool_max_channels
                   : p->op == FC_SUM_POOL      ? k->pool_sum_channels
                   : p->op == FC_SUM_POOL_GRAD ? k->pool_spread_channels
                                               : k->pool_max_spread_channels,
                   workspace);
        return FC_POOL_OK;
    }
    const pool_task t = task_of(p, task);
    if (volume(p->out_size) == 0) {
        if (!is_forward(p) && p->op != FC_MAX_UNPOOL_GRAD)
            zero_rows(p, t.n, t.c, t.channels, 0, p->in_size[0] * p->in_size[1]);
        return FC_POOL_OK;
    }
    switch (p->op) {
    case FC_MAX_POOL: run_rows(k, p, &t, p->by_channels ? k->pool_max_channels : k->pool_max_rows, workspace); break;
    case FC_SUM_POOL: run_rows(k, p, &t, p->by_channels ? k->pool_sum_channels : k->pool_sum_rows, workspace); break;
    case FC_SUM_POOL_GRAD:
        run_rows(k, p, &t, p->by_channels ? k->pool_spread_channels : k->pool_spread_rows, workspace);
        if (p->x.at) lp_inner(p, &t);
        break;
    case FC_MAX_POOL_INPUT_GRAD:
        run_rows(k, p, &t, p->by_channels ? k->pool_max_spread_channels : k->pool_max_spread_rows, workspace);
        break;
    case FC_MAX_POOL_GRAD: return by_index(p, &t, FC_MAX_POOL_GRAD);
    case FC_MAX_UNPOOL: return by_index(p, &t, FC_MAX_UNPOOL);
    default: return by_index(p, &t, FC_MAX_UNPOOL_GRAD);
    }
    return FC_POOL_OK;
}
