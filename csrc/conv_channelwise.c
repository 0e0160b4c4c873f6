/* Convolution in groups of few channels and its data gradient; see fc_channelwise in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "fastconv.h"
#include "kernels.h"

/* Multiply-adds worth a task; bytes of a transposed block that stay near, of a padded copy that stays in L1; pixels of a row
 * that are taken at a time; columns with which depthwise_edges fills enough lanes. */
enum { TASK_MACS = 128 * 1024, NEAR = 96 * 1024, HELD = 24 * 1024, SEGMENT = FC_EDGE_COLUMNS, EDGE_COLUMNS_LEAST = 5 };

/* The taps as a box: counts and distances along each axis, all ascending. */
static void find_box(fc_channelwise *p) {
    const fc_lattice *l = &p->l;
    int64_t below = 1; /* taps between neighbours along the axis */
    for (int a = 2; a >= 0; a--) {
        int64_t n = 1;
        while (below * n < l->taps && (a == 0 || l->tap_at[3 * below * n + a - 1] == l->tap_at[a - 1]) &&
               (a < 2 || l->tap_at[3 * n] == l->tap_at[0]))
            n++;
        const int64_t *last = l->tap_at + 3 * below * (n - 1);
        const int64_t distance = n > 1 ? l->tap_at[3 * below + a] - l->tap_at[a] : 1;
        p->count[a] = n;
        p->flipped[a] = distance < 0;
        p->spacing[a] = distance < 0 ? -distance : distance;
        p->first[a] = distance < 0 ? last[a] : l->tap_at[a];
        p->extent[a] = (n - 1) * p->spacing[a] + 1;
        below *= n;
    }
}

/* Whether depthwise_edges computes it. */
static int has_edges(const fc_channelwise *p) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    return k->edge_rows && !p->picked && l->out_size[1] >= k->edge_rows && l->out_size[2] >= EDGE_COLUMNS_LEAST &&
           l->step[1] == 1 && l->step[2] == 1 && p->count[1] == 3 && p->count[2] == 3 && p->spacing[1] == 1 &&
           p->spacing[2] == 1 && l->in_stride[4] == 1 && l->out_stride[4] == 1;
}

/* Tasks of whole planes, or of bands of at least edge_rows rows. */
static void block_edges(fc_channelwise *p) {
    const fc_lattice *l = &p->l;
    const int64_t rows = l->out_size[1], of_row = max64(l->out_size[0], 1) * p->columns * l->taps;
    const int64_t least = ((const fc_kernels *)l->kernels)->edge_rows;
    p->bands = max64(rows / max64(ceil_div(TASK_MACS, of_row), least), 1);
    while (p->bands > 1 && rows - (p->bands - 1) * ceil_div(rows, p->bands) < least) p->bands--;
    p->band = ceil_div(rows, p->bands);
    p->channels = even_piece(l->groups, min64(max64(TASK_MACS / (of_row * p->band), 1), l->groups));
    p->tasks = l->batch * p->bands * p->segments * ceil_div(l->groups, p->channels);
}

