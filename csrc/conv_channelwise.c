/* Convolution in groups of few channels and its data gradient; see fc_channelwise in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "fastconv.h"
#include "kernels.h"

/* Multiply-adds worth a task; bytes of a transposed block that stay near; pixels of a row that are dealt out at a
 * time; the shortest row that is. */
enum { TASK_MACS = 128 * 1024, NEAR = 96 * 1024, SEGMENT = 1024, MIN_DEAL = 16 };

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

    if (l->in_stride[1] == 1 && l->out_stride[1] == 1 && l->groups * min64(l->in_channels, l->out_channels) >= k->vl)
        p->form = FC_BY_CHANNELS;
    else if (!p->picked && (out[2] >= MIN_DEAL * k->vl || l->groups < k->vl))
        p->form = FC_BY_PIXELS;
    else
        p->form = FC_BY_BLOCKS;

    p->columns = max64(out[2], 1);
    p->zeros = 0;
    int64_t bytes = 0;
    if (p->form == FC_BY_PIXELS) {
        const int64_t macs = max64(out[0] * out[1] * out[2] * l->taps, 1);
        p->band = min64(max64(TASK_MACS / macs, 1), l->groups); /* channels of a task */
        p->bands = ceil_div(l->groups, p->band);
        p->segments = 1;
        p->deal = min64(out[2], SEGMENT) + (p->extent[2] - 1) / l->step[2] + 4 * k->vl;
        p->row = p->deal * l->step[2];
        /* One slot for each input row that the taps of one output row span, over again for each tap plane. */
        p->slots = p->extent[0] * p->extent[1];
        bytes = align64(p->slots * p->row * real_bytes) + align64(p->slots * (int64_t)sizeof(int64_t)) +
                align64(l->taps * (int64_t)sizeof(real *));
        p->tasks = l->batch * p->bands;
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

/* w[block][tap row][channel of the group][tap][lane] */
void FC_NAME(fc_channelwise_pack)(const fc_channelwise *p, const void *w_, void *packed_, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t vl = ((const fc_kernels *)l->kernels)->vl, lanes = p->block_groups * l->out_channels;
    const int64_t group = min64(task * p->block_groups, l->groups - p->block_groups);
    real *to = (real *)packed_ + task * vl * l->taps * l->in_channels;
    for (int64_t row = 0; row < p->count[0] * p->count[1]; row++) {
        int64_t d = row / p->count[1], h = row % p->count[1];
        if (p->flipped[0]) d = p->count[0] - 1 - d;
        if (p->flipped[1]) h = p->count[1] - 1 - h;
        for (int64_t c = 0; c < l->in_channels; c++)
            for (int64_t t = 0; t < p->count[2]; t++) {
                const int64_t tap = (d * p->count[1] + h) * p->count[2] + (p->flipped[2] ? p->count[2] - 1 - t : t);
                for (int64_t i = 0; i < vl; i++)
                    *to++ = i < lanes
                                ? ((const real *)
                                       w_)[(group + i / l->out_channels) * l->w_stride[0] +
                                           i % l->out_channels * l->w_stride[1] + c * l->w_stride[2] + l->tap_w[tap]]
                                : 0;
            }
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
    const int pairs = l->step[1] == 1 && p->spacing[1] == 1;
    g->lines = lines;
    g->slices = p->count[0], g->height = p->count[1], g->width = p->count[2];
    g->step = l->step[2], g->spacing = p->spacing[2] / gaps;
    g->out_step = out_pixel * gaps;
    for (; h < h_end; h += 1 + g->second, out += (1 + g->second) * out_row) {
        g->second = pairs && h + 1 < h_end;
        for (int64_t residue = 0; residue < min64(gaps, to - from); residue++) {
            const int64_t lead = from * l->step[2] + residue + p->first[2] - s->column_at;
            const int64_t base = gaps == 1 ? 0 : ((lead % gaps) + gaps) % gaps;
            g->first = (lead - base) / gaps;
            g->columns = s->columns > base ? ceil_div(s->columns - base, gaps) : 0;
            g->from = 0, g->to = ceil_div(to - from - residue, gaps);
            g->out[0] = out + residue * out_pixel;
            g->out[1] = g->out[0] + out_row;
            fc_line *line = lines;
            for (int64_t i = 0; i < p->count[0]; i++) {
                const int64_t z = d * l->step[0] + p->first[0] + i * p->spacing[0];
                for (int64_t j = 0; j < p->count[1] + g->second; j++, line++) {
                    const int64_t y = h * l->step[1] + p->first[1] + j * p->spacing[1];
                    if (z >= 0 && z < l->in_size[0] && y >= s->row_at && y < s->row_end)
                        *line = (fc_line){s->in + (s->planes ? z : i) * s->slice + (y - s->row_at) * s->row +
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

/* Copies one input row for `pixels` outputs from column w on, dealt out by residue. */
static void deal_row(const fc_channelwise *p, const real *in, int inside, int64_t w, int64_t pixels, real *to) {
    const fc_lattice *l = &p->l;
    const int64_t step = l->step[2], stride = step * l->in_stride[4];
    for (int64_t residue = 0; residue < step; residue++, to += p->deal) {
        const int64_t count = pixels + (p->extent[2] - 1) / step, x = w * step + p->first[2] + residue;
        int64_t low = 0, high = 0;
        if (inside && x < l->in_size[2]) {
            low = min64(x < 0 ? ceil_div(-x, step) : 0, count);
            high = max64(min64((l->in_size[2] - 1 - x) / step + 1, count), low);
        }
        const real *from = in + x * l->in_stride[4];
        for (int64_t i = 0; i < low; i++) to[i] = 0;
        if (stride == 1)
            memcpy(to + low, from + low, (size_t)(high - low) * sizeof(real));
        else
            for (int64_t i = low; i < high; i++) to[i] = from[i * stride];
        for (int64_t i = high; i < count; i++) to[i] = 0;
    }
}

/* One image and channel, whose weights are w[tap * vl]. */
static void run_pixels(const fc_channelwise *p, const real *in, const real *w, const real *bias, real *out,
                       char *workspace) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    real *rows = take(&workspace, p->slots * p->row * (int64_t)sizeof(real));
    int64_t *held = take(&workspace, p->slots * (int64_t)sizeof(int64_t)); /* the input row in each slot */
    const real **taps = take(&workspace, l->taps * (int64_t)sizeof(real *));
    fc_depthwise_row g = {.taps = taps, .n_taps = l->taps, .w = w, .w_step = k->vl, .bias = bias, .relu = p->relu};
    g.out_step = l->out_stride[4];
    for (int64_t first = 0; first < l->out_size[2]; first += SEGMENT)
        for (int64_t d = 0; d < l->out_size[0]; d++) {
            for (int64_t i = 0; i < p->slots; i++) held[i] = INT64_MAX;
            for (int64_t h = 0; h < l->out_size[1]; h++) {
                g.pixels = min64(SEGMENT, l->out_size[2] - first);
                const real **tap = taps;
                for (int64_t i = 0; i < p->count[0] * p->count[1]; i++) {
                    const int64_t plane = i / p->count[1] * p->spacing[0];
                    const int64_t from_first = h * l->step[1] + i % p->count[1] * p->spacing[1];
                    const int64_t z = d * l->step[0] + p->first[0] + plane, y = p->first[1] + from_first;
                    const int64_t slot = plane * p->extent[1] + from_first % p->extent[1];
                    real *row = rows + slot * p->row;
                    if (held[slot] != y) {
                        held[slot] = y;
                        const int inside = z >= 0 && z < l->in_size[0] && y >= 0 && y < l->in_size[1];
                        deal_row(p, in + z * l->in_stride[2] + y * l->in_stride[3], inside, first, g.pixels, row);
                    }
                    for (int64_t t = 0; t < p->count[2]; t++) {
                        const int64_t a = t * p->spacing[2];
                        *tap++ = row + a % l->step[2] * p->deal + a / l->step[2];
                    }
                }
                g.out = out + d * l->out_stride[2] + h * l->out_stride[3] + first * l->out_stride[4];
                k->depthwise_row(&g);
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
    if (p->form != FC_BY_PIXELS) {
        run_lanes(p, in, packed, bias, out, workspace, task);
        return 1;
    }
    const int64_t vl = ((const fc_kernels *)l->kernels)->vl;
    for (int64_t c = task * p->band; c < min64((task + 1) * p->band, l->groups); c++) {
        /* the last block begins where it is as long as the others */
        const int64_t block = c / p->block_groups;
        const int64_t group = min64(block * p->block_groups, l->groups - p->block_groups);
        run_pixels(p, in + c * l->in_stride[1], packed + block * vl * l->taps + c - group, bias ? bias + c : NULL,
                   out + c * l->out_stride[1], workspace);
    }
    return 1;
}
