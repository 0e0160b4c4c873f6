/* Pools, one row of outputs at a time.
 *
 * pool_*_rows work in two steps, since maximum and sum are separable: the rows of the windows are first reduced to one
 * (lanes are columns, stride 1 whatever the pool's stride is), then its columns to outputs:
 *
 *      window rows   . . . . . . . .    ->   buffer   . . . . . . . .    ->   narrow   o   o   o
 *                    . . . . . . . .                  |---|                            lanes are outputs in the run
 *                    . . . . . . . .                      |---|
 *
 * Sums of n_d x n_h x n_w elements are made of partial sums of at most SPAN terms, rows and slices of windows, so that
 * their error is at most (SPAN + n_h * ceil(n_w / SPAN) + n_d) * eps * sum |x|, whatever the instruction set. */
#include <math.h>

#include "kernels.h"
#include "simd.h"

#define SPAN 128 /* a multiple of 4 * VL everywhere */

#ifdef FC_F32
#define POWER powf
#define ROOT sqrtf
#else
#define POWER pow
#define ROOT sqrt
#endif

typedef int64_t long_mask __attribute__((vector_size(8 * VL)));

/* ---- Vocabulary ----------------------------------------------------------------------------------------------- */

FC_INLINE void store_indices(int64_t *p, int64_t step, int64_t lanes, long_mask v) {
    if (step == 1 && lanes == VL) {
        memcpy(p, &v, sizeof v);
        return;
    }
    for (int64_t i = 0; i < lanes; i++) p[i * step] = v[i];
}

/* p[0], p[step], ... */
FC_INLINE mask load_positions(const lane *p, int64_t step) {
    mask m = {0};
    if (step == 1)
        memcpy(&m, p, sizeof m);
    else
        for (int i = 0; i < VL; i++) m[i] = p[i * step];
    return m;
}

/* p[0], p[step], ... for the lanes of a run; a buffer may be read beyond them. */
FC_INLINE vec load_run(const real *p, int64_t step, int64_t lanes, const int buffered) {
    if (buffered && step == 1) return vload(p);
#ifndef __clang__ /* has no shuffle by a computed mask */
    if (buffered && step == 2) {
        mask even = {0};
    FC_UNROLL for (int i = 0; i < VL; i++) even[i] = 2 * i;
        return __builtin_shuffle(vload(p), vload(p + VL), even);
    }
#endif
    return load_lanes(p, step, lanes);
}

FC_INLINE mask choose(mask a, mask b, mask m) { return (a & ~m) | (b & m); }

/* x^p; the two usual exponents need no libm. */
FC_INLINE vec vpower(vec x, real p) {
    if (p == 1) return x;
    if (p == 2) return x * x;
    for (int i = 0; i < VL; i++) x[i] = POWER(x[i], p);
    return x;
}

FC_INLINE real root_of(real x, real p) { return p == 1 ? x : p == 2 ? ROOT(x) : POWER(x, 1 / p); }

FC_INLINE vec vroot(vec x, real p) {
    if (p == 1) return x;
    for (int i = 0; i < VL; i++) x[i] = root_of(x[i], p);
    return x;
}

/* What the sum of output o is divided by. */
FC_INLINE real divisor_of(const fc_pool_row *r, int64_t o) {
    return (real)(r->divisor != 0 ? r->divisor : r->extent * (double)r->windows.extent[o] / r->volume);
}

/* d(y) / d(sum of the window) * dy, times p: dy / divisor for the average, times y^(1 - p) for Lp, which has no slope
 * where it is 0. */
FC_INLINE real slope(real dy, real y, real divisor, real p) {
    if (y == 0) return 0;
    return p == 1 ? dy / divisor : p == 2 ? dy / y / divisor : dy * POWER(y, 1 - p) / divisor;
}

/* The larger, or NaN. */
FC_INLINE vec vmax(vec a, vec b) {
    vec larger = a;
    for (int i = 0; i < VL; i++) larger[i] = a[i] > b[i] ? a[i] : b[i]; /* one instruction, which keeps a NaN in b */
    return vblend(larger, a, (mask)(a != a));
}

/* ---- Tiles ---------------------------------------------------------------------------------------------------- */