void FC_NAME(fc_channelwise_block)(fc_channelwise *p) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t real_bytes = (int64_t)sizeof(real), *out = l->out_size;
    find_box(p);
    p->picked = l->in_channels > 1 || l->out_channels > 1;
    p->block_groups = max64(1, min64(k->vl / max64(l->in_channels, l->out_channels), l->groups));
    p->blocks = ceil_div(l->groups, p->block_groups);
    p->pack_tasks = p->blocks;
    p->packed_bytes = p->blocks * l->taps * l->in_channels * k->vl * real_bytes;

    p->edges = has_edges(p);
    if (l->in_stride[1] == 1 && l->out_stride[1] == 1 && l->groups * min64(l->in_channels, l->out_channels) >= k->vl)
        p->form = FC_BY_CHANNELS;
    else if (p->edges || (!p->picked && (out[2] * l->step[2] > k->vl || l->groups < k->vl))) /* else lanes are empty */
        p->form = FC_BY_PIXELS;
    else
        p->form = FC_BY_BLOCKS;

    p->columns = max64(out[2], 1);
    p->zeros = 0;
    int64_t bytes = 0;
    if (p->form == FC_BY_PIXELS) {
        p->columns = min64(p->columns, SEGMENT);
        p->segments = ceil_div(out[2], p->columns);
    }
    if (p->form == FC_BY_PIXELS && p->edges) {
        block_edges(p);
        bytes = align64(p->count[0] * (int64_t)sizeof(real *));
    } else if (p->form == FC_BY_PIXELS) {
        p->slots = min64(p->extent[0], max64(l->in_size[0], 1));
        /* Rows are read and written in whole vectors, and what is read behind a row is not used. */
        const int64_t step = l->step[2], lead = max64(-p->first[2], 0);
        const int64_t held = min64((p->columns - 1) * step + p->extent[2], l->in_size[2]);
        const int64_t written = step == 1 ? align_to(lead, k->vl) + align_to(held, k->vl)
                                          : (lead + align_to(held, 2 * k->vl)) / step + 2;
        p->deal = align_to(max64(k->vl + p->columns + (p->extent[2] - 1) / step, written), k->vl);
        p->row = p->deal * step;
        /* As many rows as stay in L1. */
        const int64_t rows = max64(out[1], 1), fit = HELD / (p->slots * p->row * real_bytes);
        p->bands = ceil_div(rows, min64(max64((fit - p->extent[1]) / l->step[1] + 1, 7), rows));
        p->band = ceil_div(rows, p->bands);
        p->slice = ((p->band - 1) * l->step[1] + p->extent[1] + 1) * p->row;
        p->pads_depth = p->first[0] < 0 || (out[0] - 1) * l->step[0] + p->first[0] + p->extent[0] > l->in_size[0];
        p->in_place = step == 1 && l->in_stride[4] == 1 && !p->pads_depth;
        const int64_t macs = max64(out[0] * p->band * p->columns * l->taps, 1);
        p->channels = even_piece(l->groups, min64(max64(4 * TASK_MACS / macs, 1), l->groups));
        p->channels = ceil_div(l->groups, ceil_div(l->groups, p->channels));
        p->together = max64(1, min64(p->channels, HELD / 2 / (p->slots * p->slice * real_bytes)));
        bytes = align64((p->together * p->slots + p->pads_depth + 1) * p->slice * real_bytes) +
                align64(p->count[0] * (int64_t)sizeof(real *)) +
                align64(p->together * p->slots * (int64_t)sizeof(int64_t)) +
                align64(p->count[2] * (int64_t)sizeof(int64_t));
        p->tasks = l->batch * p->bands * p->segments * ceil_div(l->groups, p->channels);
    } else {
        const int64_t channels = p->form == FC_BY_CHANNELS ? l->groups * l->out_channels : k->vl;
        const int64_t macs = channels * l->taps * l->in_channels; /* of a pixel */
        int64_t pixels = max64(TASK_MACS / macs, 16);
        if (p->form == FC_BY_BLOCKS) {
            const int64_t held = p->count[0] * l->step[1] * l->step[2] + 1; /* pixels that an output pixel needs */
            pixels = max64(NEAR / (held * k->vl * real_bytes), 16);
        }
        /* Two rows at a time share their inputs; long rows are cut. */
        const int64_t rows = max64(out[1], 1);
        p->band = min64(max64(pixels / p->columns, 1), rows);
        p->bands = ceil_div(rows, p->band);
        p->band = min64(ceil_div(ceil_div(rows, p->bands), 2) * 2, rows);
        p->bands = ceil_div(rows, p->band);
        if (p->band <= 2) p->columns = min64(p->columns, max64(ceil_div(pixels, 2 * p->band) * 2, 64));
        p->segments = ceil_div(max64(out[2], 1), p->columns);
        p->zeros = max64(l->groups * l->in_channels, k->vl);
        bytes = align64(p->zeros * real_bytes) + align64(l->taps * 2 * (int64_t)sizeof(fc_line)) +
                align64(k->vl * (int64_t)sizeof(lane));
        p->tasks = l->batch * p->bands * p->segments * out[0];
        if (p->form == FC_BY_BLOCKS) {
            p->tasks *= p->blocks;
            p->held[0] = min64((p->band - 1) * l->step[1] + p->extent[1], l->in_size[1]);
            p->held[1] = min64((p->columns - 1) * l->step[2] + p->extent[2], l->in_size[2]);
            p->slice = p->held[0] * p->held[1] * k->vl;
            bytes += align64(p->count[0] * p->slice * real_bytes) + align64(p->band * p->columns * k->vl * real_bytes);
        }
    }
    p->workspace_bytes = bytes;
}

