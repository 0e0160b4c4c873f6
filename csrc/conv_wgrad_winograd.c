/* Weight gradient by Winograd's minimal filtering; see fc_wgrad in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "wgrad.h"

/* Budgets in L2: sums of products of a block; transforms of a unit.  Tiles of a partial sum; tiles that a split, which
 * transforms its own sums, is worth. */
enum { SUM_BYTES = 600 * 1024, UNIT_BYTES = 448 * 1024, MAX_TILES = 64, MIN_SPLIT_TILES = 96 };

/* Blocks that a few tiles are cut into, of so many multiply-adds at least. */
enum { MAX_CUT = 4, CUT_MACS = 800000 };

enum { LINE = 64 / sizeof(real) };

static const struct {
    int points[3], outputs[3], taps;
} shapes[] = {
#define FC_WINO(name, nz, ny, nx, mz, my, mx, r) {{nz, ny, nx}, {mz, my, mx}, r},
#include "winograd.def"
#undef FC_WINO
};

static int points_of(int shape) { return shapes[shape].points[0] * shapes[shape].points[1] * shapes[shape].points[2]; }

static int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

/* `n` in even blocks of at most `most`, whole units. */
static int64_t even(int64_t n, int64_t most, int64_t unit) {
    n = max64(n, 1);
    return round_up(ceil_div(n, ceil_div(n, max64(most, unit))), unit);
}

static int64_t blocks_of(const fc_wgrad *p) {
    return p->l.groups * ceil_div(p->l.in_channels, p->block_channels) * ceil_div(p->l.out_channels, p->block_out);
}

void FC_NAME(fc_wgrad_winograd_block)(fc_wgrad *p) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int points = points_of(p->shape);
    const int64_t real_bytes = (int64_t)sizeof(real);
    p->tiles_per_grid = 1, p->all_tiles = l->batch;
    for (int a = 0; a < 3; a++) {
        p->grids[a] = max64(min64(p->dilation[a], l->out_size[a]), 1);
        p->tiles[a] = ceil_div(ceil_div(l->out_size[a], p->dilation[a]), shapes[p->shape].outputs[a]);
        p->tiles_per_grid *= p->tiles[a], p->all_tiles *= p->tiles[a] * p->grids[a];
        p->low[a] = INT64_MAX;
        for (int64_t t = 0; t < l->taps; t++) p->low[a] = min64(p->low[a], l->tap_at[3 * t + a]);
    }
    const int64_t tiles = p->all_tiles, sums = SUM_BYTES / real_bytes / points;
    int64_t side = k->vl; /* of a square block */
    while ((side + k->vl) * (side + k->vl) <= sums) side += k->vl;
    p->block_out = even(l->out_channels,
                        max64(sums / min64(side, round_up(max64(l->in_channels, 1), k->vl)), k->nr) / k->nr * k->nr,
                        k->vl);
    if (p->block_out > k->nr && p->block_out < l->out_channels) p->block_out = round_up(p->block_out, k->nr);
    p->block_channels = even(l->in_channels, sums / p->block_out / k->vl * k->vl, k->vl);
    const int64_t shares = max64(tiles / MIN_SPLIT_TILES, 1), macs = tiles * points * l->in_channels * l->out_channels;
    int64_t blocks = blocks_of(p);
    while (2 * blocks * shares <= min64(MAX_CUT, macs / CUT_MACS)) { /* with work for more threads, one is not enough */
        if (p->block_out > k->nr)
            p->block_out = round_up(ceil_div(p->block_out, 2), k->nr);
        else if (p->block_channels > k->vl)
            p->block_channels = round_up(ceil_div(p->block_channels, 2), k->vl);
        else
            break;
        blocks = blocks_of(p);
    }
    p->ldk = p->block_out, p->ldc = p->block_channels;

    const int64_t per_tile = points * (p->ldc + p->ldk) * real_bytes;
    p->block_tiles = max64(min64(min64(UNIT_BYTES / per_tile, MAX_TILES), tiles), 1);
    const int64_t splits = even_shares(blocks, min64(shares, ceil_div(MIN_TASKS, max64(blocks, 1))));
    p->units = round_up(ceil_div(tiles, p->block_tiles), splits); /* as many units in every share */
    p->block_tiles = max64(ceil_div(tiles, max64(p->units, 1)), 1);
    p->units = ceil_div(tiles, p->block_tiles);
    p->min_units = max64(p->units / splits, 1);
    p->ldq_v = p->block_tiles * p->ldc + LINE;
    p->ldq_z = p->block_tiles * p->ldk + LINE;

    p->stage = 0;
    if (l->in_stride[1] != 1 || l->out_stride[1] != 1) {
        const int64_t width = min64(p->block_tiles, p->tiles[2]) * shapes[p->shape].outputs[2] + shapes[p->shape].taps;
        p->stage = shapes[p->shape].points[0] * shapes[p->shape].points[1] * width * k->vl;
    }
    p->workspace_bytes = align64(points * (p->ldq_v + p->ldq_z) * real_bytes) +
                         align64(points * (p->ldc * p->ldk + LINE) * real_bytes) + align64(p->stage * real_bytes) +
                         align64(k->vl * real_bytes);
}

