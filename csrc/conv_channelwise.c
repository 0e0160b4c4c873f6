/* Depthwise convolution and its data gradient; see fc_channelwise in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "fastconv.h"
#include "kernels.h"

/* Multiply-adds worth a task; pixels of a row that are dealt out at a time; elements of zeros that four pixels may
 * step over. */
enum { TASK_MACS = 200 * 1000, SEGMENT = 1024, MAX_ZEROS = 64 * 1024 };

void FC_NAME(fc_channelwise_block)(fc_channelwise *p) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t real_bytes = (int64_t)sizeof(real), rows = l->out_size[0] * l->out_size[1];
    for (int a = 0; a < 3; a++) {
        int64_t low = INT64_MAX, high = INT64_MIN;
        for (int64_t t = 0; t < l->taps; t++) {
            low = min64(low, l->tap_at[3 * t + a]);
            high = max64(high, l->tap_at[3 * t + a]);
        }
        p->first[a] = low, p->extent[a] = high - low + 1;
    }
    p->by_channels = l->in_stride[1] == 1 && l->out_stride[1] == 1 && l->groups > 1;
    const int64_t macs = max64(l->out_size[2] * l->taps, 1);
    if (p->by_channels) {
        const int64_t step = l->step[2] * l->in_stride[4];
        p->zeros = l->groups;
        if (step >= 0 && 3 * step + l->groups <= MAX_ZEROS) p->zeros += 3 * step;
        p->band = min64(max64(TASK_MACS / (macs * l->groups), 1), max64(rows, 1));
        p->bands = ceil_div(rows, p->band);
        p->tasks = l->batch * p->bands;
        p->pack_tasks = ceil_div(l->groups, k->nr);
        p->packed_bytes = p->pack_tasks * k->nr * l->taps * real_bytes;
        p->workspace_bytes = align64(p->zeros * real_bytes) + align64(l->taps * (int64_t)sizeof(real *));
    } else {
        p->band = min64(max64(TASK_MACS / (macs * max64(rows, 1)), 1), l->groups); /* channels of a task */
        p->bands = ceil_div(l->groups, p->band);
        p->tasks = l->batch * p->bands;
        p->pack_tasks = l->groups;
        p->packed_bytes = l->groups * l->taps * real_bytes;
        p->deal = min64(l->out_size[2], SEGMENT) + (p->extent[2] - 1) / l->step[2] + 4 * k->vl;
        p->row = p->deal * l->step[2];
        /* One slot for each input row that the taps of one output row span, over again for each tap plane. */
        p->slots = p->extent[0] * p->extent[1];
        p->workspace_bytes = align64(p->slots * p->row * real_bytes) + align64(p->slots * (int64_t)sizeof(int64_t)) +
                             align64(l->taps * (int64_t)sizeof(real *));
    }
}

void FC_NAME(fc_channelwise_pack)(const fc_channelwise *p, const void *w_, void *packed_, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t lanes = p->by_channels ? ((const fc_kernels *)l->kernels)->nr : 1;
    const real *w = (const real *)w_ + task * lanes * l->w_stride[0];
    real *to = (real *)packed_ + task * lanes * l->taps;
    for (int64_t t = 0; t < l->taps; t++)
        for (int64_t c = 0; c < lanes; c++)
            *to++ = task * lanes + c < l->groups ? w[c * l->w_stride[0] + l->tap_w[t]] : 0;
}