/* The tap of the lattice that is number i of the ascending box. */
static int64_t tap_of(const fc_channelwise *p, int64_t i) {
    const int64_t at[3] = {i / (p->count[1] * p->count[2]), i / p->count[2] % p->count[1], i % p->count[2]};
    int64_t tap = 0;
    for (int a = 0; a < 3; a++) tap = tap * p->count[a] + (p->flipped[a] ? p->count[a] - 1 - at[a] : at[a]);
    return tap;
}

/* w[block][tap row][channel of the group][tap][lane]; by pixels w[channel][tap] */
void FC_NAME(fc_channelwise_pack)(const fc_channelwise *p, const void *w_, void *packed_, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t vl = ((const fc_kernels *)l->kernels)->vl, lanes = p->block_groups * l->out_channels;
    const int64_t group = min64(task * p->block_groups, l->groups - p->block_groups);
    const real *w = w_;
    if (p->form == FC_BY_PIXELS) {
        const int64_t from = task * p->block_groups, to = min64(from + p->block_groups, l->groups);
        for (int64_t i = 0; i < l->taps; i++) {
            const real *of_tap = w + l->tap_w[tap_of(p, i)];
            for (int64_t c = from; c < to; c++) ((real *)packed_)[c * l->taps + i] = of_tap[c * l->w_stride[0]];
        }
        return;
    }
    real *to = (real *)packed_ + task * vl * l->taps * l->in_channels;
    for (int64_t row = 0; row < p->count[0] * p->count[1]; row++)
        for (int64_t c = 0; c < l->in_channels; c++)
            for (int64_t t = 0; t < p->count[2]; t++) {
                const int64_t tap = tap_of(p, row * p->count[2] + t);
                for (int64_t i = 0; i < vl; i++)
                    *to++ = i < lanes ? w[(group + i / l->out_channels) * l->w_stride[0] +
                                          i % l->out_channels * l->w_stride[1] + c * l->w_stride[2] + l->tap_w[tap]]
                                      : 0;
            }
}

/* Where the input of a task lies: rows and columns from `at` on, in slices for each tap plane (or, with `planes`, of the
 * whole input). */
typedef struct {
    const real *in;
    int64_t slice, row, pixel; /* distances */
    int64_t row_at, row_end, column_at, columns;
    int planes;
} source;

