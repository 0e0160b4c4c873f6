/* Winograd convolution, fused block by block; see fc_wino in fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "fastconv.h"
#include "kernels.h"
#include "pack.h"

/* Budgets: transformed input and products of a task, which stay in L2, and what they may take at least so that a
 * product has rows to reuse weights for; where that is too little, tiles of a task, and bytes of them in L3; terms of one
 * partial sum; channels whose weights a task transforms beforehand; bytes of weights that are copied before that. */
enum {
    BLOCK_BYTES = 416 * 1024,
    MOST_BYTES = 640 * 1024,
    FAR_BYTES = 6 << 20,
    NEAR_BYTES = 512 * 1024,
    FEW_ROWS = 12,
    MANY_TILES = 56,
    CHUNK = 256,
    PIECE = 64,
    COPIED_WEIGHTS = 56 * 1024
};

/* For the balance of tasks, in cycles of a core: for each point and channel vector of a transform; for each point and
 * vector of weights, transformed into the workspace of a task, or into memory from which they return; bytes of weights
 * that arrive in one. */
enum { TRANSFORM_CYCLES = 6, FUSED_CYCLES = 7, APART_CYCLES = 10, APART_FAR_CYCLES = 30, WEIGHT_BYTES = 8 };

static const struct {
    int points[3], outputs[3], taps;
} shapes[] = {
#define FC_WINO(name, nz, ny, nx, mz, my, mx, r) {{nz, ny, nx}, {mz, my, mx}, r},
#include "winograd.def"
#undef FC_WINO
};

static int points_of(int shape) { return shapes[shape].points[0] * shapes[shape].points[1] * shapes[shape].points[2]; }

/* One term, along each axis: its first input position in the sub-grid for output 0, counted from the first tap; taps, at
 * most r; bit a of `shorter`: whether it has fewer than r along axis a. */
typedef struct {
    int64_t first[3], taps[3];
    int shorter;
} part;

/* Taps of one part along an axis whose shape has `points` points. */
static int64_t most_taps(const fc_wino *p, int axis) {
    return shapes[p->shape].points[axis] == 1 ? 1 : shapes[p->shape].taps;
}

/* Parts along an axis, and where `taps` is given the first position and the number of taps of each. */
static int64_t cut_axis(const fc_wino *p, int axis, int64_t *first, int64_t *taps) {
    const int64_t step = p->l.step[axis], r = most_taps(p, axis);
    int64_t parts = 0;
    for (int64_t residue = 0; residue < min64(step, p->extent[axis]); residue++) {
        const int64_t all = ceil_div(p->extent[axis] - residue, step);
        for (int64_t t = 0; t < all; t += r, parts++)
            if (taps) first[parts] = residue + t * step, taps[parts] = min64(r, all - t);
    }
    return parts;
}

static void list_terms(const fc_wino *p, part *terms) {
    int64_t first[3][FC_WINO_TERMS], taps[3][FC_WINO_TERMS];
    for (int a = 0; a < 3; a++) cut_axis(p, a, first[a], taps[a]);
    for (int64_t i = 0; i < p->terms; i++) {
        int64_t rest = i;
        terms[i].shorter = 0;
        for (int a = 2; a >= 0; a--) {
            terms[i].first[a] = first[a][rest % p->parts[a]], terms[i].taps[a] = taps[a][rest % p->parts[a]];
            terms[i].shorter |= (terms[i].taps[a] < most_taps(p, a)) << a;
            rest /= p->parts[a];
        }
    }
}

/* The axes along which point q is the one at infinity, as bits. A term that is shorter there has no product. */
static int at_infinity(const fc_wino *p, int q) {
    int axes = 0;
    for (int a = 2; a >= 0; a--) {
        const int n = shapes[p->shape].points[a];
        if (n == 1) continue;
        axes |= (q % n == n - 1) << a;
        q /= n;
    }
    return axes;
}

/* Predicted cycles of all tasks, if there are `blocks` of tiles and `panel_blocks` of panels, whose weights the tasks
 * transform (`fused`) or find transformed. */
