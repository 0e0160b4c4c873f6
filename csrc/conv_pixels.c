/* Forward convolution and data gradient with lanes of pixels, from a padded copy of the input; see fc_pixels in
 * fastconv.h. */
#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "fastconv.h"
#include "kernels.h"

/* Budgets: the copy, in L2; weights of a panel and a chunk, in L1. */
enum { COPY_BYTES = 512 * 1024, PANEL_BYTES = 12 * 1024 };

/* Elements of a channel of the copy that lie a multiple of this apart fall into the same set of L1. */
enum { ALIAS_BYTES = 4096, LINE_BYTES = 64 };

static void size_copy(fc_pixels *p) {
    const fc_lattice *l = &p->l;
    const int64_t rows[3] = {1, p->box[0], p->box[1]};
    int64_t n = 1;
    for (int a = 0; a < 3; a++) {
        p->residues[a] = min64(l->step[a], p->span[a]);
        p->held[a] = rows[a] + (p->span[a] - 1) / l->step[a];
        n *= p->residues[a] * p->held[a];
    }
    const int64_t real_bytes = (int64_t)sizeof(real);
    p->plane = align64(n * real_bytes) / real_bytes;
    if (p->plane * real_bytes % ALIAS_BYTES == 0) p->plane += LINE_BYTES / real_bytes;
}

static int64_t copy_bytes(fc_pixels *p) {
    size_copy(p);
    return p->plane * p->l.in_channels * (int64_t)sizeof(real);
}

static int64_t box_tasks(const fc_pixels *p) {
    const int64_t *n = p->l.out_size;
    return p->l.batch * p->l.groups * n[0] * ceil_div(n[1], p->box[0]) * ceil_div(n[2], p->box[1]);
}

void FC_NAME(fc_pixels_block)(fc_pixels *p) {
    fc_lattice *l = &p->l;
    *l = p->phases[0];
    const fc_kernels *k = l->kernels;
    const int64_t real_bytes = (int64_t)sizeof(real);
    int64_t reduction = 0, most = 0;
    for (int64_t i = 0; i < p->n_phases; i++) {
        for (int a = 0; a < 3; a++) l->out_size[a] = max64(l->out_size[a], p->phases[i].out_size[a]);
        reduction += p->phases[i].taps * l->in_channels;
        most = max64(most, p->phases[i].taps);
    }
    for (int a = 0; a < 3; a++) {
        int64_t low = INT64_MAX, high = INT64_MIN;
        for (int64_t i = 0; i < p->n_phases; i++)
            for (int64_t t = 0; t < p->phases[i].taps; t++) {
                low = min64(low, p->phases[i].tap_at[3 * t + a]);
                high = max64(high, p->phases[i].tap_at[3 * t + a]);
            }
        p->low[a] = low <= high ? low : 0;
        p->span[a] = low <= high ? high - low + 1 : 1;
    }
    p->chunk = PANEL_BYTES / real_bytes / k->mr;
    p->panels = ceil_div(l->out_channels, k->mr);
    p->height = ceil_div(l->out_channels, max64(p->panels, 1));
    p->panel_size = reduction * k->mr;

    p->box[0] = max64(l->out_size[1], 1), p->box[1] = max64(l->out_size[2], 1);
    while (copy_bytes(p) > COPY_BYTES && p->box[0] > 1) p->box[0] = ceil_div(p->box[0], 2);
    while (copy_bytes(p) > COPY_BYTES && p->box[1] > 2 * k->nr) p->box[1] = ceil_div(p->box[1], 2);
    while (box_tasks(p) < p->min_tasks && p->box[0] * p->box[1] > 8 * k->nr && p->box[0] > 1)
        p->box[0] = ceil_div(p->box[0], 2);
    p->in_place = l->in_stride[4] == 1 && l->taps > 0;
    for (int a = 0; a < 3; a++)
        if (l->step[a] != 1 || p->span[a] != 1 || p->low[a] < 0 || p->low[a] + l->out_size[a] > l->in_size[a])
            p->in_place = 0;
    p->panels_per_task = max64(p->panels, 1);
    while (p->panels_per_task > 1 && box_tasks(p) * ceil_div(p->panels, p->panels_per_task) < p->min_tasks)
        p->panels_per_task = ceil_div(p->panels_per_task, 2);
    p->panel_blocks = ceil_div(p->panels, p->panels_per_task);
    size_copy(p);
    p->tasks = box_tasks(p) * p->panel_blocks;
    p->pack_tasks = l->groups * p->panels;
    p->packed_bytes = p->pack_tasks * p->panel_size * real_bytes;
    /* The last tile reads lanes beyond its pixels. */
    p->copy = p->plane * max64(l->in_channels, 1) + 2 * k->nr;
    p->max_terms = most + ceil_div(most * l->in_channels, p->chunk);
    p->workspace_bytes = align64(p->copy * real_bytes) + align64((p->n_phases * k->mr + 1) * k->nr * real_bytes) +
                         align64(p->n_phases * p->max_terms * (int64_t)sizeof(fc_term)) +
                         align64(p->n_phases * (int64_t)sizeof(real *)) +
                         align64(2 * p->n_phases * (int64_t)sizeof(int64_t));
}