/* Output columns [from, to) of the rows [h, h_end) of slice d; out is the element of row h, column from. */
static void run_rows(const fc_channelwise *p, const source *s, fc_depthwise *g, fc_line *lines, int64_t d, int64_t h,
                     int64_t h_end, int64_t from, int64_t to, real *out, int64_t out_row, int64_t out_pixel) {
    const fc_lattice *l = &p->l;
    /* With step 1, every spacing-th output is a convolution without gaps. */
    const int64_t gaps = l->step[2] == 1 && p->count[2] > 1 ? p->spacing[2] : 1;
    /* Rows that share inputs are next to each other, or as far apart as the taps. */
    const int64_t spacing = p->count[1] > 1 ? p->spacing[1] : 1, step = l->step[1];
    const int64_t apart = spacing % step == 0 ? spacing / step : 1;
    const int pairs = apart * step % spacing == 0 && apart * step / spacing <= p->count[1];
    g->lines = lines;
    g->slices = p->count[0], g->height = p->count[1], g->width = p->count[2];
    g->step = l->step[2], g->spacing = p->spacing[2] / gaps;
    g->out_step = out_pixel * gaps;
    g->below = apart * step / spacing;
    for (int64_t i = 0; i < h_end - h; i++) {
        g->second = 0;
        if (pairs && i / apart % 2) continue; /* was the second of a pair */
        g->second = pairs && h + i + apart < h_end;
        real *row = out + i * out_row;
        for (int64_t residue = 0; residue < min64(gaps, to - from); residue++) {
            const int64_t lead = from * l->step[2] + residue + p->first[2] - s->column_at;
            const int64_t base = gaps == 1 ? 0 : ((lead % gaps) + gaps) % gaps;
            g->first = (lead - base) / gaps;
            g->columns = s->columns > base ? ceil_div(s->columns - base, gaps) : 0;
            g->from = 0, g->to = ceil_div(to - from - residue, gaps);
            g->out[0] = row + residue * out_pixel;
            g->out[1] = g->out[0] + apart * out_row;
            fc_line *line = lines;
            for (int64_t k = 0; k < p->count[0]; k++) {
                const int64_t z = d * l->step[0] + p->first[0] + k * p->spacing[0];
                for (int64_t j = 0; j < p->count[1] + (g->second ? g->below : 0); j++, line++) {
                    const int64_t y = (h + i) * step + p->first[1] + j * spacing;
                    if (z >= 0 && z < l->in_size[0] && y >= s->row_at && y < s->row_end)
                        *line = (fc_line){s->in + (s->planes ? z : k) * s->slice + (y - s->row_at) * s->row +
                                              base * s->pixel,
                                          s->pixel * gaps};
                    else
                        *line = (fc_line){g->zeros, 0};
                }
            }
            ((const fc_kernels *)l->kernels)->depthwise_channels(g);
        }
    }
}

/* One block, rows [h, h_end) of slice d, columns [from, to): input and output by way of [pixel][vl]. */
static void run_block(const fc_channelwise *p, const real *in, fc_depthwise *g, fc_line *lines, char *workspace,
                      int64_t block, int64_t d, int64_t h, int64_t h_end, int64_t from, int64_t to, real *out) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    real *held = take(&workspace, p->count[0] * p->slice * (int64_t)sizeof(real));
    real *result = take(&workspace, p->band * p->columns * k->vl * (int64_t)sizeof(real));
    const int64_t group = min64(block * p->block_groups, l->groups - p->block_groups);
    source s = {.in = held, .slice = p->slice, .pixel = k->vl};
    s.row_at = max64(h * l->step[1] + p->first[1], 0);
    s.row_end = min64((h_end - 1) * l->step[1] + p->first[1] + p->extent[1], l->in_size[1]);
    s.column_at = max64(from * l->step[2] + p->first[2], 0);
    s.columns = max64(min64((to - 1) * l->step[2] + p->first[2] + p->extent[2], l->in_size[2]) - s.column_at, 0);
    s.row = s.columns * k->vl;

    const int64_t channels = p->block_groups * l->in_channels, rows = max64(s.row_end - s.row_at, 0);
    const int64_t *is = l->in_stride, *os = l->out_stride;
    const int in_flat = is[3] == s.columns * is[4];
    for (int64_t i = 0; i < p->count[0]; i++) {
        const int64_t z = d * l->step[0] + p->first[0] + i * p->spacing[0];
        if (z < 0 || z >= l->in_size[0]) continue;
        const real *plane = in + group * l->in_channels * is[1] + z * is[2] + s.row_at * is[3] + s.column_at * is[4];
        if (in_flat)
            k->channels_in(plane, is[1], is[4], channels, rows * s.columns, held + i * p->slice, k->vl);
        else
            for (int64_t y = 0; y < rows; y++)
                k->channels_in(plane + y * is[3], is[1], is[4], channels, s.columns, held + i * p->slice + y * s.row,
                               k->vl);
    }
    const int64_t width = to - from, lanes = p->block_groups * l->out_channels;
    run_rows(p, &s, g, lines, d, h, h_end, from, to, result, width * k->vl, k->vl);
    real *plane = out + group * l->out_channels * os[1] + d * os[2] + h * os[3] + from * os[4];
    if (os[3] == width * os[4])
        k->channels_out(result, k->vl, lanes, (h_end - h) * width, plane, os[1], os[4]);
    else
        for (int64_t y = 0; y < h_end - h; y++)
            k->channels_out(result + y * width * k->vl, k->vl, lanes, width, plane + y * os[3], os[1], os[4]);
}