/* Neighbouring outputs of a run whose windows overlap or touch, lanes are channels: the rows of the windows are first
 * reduced to one, column by column, then its columns to outputs, which share them:
 *
 *      rows      . . . . . .
 *                . . . . . .    ->    columns   . . . . . .    ->    outputs   o o o o
 *                . . . . . .                    |---|                (kernel 3, stride 1)
 *                                                 |---|                                  */
enum { TILE = 4 };

FC_INLINE void pool_tile(const int is_max, const int count, const int run_step, const fc_pool_row *r, const real *from,
                         real *to, vec divisor) {
    const int columns = (TILE - 1) * run_step + count;
    vec column[9];
    FC_UNROLL for (int j = 0; j < columns; j++) column[j] = vload(from + j * r->wide_step);
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = d == 0; h < r->rows[1]; h++) {
            const real *row = from + d * r->wide_row[0] + h * r->wide_row[1];
            FC_UNROLL for (int j = 0; j < columns; j++) {
                const vec x = vload(row + j * r->wide_step);
                column[j] = is_max ? vmax(x, column[j]) : column[j] + x;
            }
        }
    FC_UNROLL for (int i = 0; i < TILE; i++) {
        vec v = column[i * run_step];
        FC_UNROLL for (int t = 1; t < count; t++) {
            const vec x = column[i * run_step + t];
            v = is_max ? vmax(x, v) : v + x;
        }
        vstore(to + i * r->narrow_step, is_max ? v : v / divisor);
    }
}

FC_INLINE int64_t tile_run(const int is_max, const int count, const int run_step, const fc_pool_row *row) {
    const fc_pool_row copy = *row, *r = &copy; /* which no store can change */
    const fc_windows *w = &r->windows;
    const vec divisor = vset(is_max ? 1 : divisor_of(r, w->run));
    for (int64_t o = w->run; o < w->run_end; o += TILE) {
        const int64_t at = lesser(o, w->run_end - TILE);
        const real *from = r->wide + w->first[at] * r->wide_step;
        real *to = r->narrow + at * r->narrow_step;
        for (int64_t c = 0; c < r->channels; c += VL) {
            const int64_t start = lesser(c, r->channels - VL);
            pool_tile(is_max, count, run_step, r, from + start, to + start, divisor);
        }
    }
    return 1;
}

/* The outputs of the run, if there are enough of them, in enough channels; returns whether. */
FC_INLINE int64_t pool_tiles(const fc_pool_row *r, const int is_max) {
    const fc_windows *w = &r->windows;
    if (w->run_end - w->run < TILE || r->channels < VL || w->step != 1 || r->rows[0] * r->rows[1] > SPAN / 2) return 0;
    const int64_t count = w->count[w->run], step = w->run_step;
    if (count == 2 && step == 2) return tile_run(is_max, 2, 2, r);
    if (count == 3 && step == 1) return tile_run(is_max, 3, 1, r);
    if (count == 3 && step == 2) return tile_run(is_max, 3, 2, r);
    return 0;
}

/* ---- Rows in registers ---------------------------------------------------------------------------------------- */

/* Without indices, the usual windows need no buffer: the rows under a vector of outputs are reduced in registers, then
 * columns, which are next to each other (stride 1) or every second or fourth lane of neighbouring vectors. */
#ifdef __clang__ /* has no shuffle by a computed mask */
FC_INLINE int row_in_registers(const fc_pool_row *r, const int is_max) {
    (void)r, (void)is_max;
    return 0;
}
#else
FC_INLINE vec reduce(const int is_max, vec total, vec x) { return is_max ? vmax(x, total) : total + x; }

/* Elements first, first + 2, ... of a and, from VL on, of b, which begins `shift` elements before the end of a. */
FC_INLINE vec every_second(vec a, vec b, int first, int64_t shift) {
    mask at = 2 * FC_NAME(iota) + first;
    at += (at >= VL) & (lane)shift;
    return __builtin_shuffle(a, b, at);
}