/* One image, output rows [from, to), all channels. */
static void run_channels(const fc_channelwise *p, const real *in, const real *packed, const real *bias, real *out,
                         char *workspace, int64_t from, int64_t to) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    real *zeros = take(&workspace, p->zeros * (int64_t)sizeof(real));
    const real **taps = take(&workspace, l->taps * (int64_t)sizeof(real *));
    memset(zeros, 0, (size_t)p->zeros * sizeof(real));
    fc_depthwise g = {
        .taps = taps, .n_taps = l->taps, .channels = l->groups, .w = packed, .bias = bias, .relu = p->relu};
    g.in_step = l->step[2] * l->in_stride[4], g.out_step = l->out_stride[4];

    const int64_t step = l->step[2];
    const int64_t low = p->first[2] < 0 ? ceil_div(-p->first[2], step) : 0; /* columns whose taps all lie inside */
    const int64_t room = l->in_size[2] - p->first[2] - p->extent[2];
    const int64_t high = room < 0 ? 0 : room / step + 1;
    for (int64_t row = from; row < to; row++) {
        const int64_t d = row / l->out_size[1], h = row % l->out_size[1];
        for (int64_t w = 0; w < l->out_size[2]; w += g.pixels) {
            const int four = p->zeros > l->groups && w >= low && w + 4 <= min64(high, l->out_size[2]);
            g.pixels = four ? 4 : 1;
            for (int64_t t = 0; t < l->taps; t++) {
                const int64_t *at = l->tap_at + 3 * t;
                const int64_t z = d * l->step[0] + at[0], y = h * l->step[1] + at[1], x = w * step + at[2];
                const int inside = z >= 0 && z < l->in_size[0] && y >= 0 && y < l->in_size[1] && x >= 0 &&
                                   x < l->in_size[2];
                taps[t] = inside ? in + z * l->in_stride[2] + y * l->in_stride[3] + x * l->in_stride[4] : zeros;
            }
            g.out = out + d * l->out_stride[2] + h * l->out_stride[3] + w * l->out_stride[4];
            k->depthwise_pixels(&g);
        }
    }
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

/* One image and channel. */
static void run_pixels(const fc_channelwise *p, const real *in, const real *w, const real *bias, real *out,
                       char *workspace) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    real *rows = take(&workspace, p->slots * p->row * (int64_t)sizeof(real));
    int64_t *held = take(&workspace, p->slots * (int64_t)sizeof(int64_t)); /* the input row in each slot */
    const real **taps = take(&workspace, l->taps * (int64_t)sizeof(real *));
    fc_depthwise g = {.taps = taps, .n_taps = l->taps, .w = w, .bias = bias, .relu = p->relu};
    g.out_step = l->out_stride[4];
    for (int64_t first = 0; first < l->out_size[2]; first += SEGMENT)
        for (int64_t d = 0; d < l->out_size[0]; d++) {
            for (int64_t i = 0; i < p->slots; i++) held[i] = INT64_MAX;
            for (int64_t h = 0; h < l->out_size[1]; h++) {
                g.pixels = min64(SEGMENT, l->out_size[2] - first);
                for (int64_t t = 0; t < l->taps; t++) {
                    const int64_t *at = l->tap_at + 3 * t;
                    const int64_t z = d * l->step[0] + at[0], y = h * l->step[1] + at[1];
                    const int64_t from_first = y - p->first[1]; /* >= 0 */
                    const int64_t slot = (at[0] - p->first[0]) * p->extent[1] + from_first % p->extent[1];
                    real *row = rows + slot * p->row;
                    if (held[slot] != y) {
                        held[slot] = y;
                        const int inside = z >= 0 && z < l->in_size[0] && y >= 0 && y < l->in_size[1];
                        deal_row(p, in + z * l->in_stride[2] + y * l->in_stride[3], inside, first, g.pixels, row);
                    }
                    const int64_t a = at[2] - p->first[2];
                    taps[t] = row + a % l->step[2] * p->deal + a / l->step[2];
                }
                g.out = out + d * l->out_stride[2] + h * l->out_stride[3] + first * l->out_stride[4];
                k->depthwise_row(&g);
            }
        }
}

int FC_NAME(fc_channelwise_run)(const fc_channelwise *p, const void *in_, const void *packed_, const void *bias_,
                                void *out_, void *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t image = task / p->bands, first = task % p->bands * p->band;
    const real *in = (const real *)in_ + l->in_offset + image * l->in_stride[0];
    const real *bias = bias_;
    real *out = (real *)out_ + l->out_offset + image * l->out_stride[0];
    if (p->by_channels) {
        const int64_t rows = l->out_size[0] * l->out_size[1];
        run_channels(p, in, packed_, bias, out, workspace, first, min64(first + p->band, rows));
        return 1;
    }
    for (int64_t c = first; c < min64(first + p->band, l->groups); c++)
        run_pixels(p, in + c * l->in_stride[1], (const real *)packed_ + c * l->taps, bias ? bias + c : NULL,
                   out + c * l->out_stride[1], workspace);
    return 1;
}