/* One image: a band of rows of one slice, a segment of their columns, and all channels or one block of them. */
static void run_lanes(const fc_channelwise *p, const real *in, const real *packed, const real *bias, real *out,
                      char *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t segment = task % p->segments, band = task / p->segments % p->bands;
    const int64_t d = task / p->segments / p->bands % l->out_size[0],
                  block = task / p->segments / p->bands / l->out_size[0];
    const int64_t h = band * p->band, h_end = min64(h + p->band, l->out_size[1]);
    const int64_t from = segment * p->columns, to = min64(from + p->columns, l->out_size[2]);

    real *zeros = take(&workspace, p->zeros * (int64_t)sizeof(real));
    fc_line *lines = take(&workspace, l->taps * 2 * (int64_t)sizeof(fc_line));
    lane *pick = take(&workspace, k->vl * (int64_t)sizeof(lane));
    memset(zeros, 0, (size_t)p->zeros * sizeof(real));
    for (int i = 0; i < k->vl && p->picked; i++)
        pick[i] = i < p->block_groups * l->out_channels ? (lane)(i / l->out_channels * l->in_channels) : 0;
    fc_depthwise g = {.groups = l->groups,
                      .group = l->in_channels,
                      .group_out = l->out_channels,
                      .in_channels = l->groups * l->in_channels,
                      .out_channels = l->groups * l->out_channels,
                      .out_lanes = p->block_groups * l->out_channels,
                      .block_end = p->blocks,
                      .block_groups = p->block_groups,
                      .zeros = zeros,
                      .pick = p->picked ? pick : NULL,
                      .w = packed,
                      .bias = bias,
                      .relu = p->relu};
    if (p->form == FC_BY_CHANNELS) {
        const int64_t *is = l->in_stride, *os = l->out_stride;
        const source s = {.in = in,
                          .slice = is[2],
                          .row = is[3],
                          .pixel = is[4],
                          .row_end = l->in_size[1],
                          .columns = l->in_size[2],
                          .planes = 1};
        run_rows(p, &s, &g, lines, d, h, h_end, from, to, out + d * os[2] + h * os[3] + from * os[4], os[3], os[4]);
        return;
    }
    /* a block by itself: all of its vectors are whole */
    real own_bias[64];
    if (bias) {
        const int64_t group = min64(block * p->block_groups, l->groups - p->block_groups);
        for (int64_t i = 0; i < k->vl; i++) own_bias[i] = i < g.out_lanes ? bias[group * l->out_channels + i] : 0;
        g.bias = own_bias;
    }
    g.w = packed + block * k->vl * l->taps * l->in_channels;
    g.groups = g.block_groups, g.block_end = 1;
    g.in_channels = g.out_channels = g.out_lanes = k->vl;
    run_block(p, in, &g, lines, workspace, block, d, h, h_end, from, to, out);
}

/* Output columns [from, to) of rows [h, h_end), channels [c, c_end): what a task by pixels computes of an image. */
typedef struct {
    int64_t from, to, h, h_end, c, c_end;
} piece;

static piece piece_of(const fc_channelwise *p, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t from = task % p->segments * p->columns, h = task / p->segments % p->bands * p->band;
    const int64_t c = task / p->segments / p->bands * p->channels;
    return (piece){from, min64(from + p->columns, l->out_size[2]), h, min64(h + p->band, l->out_size[1]),
                   c,    min64(c + p->channels, l->groups)};
}