FC_INLINE vec outputs_in_registers(const int is_max, const int count, const int run_step, const fc_pool_row *r,
                                   const real *from, int64_t room) {
    const int loads = run_step == 2 ? (count == 3 ? 4 : 2) : count;
    const int64_t shift = run_step == 2 ? VL - lesser(VL, room - VL) : 0;
    const int64_t shift2 = run_step == 2 && count == 3 ? VL - lesser(VL, room - 2 - VL) : 0;
    int64_t at[4];
    FC_UNROLL for (int j = 0; j < 4; j++)
        at[j] = run_step == 1 ? j : run_step == 4 ? j * VL : j == 1 ? VL - shift : j == 3 ? 2 + VL - shift2 : j;
    vec column[4] = {{0}};
    for (int64_t d = 0; d < r->rows[0]; d++) {
        vec slice[4] = {{0}};
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real *row = from + d * r->wide_row[0] + h * r->wide_row[1];
            FC_UNROLL for (int j = 0; j < loads; j++)
                slice[j] = h == 0 ? vload(row + at[j]) : reduce(is_max, slice[j], vload(row + at[j]));
        }
        FC_UNROLL for (int j = 0; j < loads; j++) column[j] = d == 0 ? slice[j] : reduce(is_max, column[j], slice[j]);
    }
    if (run_step == 1) {
        vec v = column[0];
        FC_UNROLL for (int t = 1; t < count; t++) v = reduce(is_max, v, column[t]);
        return v;
    }
    vec v = reduce(is_max, every_second(column[0], column[1], 0, shift), every_second(column[0], column[1], 1, shift));
    if (run_step == 2) return count == 3 ? reduce(is_max, v, every_second(column[2], column[3], 0, shift2)) : v;
    const vec w = reduce(is_max, every_second(column[2], column[3], 0, 0), every_second(column[2], column[3], 1, 0));
    return reduce(is_max, every_second(v, w, 0, 0), every_second(v, w, 1, 0));
}

/* An output outside the run. */
FC_INLINE real one_output(const fc_pool_row *r, const int is_max, int64_t o) {
    real total = 0;
    for (int64_t t = 0; t < r->windows.count[o]; t++) {
        const real *from = r->wide + r->windows.first[o] - r->column + t;
        real column = 0;
        for (int64_t d = 0; d < r->rows[0]; d++)
            for (int64_t h = 0; h < r->rows[1]; h++) {
                const real x = from[d * r->wide_row[0] + h * r->wide_row[1]];
                if (is_max)
                    column = (d == 0 && h == 0) || x > column || x != x ? x : column;
                else
                    column += x;
            }
        if (is_max)
            total = t == 0 || column > total || column != column ? column : total;
        else
            total += column;
    }
    return is_max ? total : total / divisor_of(r, o);
}

FC_INLINE int run_in_registers(const fc_pool_row *r, const int is_max, const int count, const int run_step) {
    const fc_windows *w = &r->windows;
    const int64_t first = w->first[w->run] - r->column, run = w->run_end - w->run;
    const int64_t room = r->columns - first;
    if (run < VL && (run_step != 2 || room < VL + 2)) return 0;
    const vec divisor = vset(is_max ? 1 : divisor_of(r, w->run));
    for (int64_t o = 0; o < run; o += VL) {
        const int64_t lanes = lesser(run, VL), begin = lesser(o, run - lanes), skip = begin * run_step;
        const vec v = outputs_in_registers(is_max, count, run_step, r, r->wide + first + skip, room - skip);
        store_few(r->narrow + w->run + begin, 1, lanes, is_max ? v : v / divisor);
    }
    for (int64_t o = 0; o < r->outputs; o++) {
        if (o == w->run) o = w->run_end;
        if (o < r->outputs) r->narrow[o] = one_output(r, is_max, o);
    }
    return 1;
}

/* Whether the row could be done so. */
FC_INLINE int row_in_registers(const fc_pool_row *row, const int is_max) {
    const fc_pool_row copy = *row, *r = &copy; /* which no store can change */
    const fc_windows *w = &r->windows;
    if (r->wide_step != 1 || r->narrow_step != 1 || w->step != 1 || w->run < 0 || w->run_end - w->run < 2 ||
        r->rows[0] * r->rows[1] > SPAN / 2)
        return 0;
    const int64_t count = w->count[w->run], step = w->run_step;
    if (count == 2 && step == 2) return run_in_registers(r, is_max, 2, 2);
    if (count == 3 && step == 1 && !is_max) return run_in_registers(r, 0, 3, 1); /* of maxima, the borders take longer */
    if (count == 3 && step == 2) return run_in_registers(r, is_max, 3, 2);
    if (count == 4 && step == 4) return run_in_registers(r, is_max, 4, 4);
    return 0;
}
#endif