static int64_t predicted(const fc_wino *p, int64_t tiles, int points, int64_t blocks, int64_t panel_blocks, int fused) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t block = ceil_div(tiles, blocks), panels = ceil_div(p->panels, panel_blocks);
    const int64_t product = p->depth * block * (k->nr / k->vl);
    const int64_t weights = p->depth * k->nr * (int64_t)sizeof(real) / WEIGHT_BYTES;
    const int64_t transforms = p->terms * ceil_div(l->in_channels, k->vl) + panels * (k->nr / k->vl);
    int64_t task = points * (block * transforms * TRANSFORM_CYCLES + panels * (max64(product, weights) + weights / 4));
    const int64_t threads = max64(p->min_tasks, 1), vectors = points * p->depth * (k->nr / k->vl);
    if (fused) task += panels * vectors * FUSED_CYCLES;
    int64_t before = 0;
    if (p->raw && !fused) {
        const int far = l->groups * p->panels * vectors * k->vl * (int64_t)sizeof(real) > NEAR_BYTES;
        const int64_t pieces = ceil_div(l->in_channels, PIECE);
        before = ceil_div(l->groups * p->panels * pieces, threads) * vectors / max64(pieces, 1) *
                 (far ? APART_FAR_CYCLES : APART_CYCLES);
    }
    return ceil_div(l->groups * blocks * panel_blocks, threads) * task + before;
}

/* Cuts the work into blocks of tiles and of panels: tiles as the caches want it, then whatever keeps all threads busy. */
static void cut(fc_wino *p, int64_t tiles, int points) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t tile_bytes = points * (p->ldv + k->nr) * (int64_t)sizeof(real);
    const int64_t few = ceil_div(FEW_ROWS, k->mr) * k->mr;
    int64_t most = BLOCK_BYTES / tile_bytes / k->mr * k->mr;
    if (most < few) {
        const int64_t far = max64(FAR_BYTES / tile_bytes / k->mr, 1) * k->mr;
        most = few * tile_bytes <= MOST_BYTES ? few : min64(MANY_TILES / k->mr * k->mr, far);
    }
    p->panels = ceil_div(l->out_channels, k->nr);
    p->blocks = p->panel_blocks = 1, p->fused = 0;
    int64_t best = INT64_MAX;
    for (int fused = 0; fused <= p->raw; fused++) { /* weights that are transformed for a block want a large one */
        const int64_t least = max64(ceil_div(tiles, fused ? max64(FAR_BYTES / tile_bytes, most) : most), 1);
        for (int64_t blocks = least; blocks < least + max64(p->min_tasks, 1) && blocks <= max64(tiles, 1); blocks++)
            for (int64_t panel_blocks = 1; panel_blocks <= min64(max64(p->panels, 1), p->min_tasks); panel_blocks++) {
                const int64_t cycles = predicted(p, tiles, points, blocks, panel_blocks, fused);
                if (cycles < best) best = cycles, p->blocks = blocks, p->panel_blocks = panel_blocks, p->fused = fused;
            }
    }
    p->block_tiles = max64(ceil_div(tiles, p->blocks), 1);
    p->blocks = ceil_div(tiles, p->block_tiles);
    p->panels_per_task = max64(ceil_div(p->panels, p->panel_blocks), 1);
    p->panel_blocks = ceil_div(p->panels, p->panels_per_task);
}

/* Input positions along a row that `run` neighbouring tiles need. */
static int64_t row_width(const fc_wino *p, int64_t run) {
    const int n = shapes[p->shape].points[2], m = shapes[p->shape].outputs[2];
    int64_t first[FC_WINO_TERMS], taps[FC_WINO_TERMS], last = 0;
    for (int64_t i = cut_axis(p, 2, first, taps) - 1; i >= 0; i--) last = max64(last, first[i]);
    return ((run - 1) * m + n - 1) * p->l.step[2] + last + 1;
}