/* One of the two operands: the patches of x, or the tiles of dy. */
typedef struct {
    const real *at;
    const int64_t *size, *stride; /* of the space; of image, channel and space */
    int64_t low[3];               /* position of the first element of tile 0 of the first sub-grid */
    const int *patch;             /* elements along each axis */
    void (*transform)(int shape, const fc_wino_input *g);
    int64_t channels, ld, ldq;
} operand;

/* Transforms `run` tiles from `tile` on, which lie side by side in a row, to v, of VL channels or all of them. */
static void transform(const fc_wgrad *p, const operand *o, int64_t tile, int64_t run, real *v, real *stage) {
    const fc_kernels *k = p->l.kernels;
    const int *outputs = shapes[p->shape].outputs, *patch = o->patch;
    int64_t at[3], step[3], low[3], high[3]; /* of the patch: its first element; and of those that exist */
    int64_t i = tile % p->tiles_per_grid, grid = tile / p->tiles_per_grid;
    for (int a = 2; a >= 0; a--) {
        at[a] = i % p->tiles[a] * outputs[a] * p->dilation[a] + grid % p->grids[a] + o->low[a];
        i /= p->tiles[a], grid /= p->grids[a];
        step[a] = p->dilation[a] * o->stride[a + 2];
        low[a] = at[a] < 0 ? ceil_div(-at[a], p->dilation[a]) : 0;
        high[a] = at[a] < o->size[a] ? ceil_div(o->size[a] - at[a], p->dilation[a]) : 0;
    }
    const real *from = o->at + grid * o->stride[0];
    for (int a = 0; a < 3; a++) from += at[a] * o->stride[a + 2];
    if (o->stride[1] == 1) {
        fc_wino_input g = {.channels = o->channels, .ldq = o->ldq};
        for (int a = 0; a < 3; a++) g.stride[a] = step[a], g.low[a] = low[a], g.high[a] = high[a];
        for (int64_t t = 0; t < run; t++, v += o->ld) {
            g.in = from + t * outputs[2] * step[2];
            g.v = v;
            g.low[2] = max64(low[2] - t * outputs[2], 0), g.high[2] = max64(high[2] - t * outputs[2], 0);
            o->transform(p->shape, &g);
        }
        return;
    }
    /* Other memory orders: rows of VL channels at a time are brought into order first. */
    fc_wino_input g = {.channels = k->vl, .ldq = o->ldq, .high = {patch[0], patch[1], patch[2]}};
    const int64_t width = (run - 1) * outputs[2] + patch[2], row = width * k->vl;
    const int64_t left = min64(low[2], width), right = max64(min64(high[2], width), left);
    g.stride[2] = k->vl, g.stride[1] = row, g.stride[0] = patch[1] * row;
    for (int64_t c = 0; c < o->channels; c += k->vl) {
        real *to = stage;
        for (int z = 0; z < patch[0]; z++)
            for (int y = 0; y < patch[1]; y++, to += row) {
                if (z < low[0] || z >= high[0] || y < low[1] || y >= high[1]) {
                    memset(to, 0, (size_t)row * sizeof(real));
                    continue;
                }
                memset(to, 0, (size_t)(left * k->vl) * sizeof(real));
                k->channels_in(from + z * step[0] + y * step[1] + left * step[2] + c * o->stride[1], o->stride[1],
                               step[2], o->channels - c, right - left, to + left * k->vl, k->vl);
                memset(to + right * k->vl, 0, (size_t)((width - right) * k->vl) * sizeof(real));
            }
        for (int64_t t = 0; t < run; t++) {
            g.in = stage + t * outputs[2] * k->vl;
            g.v = v + t * o->ld + c;
            o->transform(p->shape, &g);
        }
    }
}