/* ---- Maximum -------------------------------------------------------------------------------------------------- */

/* Lanes in which v, which comes later, takes the place of best. */
FC_INLINE mask wins(vec v, vec best) { return (mask)(v > best) | (mask)(v != v); }

/* Columns [w, w + lanes) of `vectors` vectors: the maximum of the window rows, and where it lies, relative to the
 * first of them, if that is asked for. */
FC_INLINE void max_columns(const fc_pool_row *r, const int indices, int64_t w, int vectors, int64_t step,
                           int64_t lanes) {
    vec best[4];
    mask at[4];
    FC_UNROLL for (int v = 0; v < vectors; v++) {
        best[v] = load_lanes(r->wide + (w + v * VL) * step, step, lanes);
        at[v] = (mask){0};
    }
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real *row = r->wide + d * r->wide_row[0] + h * r->wide_row[1] + w * step;
            const mask here = (mask){0} + (lane)(d * r->index_row[0] + h * r->index_row[1]);
            FC_UNROLL for (int v = 0; v < vectors; v++) {
                const vec x = load_lanes(row + v * VL * step, step, lanes);
                if (!indices) {
                    best[v] = vmax(x, best[v]);
                    continue;
                }
                const mask m = wins(x, best[v]);
                best[v] = vblend(best[v], x, m);
                at[v] = choose(at[v], here, m);
            }
        }
    lane *rows = r->buffer_rows;
    FC_UNROLL for (int v = 0; v < vectors; v++) {
        vstore(r->buffer + w + v * VL, best[v]);
        if (indices) memcpy(rows + w + v * VL, &at[v], sizeof at[v]);
    }
}

/* Whether column `w` of a window takes the place of column `at` to the left of it.  Among equal columns the one with
 * the upper row comes first in row-major order; among NaNs the one with the lower row comes last. */
FC_INLINE mask wins_across(vec x, mask row, vec best, mask best_row) {
    return (mask)(x > best) | ((mask)(x == best) & (mask)(row < best_row)) |
           ((mask)(x != x) & ((mask)(best == best) | (mask)(row >= best_row)));
}

FC_INLINE int wins_across_1(real x, lane row, real best, lane best_row) {
    return x > best || (x == best && row < best_row) || (x != x && (best == best || row >= best_row));
}

/* Where the maximum of n >= VL elements in a row is. */
static int64_t max_span(const real *p, int64_t n) {
    mask lane_at, at;
    for (int i = 0; i < VL; i++) lane_at[i] = i;
    vec best = vload(p);
    at = lane_at;
    int64_t i = VL;
    for (; i + VL <= n; i += VL) {
        const vec x = vload(p + i);
        const mask m = wins(x, best);
        best = vblend(best, x, m);
        at = choose(at, lane_at + (lane)i, m);
    }
    int64_t found = at[0];
    for (int l = 1; l < VL; l++)
        if (wins_across_1(best[l], at[l], p[found], (lane)found)) found = at[l];
    for (; i < n; i++)
        if (wins_across_1(p[i], (lane)i, p[found], (lane)found)) found = i;
    return found;
}