void FC_NAME(fc_wino_block)(fc_wino *p) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int points = points_of(p->shape);
    p->tiles_per_grid = 1, p->all_tiles = l->batch;
    for (int a = 0; a < 3; a++) {
        p->grids[a] = max64(min64(p->dilation[a], l->out_size[a]), 1);
        p->tiles[a] = ceil_div(ceil_div(l->out_size[a], p->dilation[a]), shapes[p->shape].outputs[a]);
        p->tiles_per_grid *= p->tiles[a], p->all_tiles *= p->tiles[a] * p->grids[a];
        p->first[a] = INT64_MAX;
        int64_t last = INT64_MIN;
        for (int64_t t = 0; t < l->taps; t++) {
            p->first[a] = min64(p->first[a], l->tap_at[3 * t + a]);
            last = max64(last, l->tap_at[3 * t + a]);
        }
        p->extent[a] = (last - p->first[a]) / p->dilation[a] + 1;
        p->parts[a] = cut_axis(p, a, NULL, NULL);
    }
    p->terms = p->parts[0] * p->parts[1] * p->parts[2];

    part terms[FC_WINO_TERMS];
    list_terms(p, terms);
    int64_t products = 0;
    for (int64_t i = 0; i < p->terms; i++)
        for (int q = 0; q < points; q++) products += !(terms[i].shorter & at_infinity(p, q));
    p->depth = ceil_div(products * l->in_channels, points);
    const int64_t tiles = p->all_tiles;

    /* Rows of V hold whole vectors, and are skewed against each other where their distance would be a multiple of
     * 2 KB, so that points and tiles do not all fall into the same few sets of L1. */
    p->term_width = ceil_div(l->in_channels, k->vl) * k->vl;
    p->ldv = p->terms * p->term_width;
    if (p->ldv * (int64_t)sizeof(real) % 2048 == 0) p->ldv += 64 / (int64_t)sizeof(real);
    cut(p, tiles, points);
    p->ldq_u = p->terms * l->in_channels * k->nr + 64 / (int64_t)sizeof(real);
    p->panel = points * p->ldq_u;
    p->ldq_v = p->block_tiles * p->ldv + 64 / (int64_t)sizeof(real);
    p->ldq_m = p->block_tiles * k->nr + 64 / (int64_t)sizeof(real);

    p->tasks = l->groups * p->blocks * p->panel_blocks;

    const int64_t real_bytes = (int64_t)sizeof(real);
    p->pack_tasks = p->fused ? 0 : l->groups * p->panels * ceil_div(l->in_channels, PIECE);
    p->packed_bytes = p->fused ? 0 : l->groups * p->panels * p->panel * real_bytes;
    p->stage = 0;
    if (l->in_stride[1] != 1)
        p->stage = shapes[p->shape].points[0] * shapes[p->shape].points[1] * k->vl *
                   row_width(p, min64(p->block_tiles, p->tiles[2]));
    if (l->out_stride[1] != 1) {
        const int64_t width = min64(p->block_tiles, p->tiles[2]) * shapes[p->shape].outputs[2];
        p->stage = max64(p->stage, shapes[p->shape].outputs[0] * shapes[p->shape].outputs[1] * width * k->vl);
    }
    p->workspace_bytes = align64(points * p->ldq_v * real_bytes) + align64(points * p->ldq_m * real_bytes) +
                         align64(p->stage * real_bytes) + align64(k->vl * real_bytes) +
                         (p->fused ? align64(p->panel * real_bytes) : 0);
}

/* Offsets in w of the taps of a term, row-major; FC_NO_TAP where it is shorter. */
static void taps_of(const fc_wino *p, const part *term, int64_t *tap_w) {
    const fc_lattice *l = &p->l;
    const int64_t r[3] = {most_taps(p, 0), most_taps(p, 1), most_taps(p, 2)};
    for (int64_t t = 0; t < r[0] * r[1] * r[2]; t++) tap_w[t] = FC_NO_TAP;
    for (int64_t t = 0; t < l->taps; t++) { /* in the order of their positions: gradients list them backwards */
        int64_t index = 0, inside = 1;
        for (int a = 0; a < 3; a++) {
            const int64_t beyond = (l->tap_at[3 * t + a] - p->first[a]) / p->dilation[a] - term->first[a];
            inside = inside && beyond >= 0 && beyond % l->step[a] == 0 && beyond / l->step[a] < term->taps[a];
            index = index * r[a] + beyond / l->step[a];
        }
        if (inside) tap_w[index] = l->tap_w[t];
    }
}

