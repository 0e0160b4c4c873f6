/* Weight gradient: blocks of dw, their tasks, and where results go; see fc_wgrad in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "wgrad.h"

/* Tasks that are wanted even of shares of few pixels.  Tasks that add up a block.  Most elements of dw that are stored in a
 * run. */
enum { FEW_TASKS = 4, MERGE_PIECES = 4, RUN = 512 };

static int64_t sum_bytes(const fc_wgrad *p) {
    return align64(p->l.taps * p->block_channels * p->ldk * (int64_t)sizeof(real));
}

void FC_NAME(fc_wgrad_block)(fc_wgrad *p) {
    fc_lattice *l = &p->l;
    flatten(l);
    (p->form == FC_WGRAD_WINOGRAD ? FC_NAME(fc_wgrad_winograd_block) : FC_NAME(fc_wgrad_direct_block))(p);
    p->channel_blocks = ceil_div(l->in_channels, p->block_channels);
    p->out_blocks = ceil_div(l->out_channels, p->block_out);
    const int64_t blocks = l->groups * p->channel_blocks * p->out_blocks;
    const int64_t pixels = l->batch * l->out_size[0] * l->out_size[1] * l->out_size[2];
    const int64_t macs = pixels * l->taps * p->block_channels * p->block_out;
    p->splits = 1;
    if (blocks > 0 && blocks < MIN_TASKS)
        p->splits = max64(min64(min64(ceil_div(MIN_TASKS, blocks), p->units / p->min_units), macs / MIN_MACS), 1);
    if (blocks > 0) p->splits = min64(p->splits, max64(pixels / SPLIT_PIXELS, ceil_div(FEW_TASKS, blocks)));
    p->splits = even_shares(blocks, p->splits);
    p->tasks = blocks * p->splits;
    p->merge_tasks = p->splits > 1 ? blocks * MERGE_PIECES : 0;
    p->partial_bytes = p->splits > 1
                           ? p->splits * l->groups * l->taps * l->in_channels * l->out_channels * (int64_t)sizeof(real)
                           : 0;
    p->workspace_bytes += sum_bytes(p);
    p->merge_bytes = p->splits > 1 ? sum_bytes(p) : 0;
}

/* Row (tap, c) of a group in a partial result, out channel k. */
static int64_t partial_at(const fc_lattice *l, int64_t split, int64_t group, int64_t tap, int64_t c, int64_t k) {
    return (((split * l->groups + group) * l->taps + tap) * l->in_channels + c) * l->out_channels + k;
}

/* Writes a block of dw from sum[tap][channel][ldk], in runs of what lies evenly spaced in dw: taps of neighbouring
 * channels, taps of one channel, or channels of one tap. */
static void store(const fc_wgrad *p, const fc_wgrad_share *s, const real *sum, real *dw) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t channels = s->c1 - s->c0, lanes = s->k1 - s->k0, tap_step = channels * p->ldk;
    const int64_t side = l->taps > 1 ? l->tap_w[1] - l->tap_w[0] : 0, channel_stride = l->w_stride[2];
    int row_of_taps = l->taps > 1 && l->taps <= RUN && (channel_stride != 1 || channels == 1);
    for (int64_t t = 1; t < l->taps; t++) row_of_taps &= l->tap_w[t] - l->tap_w[t - 1] == side;
    dw += s->group * l->w_stride[0] + s->k0 * l->w_stride[1] + s->c0 * channel_stride;
    int64_t from_at[RUN];
    if (row_of_taps) {
        const int64_t together = channel_stride == l->taps * side ? RUN / l->taps : 1;
        for (int64_t x = 0; x < together * l->taps; x++) from_at[x] = x % l->taps * tap_step + x / l->taps * p->ldk;
        for (int64_t c = 0; c < channels; c += together)
            k->wgrad_store(sum + c * p->ldk, from_at, min64(together, channels - c) * l->taps, lanes,
                           dw + l->tap_w[0] + c * channel_stride, l->w_stride[1], side);
        return;
    }
    for (int64_t x = 0; x < RUN; x++) from_at[x] = x * p->ldk;
    for (int64_t c = 0; c < channels; c += RUN)
        for (int64_t t = 0; t < l->taps; t++)
            k->wgrad_store(sum + t * tap_step + c * p->ldk, from_at, min64(RUN, channels - c), lanes,
                           dw + l->tap_w[t] + c * channel_stride, l->w_stride[1], channel_stride);
}

static fc_wgrad_share share(const fc_wgrad *p, int64_t block) {
    const fc_lattice *l = &p->l;
    const int64_t out_block = block % p->out_blocks, channel_block = block / p->out_blocks % p->channel_blocks;
    fc_wgrad_share s = {.group = block / p->out_blocks / p->channel_blocks,
                        .c0 = channel_block * p->block_channels,
                        .k0 = out_block * p->block_out,
                        .to = p->units};
    s.c1 = min64(s.c0 + p->block_channels, l->in_channels);
    s.k1 = min64(s.k0 + p->block_out, l->out_channels);
    return s;
}

int FC_NAME(fc_wgrad_run)(const fc_wgrad *p, const void *in_, const void *dy_, void *dw, void *partial, void *workspace,
                          int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t split = task % p->splits;
    fc_wgrad_share s = share(p, task / p->splits);
    s.from = p->units * split / p->splits, s.to = p->units * (split + 1) / p->splits;
    const real *in = (const real *)in_ + l->in_offset + (s.group * l->in_channels + s.c0) * l->in_stride[1];
    const real *dy = (const real *)dy_ + l->out_offset + (s.group * l->out_channels + s.k0) * l->out_stride[1];
    char *w = workspace;
    real *sum = take(&w, sum_bytes(p));
    const int good = (p->form == FC_WGRAD_WINOGRAD ? FC_NAME(fc_wgrad_winograd_sum)
                                                   : FC_NAME(fc_wgrad_direct_sum))(p, in, dy, &s, sum, w);
    if (p->splits == 1) {
        store(p, &s, sum, dw);
        return good;
    }
    for (int64_t t = 0; t < l->taps; t++)
        for (int64_t c = s.c0; c < s.c1; c++, sum += p->ldk)
            memcpy((real *)partial + partial_at(l, split, s.group, t, c, s.k0), sum,
                   (size_t)(s.k1 - s.k0) * sizeof(real));
    return good;
}

void FC_NAME(fc_wgrad_merge)(const fc_wgrad *p, const void *partial, void *dw, void *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    fc_wgrad_share s = share(p, task / MERGE_PIECES);
    const int64_t channels = s.c1 - s.c0, piece = task % MERGE_PIECES;
    s.c1 = s.c0 + channels * (piece + 1) / MERGE_PIECES;
    s.c0 += channels * piece / MERGE_PIECES;
    const int64_t lanes = s.k1 - s.k0, part = partial_at(l, 1, 0, 0, 0, 0);
    real *sum = workspace;
    for (int64_t t = 0; t < l->taps; t++)
        for (int64_t c = s.c0; c < s.c1; c++, sum += p->ldk) {
            const real *from = (const real *)partial + partial_at(l, 0, s.group, t, c, s.k0);
            memcpy(sum, from, (size_t)lanes * sizeof(real));
            for (int64_t i = lanes; i < p->ldk; i++) sum[i] = 0;
            for (int64_t split = 1; split < p->splits; split++) {
                from += part;
                k->add_run(sum, from, 0, lanes, sum);
            }
        }
    store(p, &s, workspace, dw);
}