FC_INLINE void max_across(const fc_pool_row *r, const real *line, int one_row) {
    const lane *rows = r->buffer_rows;
    const fc_windows *win = &r->windows;
    const int64_t run_step = win->run_step;
    long_mask lane_at;
    for (int i = 0; i < VL; i++) lane_at[i] = i * run_step;
    for (int64_t o = 0; o < r->outputs;) {
        const int64_t first = win->first[o] - r->column, end = first + win->count[o] * win->step;
        real *to = r->narrow + o * r->narrow_step;
        int64_t *index = r->indices + o * r->indices_step;
        if (o >= win->run && o + VL <= win->run_end) {
            vec best = load_lanes(line + first, run_step, VL);
            mask best_row = one_row ? (mask){0} : load_positions(rows + first, run_step), at = {0};
            for (int64_t w = first + win->step; w < end; w += win->step) {
                const vec x = load_lanes(line + w, run_step, VL);
                const mask row = one_row ? (mask){0} : load_positions(rows + w, run_step);
                const mask m = one_row ? wins(x, best) : wins_across(x, row, best, best_row);
                best = vblend(best, x, m);
                best_row = choose(best_row, row, m);
                at = choose(at, (mask){0} + (lane)(w - first), m);
            }
            store_lanes(to, r->narrow_step, VL, best);
            store_indices(index, r->indices_step, VL,
                          __builtin_convertvector(best_row + at, long_mask) + lane_at + (r->index + first));
            o += VL;
        } else {
            int64_t at = first;
            if (one_row && win->step == 1 && end - first >= 2 * VL)
                at += max_span(line + first, end - first);
            else
                for (int64_t w = first + win->step; w < end; w += win->step)
                    if (wins_across_1(line[w], one_row ? 0 : rows[w], line[at], one_row ? 0 : rows[at])) at = w;
            *to = line[at];
            *index = r->index + (one_row ? 0 : rows[at]) + at;
            o++;
        }
    }
}

FC_INLINE void max_all_columns(const fc_pool_row *r, const int indices) {
    int64_t w = 0;
    if (r->wide_step == 1 && r->columns >= VL) {
        for (; w + 4 * VL <= r->columns; w += 4 * VL) max_columns(r, indices, w, 4, 1, VL);
        for (; w < r->columns; w += VL) max_columns(r, indices, lesser(w, r->columns - VL), 1, 1, VL);
    }
    for (; w < r->columns; w += VL)
        max_columns(r, indices, w, 1, r->wide_step, lesser(VL, r->columns - w));
}

/* Values alone: whole vectors of a run from a buffer, which may be read beyond its columns. */
FC_INLINE void max_values_across(const fc_pool_row *r, const real *line, const int buffered) {
    const fc_windows *win = &r->windows;
    for (int64_t o = 0; o < r->outputs;) {
        const real *from = line + win->first[o] - r->column;
        const int64_t end = win->count[o] * win->step, lanes = lesser(VL, win->run_end - o);
        if (o >= win->run && lanes > 1) {
            vec best = load_run(from, win->run_step, lanes, buffered);
            for (int64_t w = win->step; w < end; w += win->step)
                best = vmax(load_run(from + w, win->run_step, lanes, buffered), best);
            store_few(r->narrow + o * r->narrow_step, r->narrow_step, lanes, best);
            o += lanes;
            continue;
        }
        real best = *from;
        for (int64_t w = win->step; w < end; w += win->step)
            best = from[w] > best || from[w] != from[w] ? from[w] : best;
        r->narrow[o++ * r->narrow_step] = best;
    }
}

static void pool_max_rows(const fc_pool_row *r) {
    if (!r->indices && row_in_registers(r, 1)) return;
    const int one_row = r->rows[0] == 1 && r->rows[1] == 1 && r->wide_step == 1;
    if (r->indices) {
        if (one_row)
            max_across(r, r->wide, 1);
        else {
            max_all_columns(r, 1);
            max_across(r, r->buffer, 0);
        }
    } else if (one_row)
        max_values_across(r, r->wide, 0);
    else {
        max_all_columns(r, 0);
        max_values_across(r, r->buffer, 1);
    }
}

/* Channels [c, c + lanes) of `vectors` vectors, for the window of output o. */
FC_INLINE void max_channels(const fc_pool_row *r, const int indices, int64_t o, int64_t c, int vectors, int64_t lanes) {
    const int64_t first = r->windows.first[o], count = r->windows.count[o], step = r->windows.step;
    const real *from = r->wide + first * r->wide_step + c;
    vec best[4];
    mask at[4];
    FC_UNROLL for (int v = 0; v < vectors; v++) {
        best[v] = load_lanes(from + v * VL, 1, lanes);
        at[v] = (mask){0};
    }
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real *row = from + d * r->wide_row[0] + h * r->wide_row[1];
            const int64_t row_at = d * r->index_row[0] + h * r->index_row[1];
            for (int64_t t = 0; t < count; t++) {
                const real *tap = row + t * step * r->wide_step;
                const mask here = (mask){0} + (lane)(row_at + t * step);
                FC_UNROLL for (int v = 0; v < vectors; v++) {
                    const vec x = load_lanes(tap + v * VL, 1, lanes);
                    if (!indices) {
                        best[v] = vmax(x, best[v]);
                        continue;
                    }
                    const mask m = wins(x, best[v]);
                    best[v] = vblend(best[v], x, m);
                    at[v] = choose(at[v], here, m);
                }
            }
        }
    real *to = r->narrow + o * r->narrow_step + c;
    int64_t *index = indices ? r->indices + o * r->indices_step + c : NULL;
    FC_UNROLL for (int v = 0; v < vectors; v++) {
        store_lanes(to + v * VL, 1, lanes, best[v]);
        if (indices)
            store_indices(index + v * VL, 1, lanes, __builtin_convertvector(at[v], long_mask) + (r->index + first));
    }
}