/* Transforms the weights of a term whose lanes do not lie side by side, or are fewer than a panel has, by way of copies of
 * some channels [tap][channel][lane]. */
static void transform_copied(const fc_wino *p, const real *w, const real *end, int64_t lanes, int64_t channels,
                             int64_t *tap_w, real *u) {
    const fc_kernels *k = p->l.kernels;
    real copy[COPIED_WEIGHTS / sizeof(real)];
    fc_lattice some = p->l;
    int64_t at[FC_WINO_TAPS * FC_WINO_TAPS * FC_WINO_TAPS];
    const int64_t all = most_taps(p, 0) * most_taps(p, 1) * most_taps(p, 2);
    some.tap_w = at, some.taps = 0;
    for (int64_t t = 0; t < all; t++)
        if (tap_w[t] != FC_NO_TAP) at[some.taps++] = tap_w[t];
    const int64_t most = COPIED_WEIGHTS / (int64_t)sizeof(real) / (max64(some.taps, 1) * k->nr);
    fc_wino_weights g = {.w = copy, .tap_w = tap_w, .channel_stride = k->nr, .ldq = p->ldq_u};
    for (int64_t c = 0; c < channels; c += most) {
        g.channels = some.in_channels = min64(most, channels - c);
        pack_panel(&some, w + c * p->l.w_stride[2], lanes, k->nr, end, copy, NULL);
        for (int64_t t = 0, copied = 0; t < all; t++)
            if (tap_w[t] != FC_NO_TAP) tap_w[t] = copied++ * g.channels * k->nr;
        g.u = u + c * k->nr;
        k->wino_weights(p->shape, &g);
    }
}

/* Transforms channels [c0, c1) of panel `index` of all groups' to [point][term][channel][nr]. */
static void transform_weights(const fc_wino *p, const void *w, int64_t index, int64_t c0, int64_t c1, real *panel_u) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t group = index / p->panels, panel = index % p->panels;
    const int64_t lanes = min64(k->nr, l->out_channels - panel * k->nr);
    const real *from = (const real *)w + group * l->w_stride[0] + panel * k->nr * l->w_stride[1] + c0 * l->w_stride[2];
    int64_t tap_w[FC_WINO_TAPS * FC_WINO_TAPS * FC_WINO_TAPS];
    part terms[FC_WINO_TERMS];
    list_terms(p, terms);
    for (int64_t i = 0; i < p->terms; i++) {
        taps_of(p, &terms[i], tap_w);
        real *u = panel_u + (i * l->in_channels + c0) * k->nr;
        if (l->w_stride[1] != 1 || lanes < k->nr) {
            transform_copied(p, from, weights_end(l, w), lanes, c1 - c0, tap_w, u);
            continue;
        }
        const fc_wino_weights g = {from, tap_w, l->w_stride[2], c1 - c0, u, p->ldq_u};
        k->wino_weights(p->shape, &g);
    }
}

void FC_NAME(fc_wino_pack)(const fc_wino *p, const void *w, void *packed, int64_t task) {
    const int64_t pieces = p->pack_tasks / (p->l.groups * p->panels), panel = task / pieces, c = task % pieces * PIECE;
    transform_weights(p, w, panel, c, min64(c + PIECE, p->l.in_channels), (real *)packed + panel * p->panel);
}

/* Where a tile lies along each axis: its first output in the sub-grid, the first output of the sub-grid, and its first
 * input position, from which the others lie a sub-grid's step apart. */
typedef struct {
    int64_t image, at[3], residue[3], in[3];
} place;