static void transform_unit(const fc_wgrad *p, const operand *o, int64_t from, int64_t to, real *v, real *stage) {
    for (int64_t tile = from, run; tile < to; tile += run, v += run * o->ld) {
        run = min64(to - tile, p->tiles[2] - tile % p->tiles[2]);
        transform(p, o, tile, run, v, stage);
    }
}

int FC_NAME(fc_wgrad_winograd_sum)(const fc_wgrad *p, const real *in, const real *dy, const fc_wgrad_share *s,
                                   real *sum, char *workspace) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int points = points_of(p->shape);
    const int64_t channels = s->c1 - s->c0, lanes = round_up(s->k1 - s->k0, k->vl);
    const int64_t tiles = p->all_tiles, ldq_m = p->ldc * p->ldk + LINE;
    real *v = take(&workspace, points * (p->ldq_v + p->ldq_z) * (int64_t)sizeof(real)), *z = v + points * p->ldq_v;
    real *m = take(&workspace, points * ldq_m * (int64_t)sizeof(real));
    real *stage = take(&workspace, p->stage * (int64_t)sizeof(real));
    real *check = take(&workspace, k->vl * (int64_t)sizeof(real));
    const operand x = {
        in,       l->in_size, l->in_stride, {p->low[0], p->low[1], p->low[2]}, shapes[p->shape].points, k->wino_input,
        channels, p->ldc,     p->ldq_v};
    const operand y = {
        dy,     l->out_size, l->out_stride, {0, 0, 0}, shapes[p->shape].outputs, k->wino_grad_output, s->k1 - s->k0,
        p->ldk, p->ldq_z};
    if (s->from == s->to) {
        memset(sum, 0, (size_t)(l->taps * channels * p->ldk) * sizeof(real));
        return 1;
    }

    const int64_t strips = ceil_div(channels, k->mr);
    fc_term term;
    fc_gemm g = {.terms = &term, .n_terms = 1, .lda = p->ldc, .ldb = p->ldk, .ldc = p->ldk};
    for (int64_t unit = s->from; unit < s->to; unit++) {
        const int64_t from = unit * p->block_tiles, to = min64(from + p->block_tiles, tiles);
        transform_unit(p, &x, from, to, v, stage);
        transform_unit(p, &y, from, to, z, stage);
        g.add = unit > s->from;
        term.k = to - from;
        for (int q = 0; q < points; q++)
            for (int64_t j = 0; j < lanes; j += k->nr) {
                const int vectors = lanes - j > k->vl ? 2 : 1;
                g.n = vectors * k->vl;
                term.b = z + q * p->ldq_z + j;
                for (int64_t i = 0; i < strips; i++) {
                    const int64_t c0 = channels * i / strips, c1 = channels * (i + 1) / strips;
                    term.a = v + q * p->ldq_v + c0;
                    g.c = m + q * ldq_m + c0 * p->ldk + j;
                    k->gemm_col((int)(c1 - c0), vectors, &g);
                }
            }
    }

    memset(check, 0, (size_t)k->vl * sizeof(real));
    const fc_wino_grad to_taps = {.m = m,
                                  .ldq = ldq_m,
                                  .ld = p->ldk,
                                  .channels = channels,
                                  .lanes = lanes,
                                  .to = sum,
                                  .tap_step = channels * p->ldk,
                                  .check = check};
    k->wino_grad_weights(p->shape, &to_taps);
    for (int i = 0; i < k->vl; i++)
        if (check[i] != 0) return 0;
    return 1;
}