FC_INLINE void max_all_channels(const fc_pool_row *r, const int indices) {
    const int64_t tiled = !indices && pool_tiles(r, 1);
    for (int64_t o = 0; o < r->outputs; o++) {
        if (tiled && o == r->windows.run) o = r->windows.run_end;
        if (o == r->outputs) break;
        int64_t c = 0;
        for (; c + 4 * VL <= r->channels; c += 4 * VL) max_channels(r, indices, o, c, 4, VL);
        for (; c < r->channels; c += VL) max_channels(r, indices, o, c, 1, lesser(VL, r->channels - c));
    }
}

static void pool_max_channels(const fc_pool_row *r) {
    if (r->indices)
        max_all_channels(r, 1);
    else
        max_all_channels(r, 0);
}

/* ---- Sum ------------------------------------------------------------------------------------------------------ */

FC_INLINE void sum_columns(const fc_pool_row *r, int64_t w, int vectors, int64_t step, int64_t lanes, real p) {
    vec total[4];
    FC_UNROLL for (int v = 0; v < vectors; v++) total[v] = (vec){0};
    for (int64_t d = 0; d < r->rows[0]; d++) {
        vec slice[4];
        FC_UNROLL for (int v = 0; v < vectors; v++) slice[v] = (vec){0};
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real *row = r->wide + d * r->wide_row[0] + h * r->wide_row[1] + w * step;
            FC_UNROLL for (int v = 0; v < vectors; v++)
                slice[v] += vpower(load_lanes(row + v * VL * step, step, lanes), p);
        }
        FC_UNROLL for (int v = 0; v < vectors; v++) total[v] += slice[v];
    }
    FC_UNROLL for (int v = 0; v < vectors; v++) vstore(r->buffer + w + v * VL, total[v]);
}

FC_INLINE void sum_all_columns(const fc_pool_row *r, real p) {
    int64_t w = 0;
    if (r->wide_step == 1 && r->columns >= VL) {
        for (; w + 4 * VL <= r->columns; w += 4 * VL) sum_columns(r, w, 4, 1, VL, p);
        for (; w < r->columns; w += VL) sum_columns(r, lesser(w, r->columns - VL), 1, 1, VL, p);
    }
    for (; w < r->columns; w += VL)
        sum_columns(r, w, 1, r->wide_step, lesser(VL, r->columns - w), p);
}