static place place_of(const fc_wino *p, int64_t tile) {
    place where;
    int64_t i = tile % p->tiles_per_grid, grid = tile / p->tiles_per_grid;
    for (int a = 2; a >= 0; a--) {
        where.at[a] = i % p->tiles[a] * shapes[p->shape].outputs[a];
        i /= p->tiles[a];
        where.residue[a] = p->grids[a] == 1 ? 0 : grid % p->grids[a];
        if (p->grids[a] > 1) grid /= p->grids[a];
        where.in[a] = where.at[a] * p->l.step[a] * p->dilation[a] + where.residue[a] + p->first[a];
    }
    where.image = grid;
    return where;
}

/* `ceil_div`, mostly without the division. */
static int64_t steps(int64_t n, int64_t step) { return step == 1 ? n : ceil_div(n, step); }

/* Transforms the patches of tiles [from, to), whose channels are contiguous. */
static void input_nhwc(const fc_wino *p, const part *terms, const real *in, int64_t from, int64_t to, real *v) {
    const fc_lattice *l = &p->l;
    fc_wino_input g = {.channels = l->in_channels, .ldq = p->ldq_v};
    for (int64_t tile = from; tile < to; tile++) {
        const place where = place_of(p, tile);
        const real *image = in + where.image * l->in_stride[0];
        for (int64_t i = 0; i < p->terms; i++) {
            g.in = image;
            for (int a = 0; a < 3; a++) {
                const int64_t step = l->step[a] * p->dilation[a];
                const int64_t first = where.in[a] + terms[i].first[a] * p->dilation[a];
                g.in += first * l->in_stride[a + 2];
                g.stride[a] = step * l->in_stride[a + 2];
                g.low[a] = first < 0 ? steps(-first, step) : 0;
                g.high[a] = first < l->in_size[a] ? steps(l->in_size[a] - first, step) : 0;
            }
            g.v = v + (tile - from) * p->ldv + i * p->term_width;
            ((const fc_kernels *)l->kernels)->wino_input(p->shape, &g);
        }
    }
}

/* The same for other memory orders: tiles that are neighbours in a row share their patches' rows, which are brought
 * into blocks of VL channels first. */
static void input_any(const fc_wino *p, const part *terms, const real *in, int64_t from, int64_t to, real *v,
                      real *stage) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int *points = shapes[p->shape].points, *outputs = shapes[p->shape].outputs;
    const int64_t *d = p->dilation;
    fc_wino_input g = {.channels = k->vl, .ldq = p->ldq_v, .high = {points[0], points[1], points[2]}};
    for (int64_t tile = from, run; tile < to; tile += run) {
        const place where = place_of(p, tile);
        const real *image = in + where.image * l->in_stride[0];
        run = min64(to - tile, p->tiles[2] - where.at[2] / outputs[2]);
        const int64_t width = row_width(p, run), x = where.in[2];
        const int64_t low = min64(x < 0 ? steps(-x, d[2]) : 0, width);
        const int64_t high = max64(min64(x < l->in_size[2] ? steps(l->in_size[2] - x, d[2]) : 0, width), low);
        g.stride[2] = l->step[2] * k->vl, g.stride[1] = width * k->vl, g.stride[0] = points[1] * g.stride[1];
        for (int64_t c = 0; c < l->in_channels; c += k->vl)
            for (int64_t rows = 0; rows < p->terms; rows += p->parts[2]) { /* terms that share their rows */
                for (int z = 0; z < points[0]; z++)
                    for (int y = 0; y < points[1]; y++) {
                        real *row = stage + (z * points[1] + y) * width * k->vl;
                        const int64_t iz = where.in[0] + (z * l->step[0] + terms[rows].first[0]) * d[0];
                        const int64_t iy = where.in[1] + (y * l->step[1] + terms[rows].first[1]) * d[1];
                        if (iz < 0 || iz >= l->in_size[0] || iy < 0 || iy >= l->in_size[1]) {
                            memset(row, 0, (size_t)(width * k->vl) * sizeof(real));
                            continue;
                        }
                        memset(row, 0, (size_t)(low * k->vl) * sizeof(real));
                        k->channels_in(image + iz * l->in_stride[2] + iy * l->in_stride[3] +
                                           (x + low * d[2]) * l->in_stride[4] + c * l->in_stride[1],
                                       l->in_stride[1], l->in_stride[4] * d[2], l->in_channels - c, high - low,
                                       row + low * k->vl, k->vl);
                        memset(row + high * k->vl, 0, (size_t)((width - high) * k->vl) * sizeof(real));
                    }
                for (int64_t i = rows; i < rows + p->parts[2]; i++)
                    for (int64_t t = 0; t < run; t++) {
                        g.in = stage + (t * outputs[2] * l->step[2] + terms[i].first[2]) * k->vl;
                        g.v = v + (tile - from + t) * p->ldv + i * p->term_width + c;
                        k->wino_input(p->shape, &g);
                    }
            }
    }
}