/* The task in place. */
static void run_edges(const fc_channelwise *p, const real *in, const real *packed, const real *bias, real *out,
                      char *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t *is = l->in_stride, *os = l->out_stride;
    const piece o = piece_of(p, task);
    const real **slices = take(&workspace, p->count[0] * (int64_t)sizeof(real *));
    fc_depthwise_edges g = {.slices = slices,
                            .n_slices = p->count[0],
                            .planes = o.c_end - o.c,
                            .rows = l->in_size[1],
                            .columns = l->in_size[2],
                            .in_row = is[3],
                            .in_plane = is[1],
                            .row = o.h + p->first[1],
                            .column = o.from + p->first[2],
                            .out_rows = o.h_end - o.h,
                            .out_columns = o.to - o.from,
                            .out_row = os[3],
                            .out_plane = os[1],
                            .w = packed + o.c * l->taps,
                            .bias = bias ? bias + o.c : NULL,
                            .relu = p->relu};
    for (int64_t d = 0; d < l->out_size[0]; d++) {
        for (int64_t i = 0; i < p->count[0]; i++) {
            const int64_t z = d * l->step[0] + p->first[0] + i * p->spacing[0];
            slices[i] = z >= 0 && z < l->in_size[0] ? in + o.c * is[1] + z * is[2] : NULL;
        }
        g.out = out + o.c * os[1] + d * os[2] + o.h * os[3] + o.from;
        k->depthwise_edges(&g);
    }
}

