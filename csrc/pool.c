/* Pools: blocking, and the operations by index, which no vector serves. */
#include "pool.h"

#include <math.h>
#include <string.h>

#include "blocking.h"
#include "kernels.h"

/* Elements that a task of a forward pass or a sample's channels in a gradient should touch: enough to hide the cost of
 * starting it, few enough to stay in the second-level cache. */
#define TASK_ELEMENTS 32768
/* A gradient with lanes of channels is cut into blocks of channels, whole cache lines, if it has fewer samples. */
#define MIN_TASKS 8
#define CHANNEL_STEP 16
/* Columns that the rows kernels reduce at once, so that they stay in the first-level cache. */
#define LINE 2048
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

static int64_t largest(const int64_t *p, int64_t n) {
    int64_t most = 0;
    for (int64_t i = 0; i < n; i++) most = max64(most, p[i]);
    return most;
}

static int64_t volume(const int64_t size[3]) { return size[0] * size[1] * size[2]; }

static int uses_windows(const fc_pool *p) { return p->op <= FC_SUM_POOL || p->op == FC_SUM_POOL_GRAD; }
static int is_forward(const fc_pool *p) { return p->op == FC_MAX_POOL || p->op == FC_SUM_POOL; }

/* See fc_pool_row; a line has at most LINE outputs. */
static int64_t buffer_bytes(const fc_pool *p) {
    return p->line ? align64((p->line + MAX_LANES + LINE) * (int64_t)sizeof(real)) : 0;
}
static int64_t rows_bytes(const fc_pool *p) {
    return p->line ? align64((p->line + MAX_LANES) * (int64_t)sizeof(real)) : 0;
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

int FC_NAME(fc_pool_block)(fc_pool *p) {
    p->by_channels = p->channels > 1 && has_stride_1(&p->wide) && has_stride_1(&p->narrow) &&
                     has_stride_1(&p->indices) && has_stride_1(&p->x) && has_stride_1(&p->y);
    if (uses_windows(p)) {
        if (!p->by_channels) merge_axes(p);
        for (int i = 0; i < 3; i++) find_run(&p->windows[i], p->out_size[i]);
    }
    const int64_t plane = max64(1, volume(p->in_size)), rows = p->out_size[0] * p->out_size[1];
    p->channel_block = p->channels;
    p->row_block = max64(1, rows);
    if (!p->by_channels)
        p->channel_block = min64(p->channels, max64(1, TASK_ELEMENTS / plane));
    else if (!is_forward(p)) {
        const int64_t block = ceil_div(p->channels, ceil_div(MIN_TASKS, max64(1, p->batch)));
        p->channel_block = ceil_div(block, CHANNEL_STEP) * CHANNEL_STEP;
    }
    if (is_forward(p)) p->row_block = max64(1, rows / max64(1, ceil_div(plane * p->channel_block, TASK_ELEMENTS)));
    p->channel_blocks = ceil_div(p->channels, max64(1, p->channel_block));
    p->row_blocks = is_forward(p) ? ceil_div(rows, p->row_block) : 1;
    p->tasks = p->batch * p->channel_blocks * p->row_blocks;
    p->line = 0;
    if (uses_windows(p) && !p->by_channels)
        p->line = min64(p->in_size[2], max64(LINE, largest(p->windows[2].count, p->out_size[2]) * p->windows[2].step));
    p->workspace_bytes = buffer_bytes(p) + rows_bytes(p);
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
    int64_t n, c, channels, row, row_end;
} pool_task;

static pool_task task_of(const fc_pool *p, int64_t task) {
    const int64_t block = task / p->row_blocks, rows = p->out_size[0] * p->out_size[1];
    pool_task t = {.n = block / p->channel_blocks, .c = block % p->channel_blocks * p->channel_block};
    t.channels = min64(p->channel_block, p->channels - t.c);
    t.row = task % p->row_blocks * p->row_block;
    t.row_end = min64(t.row + p->row_block, rows);
    return t;
}

static real *real_at(const fc_view *v, int64_t n, int64_t c, int64_t d, int64_t h) {
    return (real *)v->at + n * v->stride[0] + c * v->stride[1] + d * v->stride[2] + h * v->stride[3];
}

/* to[c, d, h, w] = 0 for the channels of a task. */
static void fill_zero(const fc_pool *p, const pool_task *t, const fc_view *to) {
    const int64_t lines = p->by_channels ? p->in_size[2] : t->channels;
    const int64_t line_stride = to->stride[p->by_channels ? 4 : 1], stride = to->stride[p->by_channels ? 1 : 4];
    const int64_t n = p->by_channels ? t->channels : p->in_size[2];
    for (int64_t d = 0; d < p->in_size[0]; d++)
        for (int64_t h = 0; h < p->in_size[1]; h++)
            for (int64_t i = 0; i < lines; i++) {
                real *line = real_at(to, t->n, t->c, d, h) + i * line_stride;
                if (stride == 1)
                    memset(line, 0, n * sizeof(real));
                else
                    for (int64_t j = 0; j < n; j++) line[j * stride] = 0;
            }
}

/* Narrows the row to the outputs from `o` on whose windows lie in p->line columns, and returns the first one left. */
static int64_t cut_line(const fc_pool *p, int64_t o, fc_pool_row *r) {
    const fc_windows *w = &p->windows[2];
    int64_t low = w->first[o], high = low, end = o;
    for (; end < p->out_size[2] && end - o < LINE; end++) {
        const int64_t new_low = min64(low, w->first[end]);
        const int64_t new_high = max64(high, w->first[end] + (w->count[end] - 1) * w->step + 1);
        if (end > o && new_high - new_low > p->line) break;
        low = new_low, high = new_high;
    }
    r->windows = (fc_windows){.first = w->first + o,
                              .count = w->count + o,
                              .extent = w->extent + o,
                              .step = w->step,
                              .run = max64(w->run - o, 0),
                              .run_end = min64(w->run_end, end) - o,
                              .run_step = w->run_step};
    r->column = low, r->columns = high - low, r->outputs = end - o;
    return end;
}

/* Calls the kernel for the rows of the task, from output column o on. */
static void run_lines(const fc_pool *p, const pool_task *t, int64_t c, int64_t o, fc_pool_row *r,
                      void (*kernel)(const fc_pool_row *)) {
    const fc_windows *depth = &p->windows[0], *height = &p->windows[1];
    const int64_t *s = p->indices.stride;
    for (int64_t row = t->row; row < t->row_end; row++) {
        const int64_t d = row / p->out_size[1], h = row % p->out_size[1];
        r->wide = real_at(&p->wide, t->n, c, depth->first[d], height->first[h]) + r->column * r->wide_step;
        r->narrow = real_at(&p->narrow, t->n, c, d, h) + o * r->narrow_step;
        if (p->y.at) r->y = real_at(&p->y, t->n, c, d, h) + o * r->y_step;
        if (p->indices.at)
            r->indices = (int64_t *)p->indices.at + t->n * s[0] + c * s[1] + d * s[2] + h * s[3] + o * s[4];
        r->rows[0] = depth->count[d];
        r->rows[1] = height->count[h];
        r->index = (depth->first[d] * p->in_size[1] + height->first[h]) * p->in_size[2] + r->column;
        r->extent = (double)(depth->extent[d] * height->extent[h]);
        kernel(r);
    }
}

/* Calls the row kernel for every output row of the task; a rows kernel for each channel and cache-sized line. */
static void run_rows(const fc_pool *p, const pool_task *t, void (*kernel)(const fc_pool_row *), void *workspace) {
    const fc_windows *depth = &p->windows[0], *height = &p->windows[1];
    fc_pool_row r = {
        .wide_step = p->wide.stride[4],
        .wide_row = {depth->step * p->wide.stride[2], height->step * p->wide.stride[3]},
        .narrow_step = p->narrow.stride[4],
        .y_step = p->y.stride[4],
        .indices_step = p->indices.stride[4],
        .channels = t->channels,
        .columns = p->in_size[2],
        .outputs = p->out_size[2],
        .index_row = {depth->step * p->in_size[1] * p->in_size[2], height->step * p->in_size[2]},
        .windows = p->windows[2],
        .volume = p->volume,
        .divisor = p->divisor,
        .power = (real)p->power,
    };
    if (p->by_channels) {
        run_lines(p, t, t->c, 0, &r, kernel);
        return;
    }
    char *memory = workspace;
    r.buffer = take(&memory, buffer_bytes(p));
    r.buffer_rows = take(&memory, rows_bytes(p));
    for (int64_t c = t->c; c < t->c + t->channels; c++)
        for (int64_t o = 0, end; o < p->out_size[2]; o = end) {
            end = cut_line(p, o, &r);
            run_lines(p, t, c, o, &r, kernel);
        }
}

/* dx *= x^(power - 1), the inner derivative of Lp. */
static void lp_inner(const fc_pool *p, const pool_task *t) {
    const real q = (real)(p->power - 1);
    for (int64_t d = 0; d < p->in_size[0]; d++)
        for (int64_t h = 0; h < p->in_size[1]; h++)
            for (int64_t i = 0; i < t->channels * p->in_size[2]; i++) {
                /* the innermost axis is that of stride 1 */
                const int64_t c = p->by_channels ? i % t->channels : i / p->in_size[2];
                const int64_t w = p->by_channels ? i / t->channels : i % p->in_size[2];
                real *dx = real_at(&p->wide, t->n, t->c + c, d, h) + w * p->wide.stride[4];
                const real x = real_at(&p->x, t->n, t->c + c, d, h)[w * p->x.stride[4]];
                *dx *= q == 1 ? x : POWER(x, q);
            }
}

/* ---- By index ------------------------------------------------------------------------------------------------- */

/* For every narrow element, in row-major order of each channel, what `op` does with the wide element that its index
 * names. */
static inline __attribute__((always_inline)) int by_index(const fc_pool *p, const pool_task *t, int op, int is_line) {
    /* from the outermost axis to the innermost: c d h w, or d h w c */
    static const int orders[2][4] = {{1, 2, 3, 4}, {2, 3, 4, 1}};
    const int *axes = orders[p->by_channels];
    const int64_t *in = p->in_size, *s = p->wide.stride;
    const uint64_t plane = (uint64_t)volume(in);
    int64_t size[4], narrow_stride[4], index_stride[4], wide_stride[4];
    for (int i = 0; i < 4; i++) {
        size[i] = axes[i] == 1 ? t->channels : p->out_size[axes[i] - 2];
        narrow_stride[i] = p->narrow.stride[axes[i]];
        index_stride[i] = p->indices.stride[axes[i]];
        wide_stride[i] = axes[i] == 1 ? s[1] : 0;
    }
    real *wide = real_at(&p->wide, t->n, t->c, 0, 0), *narrow = real_at(&p->narrow, t->n, t->c, 0, 0);
    const int64_t *indices = (int64_t *)p->indices.at + t->n * p->indices.stride[0] + t->c * p->indices.stride[1];
    for (int64_t i = 0; i < size[0]; i++)
        for (int64_t j = 0; j < size[1]; j++)
            for (int64_t k = 0; k < size[2]; k++) {
                real *narrow_line = narrow + i * narrow_stride[0] + j * narrow_stride[1] + k * narrow_stride[2];
                const int64_t *index_line = indices + i * index_stride[0] + j * index_stride[1] + k * index_stride[2];
                real *plane_at = wide + i * wide_stride[0];
                for (int64_t l = 0; l < size[3]; l++) {
                    const int64_t at = index_line[l * index_stride[3]];
                    if ((uint64_t)at >= plane) return FC_POOL_INDEX_OUT_OF_RANGE;
                    const int64_t offset = is_line ? at * s[4]
                                                   : at / (in[1] * in[2]) * s[2] + at / in[2] % in[1] * s[3] +
                                                         at % in[2] * s[4];
                    real *there = plane_at + l * wide_stride[3] + offset, *here = narrow_line + l * narrow_stride[3];
                    if (op == FC_MAX_POOL_GRAD)
                        *there += *here;
                    else if (op == FC_MAX_UNPOOL)
                        *there = *here;
                    else
                        *here = *there;
                }
            }
    return FC_POOL_OK;
}

/* The same, compiled for planes that are one line, whose positions need no division. */
#define BY_INDEX(p, t, op) (is_line(p) ? by_index(p, t, op, 1) : by_index(p, t, op, 0))

static int is_line(const fc_pool *p) {
    const int64_t *in = p->in_size, *s = p->wide.stride;
    return (in[1] == 1 || s[3] == in[2] * s[4]) && (in[0] == 1 || s[2] == in[1] * in[2] * s[4]);
}

/* ---- Run ------------------------------------------------------------------------------------------------------ */

int FC_NAME(fc_pool_run)(const void *kernels, const fc_pool *p, void *workspace, int64_t task) {
    const fc_kernels *k = kernels;
    const pool_task t = task_of(p, task);
    if (!is_forward(p) && p->op != FC_MAX_UNPOOL_GRAD) fill_zero(p, &t, &p->wide);
    switch (p->op) {
    case FC_MAX_POOL: run_rows(p, &t, p->by_channels ? k->pool_max_channels : k->pool_max_rows, workspace); break;
    case FC_SUM_POOL: run_rows(p, &t, p->by_channels ? k->pool_sum_channels : k->pool_sum_rows, workspace); break;
    case FC_SUM_POOL_GRAD:
        run_rows(p, &t, p->by_channels ? k->pool_spread_channels : k->pool_spread_rows, workspace);
        if (p->x.at) lp_inner(p, &t);
        break;
    case FC_MAX_POOL_GRAD: return BY_INDEX(p, &t, FC_MAX_POOL_GRAD);
    case FC_MAX_UNPOOL: return BY_INDEX(p, &t, FC_MAX_UNPOOL);
    default: return BY_INDEX(p, &t, FC_MAX_UNPOOL_GRAD);
    }
    return FC_POOL_OK;
}