/* The sum of n elements: pairwise down to SPAN. */
static real span(const real *p, int64_t step, int64_t n) {
    if (n > SPAN) {
        const int64_t half = (n / 2 + SPAN - 1) / SPAN * SPAN;
        return span(p, step, half) + span(p + half * step, step, n - half);
    }
    real sum = 0;
    if (step != 1 || n < VL) {
        for (int64_t i = 0; i < n; i++) sum += p[i * step];
        return sum;
    }
    vec part[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        FC_UNROLL for (int v = 0; v < 4; v++) part[v] += vload(p + i + v * VL);
    for (; i + VL <= n; i += VL) part[0] += vload(p + i);
    part[1] += load_lanes(p + i, 1, n - i);
    real lanes[VL];
    vstore(lanes, (part[0] + part[1]) + (part[2] + part[3]));
    FC_UNROLL for (int half = VL / 2; half > 0; half /= 2)
        FC_UNROLL for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

FC_INLINE void sum_across(const fc_pool_row *r, const real *line, const int buffered) {
    const fc_windows *win = &r->windows;
    for (int64_t o = 0; o < r->outputs;) {
        const int64_t first = win->first[o] - r->column, count = win->count[o];
        const real divisor = divisor_of(r, o);
        real *to = r->narrow + o * r->narrow_step;
        const int64_t lanes = lesser(VL, win->run_end - o);
        if (count <= SPAN && o >= win->run && lanes > 1) {
            vec sum = {0};
            for (int64_t t = 0; t < count; t++)
                sum += load_run(line + first + t * win->step, win->run_step, lanes, buffered);
            store_few(to, r->narrow_step, lanes, vroot(sum / vset(divisor), r->power));
            o += lanes;
        } else {
            *to = root_of(span(line + first, win->step, count) / divisor, r->power);
            o++;
        }
    }
}

static void pool_sum_rows(const fc_pool_row *r) {
    if (r->power == 1 && row_in_registers(r, 0)) return;
    if (r->rows[0] == 1 && r->rows[1] == 1 && r->wide_step == 1 && r->power == 1) {
        sum_across(r, r->wide, 0);
        return;
    }
    if (r->power == 1)
        sum_all_columns(r, 1);
    else
        sum_all_columns(r, r->power);
    sum_across(r, r->buffer, 1);
}

/* Means of whole lines of n >= VL elements, side by side; see fc_pool_run. */
static void pool_sum_lines(const real *from, int64_t line_step, int64_t lines, int64_t n, real divisor, real *to,
                           int64_t to_step) {
    mask last; /* of the last vector, which overlaps the one before, the lanes that are new */
    for (int i = 0; i < VL; i++) last[i] = i >= VL - n % VL ? -1 : 0;
    for (int64_t line = 0; line < lines; line += VL) {
        const int64_t count = lesser(lines - line, VL);
        real sums[VL * VL] = {0};
        for (int64_t i = 0; i < count; i++) {
            const real *p = from + (line + i) * line_step;
            vec sum = (vec)((mask)vload(p + n - VL) & last);
            for (int64_t x = 0; x + VL <= n; x += VL) sum += vload(p + x);
            vstore(sums + i * VL, sum);
        }
        real columns[VL * VL];
        channels_in(sums, VL, 1, VL, VL, columns, VL);
        vec total = vload(columns);
        for (int i = 1; i < VL; i++) total += vload(columns + i * VL);
        store_few(to + line * to_step, to_step, count, total / vset(divisor));
    }
}

FC_INLINE void sum_channels(const fc_pool_row *r, int64_t o, int64_t c, int vectors, int64_t lanes, real p) {
    const int64_t count = r->windows.count[o], tap = r->windows.step * r->wide_step;
    const real *from = r->wide + r->windows.first[o] * r->wide_step + c;
    vec total[4], slice[4], part[4];
    FC_UNROLL for (int v = 0; v < vectors; v++) total[v] = (vec){0};
    for (int64_t d = 0; d < r->rows[0]; d++) {
        FC_UNROLL for (int v = 0; v < vectors; v++) slice[v] = (vec){0};
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real *row = from + d * r->wide_row[0] + h * r->wide_row[1];
            for (int64_t t = 0; t < count;) {
                const int64_t end = lesser(t + SPAN, count);
                FC_UNROLL for (int v = 0; v < vectors; v++) part[v] = (vec){0};
                for (; t < end; t++)
                    FC_UNROLL for (int v = 0; v < vectors; v++)
                        part[v] += vpower(load_lanes(row + t * tap + v * VL, 1, lanes), p);
                FC_UNROLL for (int v = 0; v < vectors; v++) slice[v] += part[v];
            }
        }
        FC_UNROLL for (int v = 0; v < vectors; v++) total[v] += slice[v];
    }
    const vec divisor = vset(divisor_of(r, o));
    real *to = r->narrow + o * r->narrow_step + c;
    FC_UNROLL for (int v = 0; v < vectors; v++)
        store_lanes(to + v * VL, 1, lanes, vroot(total[v] / divisor, p));
}

FC_INLINE void sum_all_channels(const fc_pool_row *r, real p) {
    const int64_t tiled = p == 1 && pool_tiles(r, 0);
    for (int64_t o = 0; o < r->outputs; o++) {
        if (tiled && o == r->windows.run) o = r->windows.run_end;
        if (o == r->outputs) break;
        int64_t c = 0;
        for (; c + 4 * VL <= r->channels; c += 4 * VL) sum_channels(r, o, c, 4, VL, p);
        for (; c < r->channels; c += VL) sum_channels(r, o, c, 1, lesser(VL, r->channels - c), p);
    }
}

static void pool_sum_channels(const fc_pool_row *r) {
    if (r->power == 1)
        sum_all_channels(r, 1);
    else
        sum_all_channels(r, r->power);
}

/* ---- Gradient of the sum -------------------------------------------------------------------------------------- */

/* The way back of pool_sum_rows: outputs are spread over the columns of one row, which is added to each window row.
 * Outputs outside the run come first, so that a run of some length can go tap by tap. */
static void pool_spread_rows(const fc_pool_row *r) {
    const fc_windows *win = &r->windows;
    real *restrict line = r->buffer;
    real *restrict from = r->buffer + (r->columns + VL - 1) / VL * VL;
    const int64_t run = win->run_end - win->run, run_end = run >= VL ? win->run_end : win->run;
    for (int64_t w = 0; w < r->columns; w++) line[w] = 0;
    for (int64_t o = 0; o < r->outputs; o++) {
        const real y = r->y ? r->y[o * r->y_step] : 1;
        from[o] = slope(r->narrow[o * r->narrow_step], y, divisor_of(r, o), r->power);
        if (o < win->run || o >= run_end) {
            real *restrict to = line + win->first[o] - r->column;
            if (win->step == 1)
                for (int64_t t = 0; t < win->count[o]; t++) to[t] += from[o];
            else
                for (int64_t t = 0; t < win->count[o]; t++) to[t * win->step] += from[o];
        }
    }
    const int64_t taps = run_end > win->run ? win->count[win->run] : 0;
    for (int64_t t = 0; t < taps; t++) {
        real *to = line + win->first[win->run] - r->column + t * win->step;
        if (win->run_step == 1)
            for (int64_t i = 0; i < run; i++) to[i] += from[win->run + i];
        else
            for (int64_t i = 0; i < run; i++) to[i * win->run_step] += from[win->run + i];
    }
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++) {
            real *restrict row = r->wide + d * r->wide_row[0] + h * r->wide_row[1];
            if (r->wide_step == 1)
                for (int64_t w = 0; w < r->columns; w++) row[w] += line[w];
            else
                for (int64_t w = 0; w < r->columns; w++) row[w * r->wide_step] += line[w];
        }
}