/* packed[group][panel][phase][tap][channel][mr] */
void FC_NAME(fc_pixels_pack)(const fc_pixels *p, const void *w_, void *packed_, int64_t task) {
    const fc_lattice *l = &p->l;
    const int64_t mr = ((const fc_kernels *)l->kernels)->mr;
    const int64_t group = task / p->panels, first = task % p->panels * p->height;
    const int64_t valid = min64(p->height, l->out_channels - first);
    const real *w = (const real *)w_ + group * l->w_stride[0] + first * l->w_stride[1];
    real *to = (real *)packed_ + task * p->panel_size;
    for (int64_t i = 0; i < p->n_phases; i++)
        for (int64_t t = 0; t < p->phases[i].taps; t++)
            for (int64_t c = 0; c < l->in_channels; c++, to += mr) {
                const real *from = w + p->phases[i].tap_w[t] + c * l->w_stride[2];
                for (int64_t j = 0; j < valid; j++) to[j] = from[j * l->w_stride[1]];
                for (int64_t j = valid; j < mr; j++) to[j] = 0;
            }
}

/* One row of the copy for one residue: every step-th input from x on. */
static void copy_row(const fc_lattice *l, const real *row, int64_t x, int64_t count, real *to) {
    const int64_t step = l->step[2], stride = step * l->in_stride[4];
    int64_t low = min64(x < 0 ? ceil_div(-x, step) : 0, count);
    int64_t high = x < l->in_size[2] ? min64((l->in_size[2] - 1 - x) / step + 1, count) : 0;
    high = max64(high, low);
    for (int64_t i = 0; i < low; i++) to[i] = 0;
    const real *from = row + x * l->in_stride[4];
    if (stride == 1)
        memcpy(to + low, from + low, (size_t)(high - low) * sizeof(real));
    else
        for (int64_t i = low; i < high; i++) to[i] = from[i * stride];
    for (int64_t i = high; i < count; i++) to[i] = 0;
}

/* The same for both residues of step 2 at once. */
static void deal_row(const real *restrict row, int64_t size, int64_t x, int64_t count, real *restrict even,
                     real *restrict odd) {
    const int64_t low = min64(ceil_div(max64(-x, 0), 2), count),
                  high = max64(min64(max64(size - x, 0) / 2, count), low);
    for (int64_t i = 0; i < count; i++) { /* at the ends */
        if (i == low) i = high;
        if (i >= count) break;
        const int64_t at = x + 2 * i;
        even[i] = at >= 0 && at < size ? row[at] : 0;
        odd[i] = at + 1 >= 0 && at + 1 < size ? row[at + 1] : 0;
    }
    for (int64_t i = low; i < high; i++) even[i] = row[x + 2 * i], odd[i] = row[x + 2 * i + 1];
}

/* copy[channel][residues][slice][row][column], zeros in the padding; `at` is the input position of the first. */
static void copy_in(const fc_pixels *p, const real *in, const int64_t at[3], real *copy) {
    const fc_lattice *l = &p->l;
    const int64_t *n = p->held, *s = l->step, residue = n[0] * n[1] * n[2];
    const int dealt = s[2] == 2 && p->residues[2] == 2 && l->in_stride[4] == 1;
    for (int64_t c = 0; c < l->in_channels; c++, in += l->in_stride[1]) {
        real *to = copy + c * p->plane;
        for (int64_t rz = 0; rz < p->residues[0]; rz++)
            for (int64_t ry = 0; ry < p->residues[1]; ry++)
                for (int64_t rx = 0; rx < p->residues[2]; rx += 1 + dealt, to += dealt ? residue : 0)
                    for (int64_t i = 0; i < n[0]; i++)
                        for (int64_t j = 0; j < n[1]; j++, to += n[2]) {
                            const int64_t z = at[0] + i * s[0] + rz, y = at[1] + j * s[1] + ry;
                            const int outside = z < 0 || z >= l->in_size[0] || y < 0 || y >= l->in_size[1];
                            const real *row = in + z * l->in_stride[2] + y * l->in_stride[3];
                            if (outside) {
                                memset(to, 0, (size_t)n[2] * sizeof(real));
                                if (dealt) memset(to + residue, 0, (size_t)n[2] * sizeof(real));
                            } else if (dealt)
                                deal_row(row, l->in_size[2], at[2], n[2], to, to + residue);
                            else
                                copy_row(l, row, at[2] + rx, n[2], to);
                        }
    }
}