/* Products of the tiles with one panel of weights. */
static void multiply(const fc_wino *p, const part *terms, const real *v, const real *u, int64_t tiles, int vectors,
                     real *m) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int points = points_of(p->shape);
    const int64_t strips = ceil_div(tiles, k->mr);
    fc_term sum[FC_WINO_TERMS];
    fc_gemm g = {.terms = sum, .lda = p->ldv, .ldb = k->nr, .ldc = k->nr, .n = vectors * k->vl};
    for (int q = 0; q < points; q++) {
        const int infinity = p->terms > 1 || terms->shorter ? at_infinity(p, q) : 0;
        int64_t term = 0, c = 0;
        for (g.add = 0;; g.add = 1) {
            const real *next = u + q * p->ldq_u; /* behind the weights of this partial sum, */
            int64_t length = 0;                  /* so many of each output channel */
            for (g.n_terms = 0; term < p->terms; term++, c = 0) {
                if (terms[term].shorter & infinity) continue;
                const int64_t room = CHUNK - length, rest = l->in_channels - c;
                if (length > 0 && (room == 0 || (rest > room && rest <= CHUNK))) break;
                fc_term *t = &sum[g.n_terms++];
                t->k = min64(rest, room);
                t->a = v + q * p->ldq_v + term * p->term_width + c;
                t->b = u + q * p->ldq_u + (term * l->in_channels + c) * k->nr;
                next = t->b + t->k * k->nr;
                length += t->k, c += t->k;
                if (c < l->in_channels) break;
            }
            if (!g.n_terms && g.add) break;
            for (int64_t i = 0; i < strips; i++) { /* strips of even height */
                const int64_t t0 = tiles * i / strips, t1 = tiles * (i + 1) / strips;
                g.a_shift = t0 * p->ldv;
                g.c = m + q * p->ldq_m + t0 * k->nr;
                fetch_weights(&g, next, length, i, strips);
                k->gemm_row((int)(t1 - t0), vectors, &g);
            }
            if (term == p->terms) break;
        }
    }
}