/* The task, each channel by way of a padded copy. */
static void run_pixels(const fc_channelwise *p, const real *in, const real *packed, const real *bias, real *out,
                       char *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t *is = l->in_stride, *os = l->out_stride;
    const piece o = piece_of(p, task);
    const int64_t from = o.from, to = o.to, h = o.h, h_end = o.h_end;

    /* The rows and columns that are copied, counted from the first tap of the first output. */
    const int64_t lowest[2] = {h * l->step[1] + p->first[1], from * l->step[2] + p->first[2]};
    const int64_t row_at = max64(lowest[0], 0), column_at = max64(lowest[1], 0);
    const int64_t rows = min64((h_end - 1) * l->step[1] + p->first[1] + p->extent[1], l->in_size[1]) - row_at;
    const int64_t columns = min64((to - 1) * l->step[2] + p->first[2] + p->extent[2], l->in_size[2]) - column_at;
    fc_pad copy = {.row_stride = is[3],
                   .x_stride = is[4],
                   .rows = columns > 0 ? rows : 0,
                   .width = columns,
                   .to_row = p->row,
                   .lead = column_at - lowest[1],
                   .step = l->step[2],
                   .deal = p->deal};
    /* in one piece, data begins where vectors do */
    const int64_t shift = l->step[2] == 1 ? (k->vl - copy.lead % k->vl) % k->vl : 0;

    real *planes = take(&workspace, (p->together * p->slots + p->pads_depth + 1) * p->slice * (int64_t)sizeof(real));
    const real **slices = take(&workspace, p->count[0] * (int64_t)sizeof(real *));
    int64_t *held = take(&workspace, p->together * p->slots * (int64_t)sizeof(int64_t)); /* the slice in each slot */
    int64_t *offsets = take(&workspace, p->count[2] * (int64_t)sizeof(int64_t));
    /* The padding, which copies leave alone; a slice of nothing else is the last one. */
    memset(planes, 0, (size_t)((p->together * p->slots + p->pads_depth) * p->slice) * sizeof(real));
    real *padding = planes + p->together * p->slots * p->slice + shift;
    for (int64_t t = 0; t < p->count[2]; t++) {
        const int64_t a = t * p->spacing[2];
        offsets[t] = a % l->step[2] * p->deal + a / l->step[2];
    }
    /* With step 1, every spacing-th row is a convolution without gaps. */
    const int64_t gaps = l->step[1] == 1 && p->count[1] > 1 ? p->spacing[1] : 1;
    fc_depthwise_plane g = {.slices = slices,
                            .n_slices = p->count[0],
                            .height = p->count[1],
                            .width = p->count[2],
                            .tap_row = p->spacing[1] * p->row,
                            .next_row = gaps * l->step[1] * p->row,
                            .columns = offsets,
                            .pixels = to - from,
                            .out_row = gaps * os[3],
                            .out_step = os[4],
                            .dense = gaps == 1 && os[4] == 1 && os[3] == to - from,
                            .relu = p->relu};
    const int in_place = p->in_place && to - from >= k->vl && lowest[0] == row_at && lowest[1] == column_at &&
                         rows == (h_end - h - 1) * l->step[1] + p->extent[1] && columns == to - from - 1 + p->extent[2];
    if (in_place) g.tap_row = p->spacing[1] * is[3], g.next_row = gaps * l->step[1] * is[3];
    for (int64_t c = o.c; c < o.c_end; c += p->together) {
        const int64_t together = min64(p->together, o.c_end - c);
        for (int64_t i = 0; i < together * p->slots; i++) held[i] = -1;
        for (int64_t d = 0; d < l->out_size[0]; d++) {
            /* Vectors that are loaded should not be made of several stores that are still on their way: all copies first. */
            for (int64_t n = 0; n < together && !in_place; n++)
                for (int64_t i = 0; i < p->count[0]; i++) {
                    const int64_t z = d * l->step[0] + p->first[0] + i * p->spacing[0];
                    const int64_t slot = n * p->slots + (p->slots > 1 ? z % p->slots : 0);
                    if (z < 0 || z >= l->in_size[0] || held[slot] == z) continue;
                    held[slot] = z;
                    copy.from = in + (c + n) * is[1] + z * is[2] + row_at * is[3] + column_at * is[4];
                    copy.to = planes + slot * p->slice + shift + (row_at - lowest[0]) * p->row;
                    /* up to the last element of the image, if that lies behind */
                    copy.readable = is[1] < 0 || is[2] < 0 || is[3] < 0
                                        ? 0
                                        : (l->groups - 1 - c - n) * is[1] + (l->in_size[0] - 1 - z) * is[2] +
                                              (l->in_size[1] - 1 - row_at) * is[3] + l->in_size[2] - column_at;
                    k->pad_rows(&copy);
                }
            for (int64_t n = 0; n < together; n++) {
                g.w = packed + (c + n) * l->taps;
                g.bias = bias ? bias + c + n : NULL;
                for (int64_t residue = 0; residue < min64(gaps, h_end - h); residue++) {
                    for (int64_t i = 0; i < p->count[0]; i++) {
                        const int64_t z = d * l->step[0] + p->first[0] + i * p->spacing[0];
                        const int64_t slot = n * p->slots + (p->slots > 1 ? z % p->slots : 0);
                        if (in_place)
                            slices[i] = in + (c + n) * is[1] + z * is[2] + (row_at + residue) * is[3] + column_at;
                        else if (z >= 0 && z < l->in_size[0])
                            slices[i] = planes + slot * p->slice + shift + residue * p->row;
                        else
                            slices[i] = padding;
                    }
                    g.rows = ceil_div(h_end - h - residue, gaps);
                    g.out = out + (c + n) * os[1] + d * os[2] + (h + residue) * os[3] + from * os[4];
                    k->depthwise_plane(&g);
                }
            }
        }
    }
}

int FC_NAME(fc_channelwise_run)(const fc_channelwise *p, const void *in_, const void *packed_, const void *bias_,
                                void *out_, void *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t per_image = p->tasks / l->batch, image = task / per_image;
    const real *in = (const real *)in_ + l->in_offset + image * l->in_stride[0];
    const real *bias = bias_, *packed = packed_;
    real *out = (real *)out_ + l->out_offset + image * l->out_stride[0];
    task %= per_image;
    if (p->form == FC_BY_PIXELS && p->edges)
        run_edges(p, in, packed, bias, out, workspace, task);
    else if (p->form == FC_BY_PIXELS)
        run_pixels(p, in, packed, bias, out, workspace, task);
    else
        run_lanes(p, in, packed, bias, out, workspace, task);
    return 1;
}