FC_INLINE void spread_channels(const fc_pool_row *r, int64_t o, int64_t c, int vectors, int64_t lanes) {
    const int64_t count = r->windows.count[o], tap = r->windows.step * r->wide_step;
    const real divisor = divisor_of(r, o);
    vec from[4];
    FC_UNROLL for (int v = 0; v < vectors; v++) {
        vec dy = load_lanes(r->narrow + o * r->narrow_step + c + v * VL, 1, lanes);
        if (r->y) {
            const vec y = load_lanes(r->y + o * r->y_step + c + v * VL, 1, lanes);
            for (int i = 0; i < VL; i++) dy[i] = slope(dy[i], y[i], divisor, r->power);
        } else
            dy /= vset(divisor);
        from[v] = dy;
    }
    real *to = r->wide + r->windows.first[o] * r->wide_step + c;
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++) {
            real *row = to + d * r->wide_row[0] + h * r->wide_row[1];
            for (int64_t t = 0; t < count; t++, row += tap)
                FC_UNROLL for (int v = 0; v < vectors; v++)
                    store_lanes(row + v * VL, 1, lanes, load_lanes(row + v * VL, 1, lanes) + from[v]);
        }
}

static void pool_spread_channels(const fc_pool_row *r) {
    for (int64_t o = 0; o < r->outputs; o++) {
        int64_t c = 0;
        for (; c + 4 * VL <= r->channels; c += 4 * VL) spread_channels(r, o, c, 4, VL);
        for (; c + VL <= r->channels; c += VL) spread_channels(r, o, c, 1, VL);
        if (c < r->channels) spread_channels(r, o, c, 1, r->channels - c);
    }
}