/* Transforms the products back and stores `channels` output channels of the tiles [from, to). */
static void output(const fc_wino *p, const real *m, int64_t from, int64_t to, int64_t channels, const real *bias,
                   real *out, real *stage, real *check) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int *outputs = shapes[p->shape].outputs;
    const int in_place = l->out_stride[1] == 1;
    fc_wino_output g = {.ldq = p->ldq_m, .relu = p->relu, .check = check};
    for (int64_t tile = from, run; tile < to; tile += run) {
        const place where = place_of(p, tile);
        real *image = out + where.image * l->out_stride[0];
        int64_t count[3], stride[3], left = 1; /* outputs from the tile on; how many there are of those of the tile */
        for (int a = 0; a < 3; a++) {
            count[a] = steps(l->out_size[a] - where.residue[a], p->dilation[a]) - where.at[a];
            image += (where.at[a] * p->dilation[a] + where.residue[a]) * l->out_stride[a + 2];
            stride[a] = p->dilation[a] * l->out_stride[a + 2];
            left *= max64(min64(outputs[a], count[a]), 0);
        }
        run = in_place ? 1 : min64(to - tile, p->tiles[2] - where.at[2] / outputs[2]);
        if (!left) continue; /* of a sub-grid that has fewer outputs than others */
        if (in_place) {
            g.m = m + (tile - from) * k->nr, g.n = channels, g.bias = bias, g.out = image;
            for (int a = 0; a < 3; a++) g.stride[a] = stride[a], g.count[a] = min64(outputs[a], count[a]);
            k->wino_output(p->shape, &g);
            continue;
        }
        const int64_t width = run * outputs[2];
        g.stride[2] = k->vl, g.stride[1] = width * k->vl, g.stride[0] = outputs[1] * g.stride[1];
        for (int a = 0; a < 3; a++) g.count[a] = outputs[a];
        for (int64_t c = 0; c < channels; c += k->vl) {
            g.n = min64(k->vl, channels - c), g.bias = bias ? bias + c : NULL;
            for (int64_t t = 0; t < run; t++) {
                g.m = m + (tile - from + t) * k->nr + c;
                g.out = stage + t * outputs[2] * k->vl;
                k->wino_output(p->shape, &g);
            }
            for (int64_t z = 0; z < min64(outputs[0], count[0]); z++)
                for (int64_t y = 0; y < min64(outputs[1], count[1]); y++)
                    k->channels_out(
                        stage + (z * outputs[1] + y) * width * k->vl, k->vl, channels - c, min64(width, count[2]),
                        image + z * stride[0] + y * stride[1] + c * l->out_stride[1], l->out_stride[1], stride[2]);
        }
    }
}

int FC_NAME(fc_wino_run)(const fc_wino *p, const void *in_, const void *weights, const void *bias_, void *out_,
                         void *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int points = points_of(p->shape);
    const int64_t panel_block = task % p->panel_blocks, block = task / p->panel_blocks % p->blocks;
    const int64_t group = task / p->panel_blocks / p->blocks;
    const real *in = (const real *)in_ + l->in_offset + group * l->in_channels * l->in_stride[1];
    real *out = (real *)out_ + l->out_offset + group * l->out_channels * l->out_stride[1];
    const int64_t from = block * p->block_tiles, to = min64(from + p->block_tiles, p->all_tiles);

    char *w = workspace;
    real *v = take(&w, points * p->ldq_v * (int64_t)sizeof(real));
    real *m = take(&w, points * p->ldq_m * (int64_t)sizeof(real));
    real *stage = take(&w, p->stage * (int64_t)sizeof(real));
    real *check = take(&w, k->vl * (int64_t)sizeof(real));
    real *own = p->fused ? take(&w, p->panel * (int64_t)sizeof(real)) : NULL;
    memset(check, 0, (size_t)k->vl * sizeof(real));
    part terms[FC_WINO_TERMS];
    list_terms(p, terms);

    if (l->in_stride[1] == 1)
        input_nhwc(p, terms, in, from, to, v);
    else
        input_any(p, terms, in, from, to, v, stage);
    const int64_t last = min64((panel_block + 1) * p->panels_per_task, p->panels);
    for (int64_t panel = panel_block * p->panels_per_task; panel < last; panel++) {
        const int64_t first = panel * k->nr, channels = min64(k->nr, l->out_channels - first);
        const real *u = (const real *)weights + (group * p->panels + panel) * p->panel;
        if (p->fused) {
            transform_weights(p, weights, group * p->panels + panel, 0, l->in_channels, own);
            u = own;
        }
        const real *bias = bias_ ? (const real *)bias_ + group * l->out_channels + first : NULL;
        multiply(p, terms, v, u, to - from, channels > k->vl ? 2 : 1, m);
        output(p, m, from, to, channels, bias, out + first * l->out_stride[1], stage, check);
    }
    for (int i = 0; i < k->vl; i++)
        if (check[i] != 0) return 0;
    return 1;
}