/* Where the inputs of output 0 of the box lie in the copy under a tap. */
static int64_t tap_offset(const fc_pixels *p, const int64_t *tap) {
    int64_t plane = 0, at = 0;
    for (int a = 0; a < 3; a++) {
        const int64_t distance = tap[a] - p->low[a];
        plane = plane * p->residues[a] + distance % p->l.step[a];
        at = at * p->held[a] + distance / p->l.step[a];
    }
    return plane * p->held[0] * p->held[1] * p->held[2] + at;
}

/* Where a box is read: in the copy or, where it holds all that a tile of whole vectors reads, in the input. */
typedef struct {
    const real *at;
    int64_t plane, pitch; /* between channels, between rows */
} source;

/* The terms of pixel 0 and of the panel at `weights` for each chunk of a phase, one after the other. */
static int64_t terms_of(const fc_pixels *p, const fc_lattice *phase, const real *weights, const source *s,
                        fc_term *terms) {
    const int64_t mr = ((const fc_kernels *)p->l.kernels)->mr;
    int64_t n = 0, room = p->chunk;
    for (int64_t t = 0; t < phase->taps; t++) {
        const real *from = s->at + tap_offset(p, phase->tap_at + 3 * t);
        for (int64_t c = 0, count; c < p->l.in_channels; c += count) {
            count = min64(p->l.in_channels - c, room);
            terms[n++] = (fc_term){weights, from + c * s->plane, count};
            weights += count * mr;
            room -= count;
            if (room == 0) room = p->chunk;
        }
    }
    return n;
}

/* The sums of one phase for `m` channels and `n` pixels, those of a channel `ldc` behind those of the one before. */
static void tile_of(const fc_pixels *p, const fc_term *terms, int64_t n_terms, int64_t ldb, int64_t a_shift,
                    int64_t b_shift, int m, int64_t n, const real *bias, real *to, int64_t ldc) {
    const fc_kernels *k = p->l.kernels;
    fc_gemm g = {.a_shift = a_shift, .b_shift = b_shift, .lda = k->mr, .ldb = ldb, .ldc = ldc, .c = to, .n = n};
    int64_t i = 0;
    do {
        int64_t sum = 0;
        g.terms = terms + i;
        for (g.n_terms = 0; i < n_terms && sum < p->chunk; g.n_terms++) sum += terms[i++].k;
        if (i == n_terms) g.bias_row = bias, g.relu = p->relu;
        k->gemm_col(m, n > k->vl ? 2 : 1, &g);
        g.add = 1;
    } while (i < n_terms);
}

/* The same, to where the sums are wanted. */
static void tile_in_place(const fc_pixels *p, const fc_term *terms, int64_t n_terms, int64_t ldb, int64_t a_shift,
                          int64_t b_shift, int m, int64_t n, const real *bias, real *to) {
    const int64_t ldc = p->l.out_stride[1];
    for (int c = 0; c < m; c++) /* stores would otherwise wait for memory at the end */
        for (int64_t i = 0; i < n; i += LINE_BYTES / (int64_t)sizeof(real)) __builtin_prefetch(to + c * ldc + i, 1);
    tile_of(p, terms, n_terms, ldb, a_shift, b_shift, m, n, bias, to, ldc);
}

int FC_NAME(fc_pixels_run)(const fc_pixels *p, const void *in_, const void *packed_, const void *bias_, void *out_,
                           void *workspace, int64_t task) {
    const fc_lattice *l = &p->l;
    const fc_kernels *k = l->kernels;
    const int64_t first_panel = task % p->panel_blocks * p->panels_per_task;
    const int64_t last_panel = min64(first_panel + p->panels_per_task, p->panels);
    int64_t i = task / p->panel_blocks;
    char *memory = workspace;
    real *copy = take(&memory, p->copy * (int64_t)sizeof(real));
    real *tile = take(&memory, (p->n_phases * k->mr + 1) * k->nr * (int64_t)sizeof(real));
    fc_term *terms = take(&memory, p->n_phases * p->max_terms * (int64_t)sizeof(fc_term));
    real **to = take(&memory, p->n_phases * (int64_t)sizeof(real *));
    int64_t *n = take(&memory, 2 * p->n_phases * (int64_t)sizeof(int64_t)), *n_terms = n + p->n_phases;

    int64_t at[3], from[3], count[3];
    const int64_t size[3] = {1, p->box[0], p->box[1]};
    for (int a = 2; a >= 0; a--) {
        const int64_t boxes = ceil_div(l->out_size[a], size[a]);
        from[a] = i % boxes * size[a];
        i /= boxes;
        count[a] = min64(size[a], l->out_size[a] - from[a]);
        at[a] = from[a] * l->step[a] + p->low[a];
    }
    const int64_t group = i % l->groups, image = i / l->groups;
    const int64_t out_at = image * l->out_stride[0] + group * l->out_channels * l->out_stride[1] +
                           from[0] * l->out_stride[2] + from[1] * l->out_stride[3] + from[2] * l->out_stride[4];
    const real *in = (const real *)in_ + l->in_offset + image * l->in_stride[0] +
                     group * l->in_channels * l->in_stride[1];
    source s = {.at = copy, .plane = p->plane, .pitch = p->held[2]};
    const int64_t row = count[1] > 1 ? l->in_stride[3] : count[2];
    if (p->in_place && row >= count[2] && 16 * row <= 17 * count[2] && (count[1] - 1) * row + count[2] >= k->nr)
        s = (source){in + at[0] * l->in_stride[2] + at[1] * l->in_stride[3] + at[2], l->in_stride[1], row};
    else
        copy_in(p, in, at, copy);

    const real *weights = (const real *)packed_ + (group * p->panels + first_panel) * p->panel_size;
    for (int64_t f = 0; f < p->n_phases; f++) {
        n_terms[f] = terms_of(p, p->phases + f, weights, &s, terms + f * p->max_terms);
        weights += p->phases[f].taps * l->in_channels * k->mr;
    }

    /* Pixels lie side by side, with `pitch` - count[2] between rows that are nobody's.  Where they are read in place, the
     * last tile overlaps the one before. */
    const int64_t pitch = s.pitch, pixels = (count[1] - 1) * pitch + count[2];
    fc_pixels_out g = {.tile_step = k->mr * k->nr, .phases = p->n_phases, .n = n, .to = to, .step = l->out_stride[4]};
    g.channel_step = l->out_stride[1];
    /* Tiles of one phase go to the output at once, but for those that reach into the next row.  None does, if vectors fit
     * into a row. */
    const int in_place = p->n_phases == 1 && l->out_stride[4] == 1;
    const int by_rows = in_place && s.at == copy && 16 * align_to(count[2], k->vl) <= 17 * pitch;
    for (int64_t panel = first_panel; panel < last_panel; panel++) {
        const int64_t channel = panel * p->height;
        const real *bias = bias_ ? (const real *)bias_ + group * l->out_channels + channel : NULL;
        const int64_t a_shift = (panel - first_panel) * p->panel_size;
        g.channels = min64(p->height, l->out_channels - channel);
        for (int64_t pixel = 0, lanes; pixel < pixels; pixel += lanes) {
            lanes = min64(k->nr, pixels - pixel);
            if (s.at != copy) lanes = align_to(lanes, k->vl), pixel = min64(pixel, pixels - lanes);
            const int64_t at_column = pixel % pitch, left = count[2] - at_column;
            if (by_rows || (in_place && lanes <= left)) {
                tile_in_place(p, terms, *n_terms, s.plane, a_shift, pixel, (int)g.channels, min64(lanes, left), bias,
                              (real *)out_ + p->phases->out_offset + out_at + channel * l->out_stride[1] +
                                  pixel / pitch * l->out_stride[3] + at_column);
                if (by_rows && left <= k->nr) lanes = pitch - at_column;
                continue;
            }
            for (int64_t f = 0; f < p->n_phases; f++)
                tile_of(p, terms + f * p->max_terms, n_terms[f], s.plane, a_shift, pixel, (int)g.channels,
                        align_to(lanes, k->vl), bias, tile + f * g.tile_step, k->nr);
            for (int64_t lane = 0, run; lane < lanes; lane += run) { /* rows of the output */
                const int64_t row = (pixel + lane) / pitch, column = (pixel + lane) % pitch;
                run = min64(pitch - column, lanes - lane);
                const int64_t wanted = min64(count[2] - column, run);
                if (wanted <= 0) continue;
                int64_t any = 0;
                for (int64_t f = 0; f < p->n_phases; f++) {
                    const fc_lattice *phase = p->phases + f;
                    const int inside = from[0] < phase->out_size[0] && from[1] + row < phase->out_size[1];
                    n[f] = inside ? max64(min64(wanted, phase->out_size[2] - from[2] - column), 0) : 0;
                    to[f] = (real *)out_ + phase->out_offset + out_at + channel * l->out_stride[1] +
                            row * l->out_stride[3] + column * l->out_stride[4];
                    any = max64(any, n[f]);
                }
                g.tile = tile + lane;
                if (any) k->pixels_out(&g);
            }
        }
    }
    return 1;
}
