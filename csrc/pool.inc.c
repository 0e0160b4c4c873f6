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

/* The larger; b, if one is NaN: one instruction. */
FC_INLINE vec larger(vec a, vec b) {
    vec v = a;
    for (int i = 0; i < VL; i++) v[i] = a[i] > b[i] ? a[i] : b[i];
    return v;
}

/* The larger, or NaN. */
FC_INLINE vec vmax(vec a, vec b) { return vblend(larger(a, b), a, (mask)(a != a)); }

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

FC_INLINE void next_line(fc_pool_row *r) { r->wide += r->line_wide, r->narrow += r->line_narrow; }

/* ---- Rows in registers ---------------------------------------------------------------------------------------- */

/* Without indices, the usual windows need no buffer: the rows under a vector of outputs are reduced in registers, then
 * columns, which are every second or fourth lane of neighbouring vectors, or lanes moved by one. */
#ifdef __clang__ /* has no shuffle by a computed mask */
FC_INLINE int lines_in_registers(const fc_pool_row *r, const int is_max) {
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
        at[j] = run_step == 4 ? j * VL : j == 1 ? VL - shift : j == 3 ? 2 + VL - shift2 : j;
    vec column[4] = {{0}};
    for (int64_t d = 0; d < r->rows[0]; d++) {
        vec slice[4] = {{0}};
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real *row = from + d * r->wide_row[0] + h * r->wide_row[1];
            FC_UNROLL for (int j = 0; j < loads; j++) __builtin_prefetch(row + at[j] + 2 * r->line_wide); /* rows are short */
            FC_UNROLL for (int j = 0; j < loads; j++)
                slice[j] = h == 0 ? vload(row + at[j]) : reduce(is_max, slice[j], vload(row + at[j]));
        }
        FC_UNROLL for (int j = 0; j < loads; j++) column[j] = d == 0 ? slice[j] : reduce(is_max, column[j], slice[j]);
    }
    vec v = reduce(is_max, every_second(column[0], column[1], 0, shift), every_second(column[0], column[1], 1, shift));
    if (run_step == 2) return count == 3 ? reduce(is_max, v, every_second(column[2], column[3], 0, shift2)) : v;
    const vec w = reduce(is_max, every_second(column[2], column[3], 0, 0), every_second(column[2], column[3], 1, 0));
    return reduce(is_max, every_second(v, w, 0, 0), every_second(v, w, 1, 0));
}

/* The rows under one column. */
FC_INLINE real column_under(const int is_max, const fc_pool_row *r, const real *from) {
    real total = 0;
    for (int64_t d = 0; d < r->rows[0]; d++) {
        real slice = 0;
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real x = from[d * r->wide_row[0] + h * r->wide_row[1]];
            slice = h == 0 ? x : !is_max ? slice + x : x > slice || x != x ? x : slice;
        }
        total = d == 0 ? slice : !is_max ? total + slice : slice > total || slice != slice ? slice : total;
    }
    return total;
}

/* An output outside the run. */
FC_INLINE real one_output(const fc_pool_row *r, const int is_max, int64_t o) {
    const real *from = r->wide + r->windows.first[o] - r->column;
    real total = 0;
    for (int64_t t = 0; t < r->windows.count[o]; t++) {
        const real x = column_under(is_max, r, from + t);
        total = t == 0 ? x : !is_max ? total + x : x > total || x != x ? x : total;
    }
    return is_max ? total : total / divisor_of(r, o);
}

/* The outputs outside [begin, run_end). */
FC_INLINE void outputs_besides(const fc_pool_row *r, const int is_max, int64_t begin) {
    for (int64_t o = 0; o < r->outputs; o++) {
        if (o == begin) o = r->windows.run_end;
        if (o < r->outputs) r->narrow[o] = one_output(r, is_max, o);
    }
}

/* The next ones return whether they could do the lines so. */
FC_INLINE int run_in_registers(const fc_pool_row *row, const int is_max, const int count, const int run_step) {
    fc_pool_row copy = *row; /* which no store can change */
    const fc_pool_row *r = &copy;
    const fc_windows *w = &r->windows;
    const int64_t first = w->first[w->run] - r->column, run = w->run_end - w->run;
    const int64_t room = r->columns - first;
    if (run < VL && (run_step != 2 || room < VL + 2)) return 0;
    const vec divisor = vset(is_max ? 1 : divisor_of(r, w->run));
    for (int64_t line = 0; line < r->lines; line++, next_line(&copy)) {
        for (int64_t o = 0; o < run; o += VL) {
            const int64_t lanes = lesser(run, VL), begin = lesser(o, run - lanes), skip = begin * run_step;
            const vec v = outputs_in_registers(is_max, count, run_step, r, r->wide + first + skip, room - skip);
            store_few(r->narrow + w->run + begin, 1, lanes, is_max ? v : v / divisor);
        }
        outputs_besides(r, is_max, w->run);
    }
    return 1;
}

/* The rows under a vector of columns; `height`: of one slice of so many rows, or 0. */
FC_INLINE vec rows_under(const int is_max, const int height, const fc_pool_row *r, const real *from) {
    vec v = vload(from);
    if (height) {
        FC_UNROLL for (int h = 1; h < height; h++) v = reduce(is_max, v, vload(from + h * r->wide_row[1]));
        return v;
    }
    for (int64_t h = 1; h < r->rows[1]; h++) v = reduce(is_max, v, vload(from + h * r->wide_row[1]));
    for (int64_t d = 1; d < r->rows[0]; d++) {
        const real *slice = from + d * r->wide_row[0];
        vec s = vload(slice);
        for (int64_t h = 1; h < r->rows[1]; h++) s = reduce(is_max, s, vload(slice + h * r->wide_row[1]));
        v = reduce(is_max, v, s);
    }
    return v;
}

/* Whether padding cuts a column off the first of n windows of three, one apart, and off the last. */
FC_INLINE int is_cut(const fc_windows *w) { return w->run == 1 && w->count[0] == 2 && w->first[0] == w->first[1]; }
FC_INLINE int is_cut_end(const fc_windows *w, int64_t n) {
    return n == w->run_end + 1 && w->count[n - 1] == 2 && w->first[n - 1] == w->first[n - 2] + 1;
}

/* Three columns of windows that begin one column apart, those that padding cuts short too: each vector of columns is
 * reduced once, and moved to the left and to the right, with a column of its neighbours, or of the padding.
 *
 *      columns     a b c d | e f g h        left     - a b c | d e f g        right     b c d e | f g h -       */
FC_INLINE int by_one(const fc_pool_row *row, const int is_max, const int height) {
    fc_pool_row copy = *row; /* which no store can change */
    const fc_pool_row *r = &copy;
    const fc_windows *w = &r->windows;
    const int64_t n = r->outputs, end = w->run_end - 1; /* the last whole window */
    const int cut = is_cut(w), cut_end = is_cut_end(w, n);
    if (n < VL || (w->run > 0 && !cut) || (end < n - 1 && !cut_end)) return 0;
    vec inner = vset(is_max ? 1 : divisor_of(r, w->run)), first = inner, last = inner;
    if (cut && !is_max) first[0] = divisor_of(r, 0);
    if (n == VL) last = first;
    if (cut_end && !is_max) last[VL - 1] = divisor_of(r, n - 1);
    if (n == VL) first = last;
    for (int64_t line = 0; line < r->lines; line++, next_line(&copy)) {
        const real *middle = r->wide + w->first[w->run] - r->column + 1 - cut; /* column of the first window */
        vec here = rows_under(is_max, height, r, middle), before = vset(is_max ? here[0] : 0);
        if (!cut) before = vset(column_under(is_max, r, middle - 1));
        int64_t from_before = VL - 1; /* the lane of what lies to the left */
        for (int64_t at = 0, next; at < n; at = next) {
            next = at + VL < n ? lesser(at + VL, n - VL) : n;
            vec after = vset(is_max ? here[VL - 1] : 0);
            if (next < n)
                after = rows_under(is_max, height, r, middle + next);
            else if (!cut_end)
                after = vset(column_under(is_max, r, middle + n));
            mask left = FC_NAME(iota) - 1, right = FC_NAME(iota) + 1;
            left[0] = (lane)(VL + from_before);
            right[VL - 1] = (lane)(next < n ? 2 * VL + at - next : VL);
            const vec v = reduce(is_max, reduce(is_max, __builtin_shuffle(here, before, left), here),
                                 __builtin_shuffle(here, after, right));
            const vec divisor = at == 0 ? first : next < n ? inner : last;
            vstore(r->narrow + at, is_max ? v : v / divisor);
            from_before = next - 1 - at;
            before = here, here = after;
        }
    }
    return 1;
}

#if FC_MASKED
/* The three columns of a row under a vector of outputs; *odd: whether one is NaN, for which maxima are wrong. */
FC_INLINE vec three_columns(const int is_max, const real *from, const lane_mask keep[3], lane_mask *odd) {
    if (!is_max) return load_chosen(from, keep[0]) + load_chosen(from + 1, keep[1]) + load_chosen(from + 2, keep[2]);
    const vec none = vset(-(real)INFINITY);
    const vec left = load_over(none, from, keep[0]), right = load_over(none, from + 2, keep[2]);
    *odd |= are_unordered(left, right); /* which are all columns, if there are two outputs */
    return larger(larger(left, load_over(none, from + 1, keep[1])), right);
}

/* The same windows as by_one, rows of any length.  Each row is reduced to outputs first, which the next two lines use again;
 * masks keep what padding cuts off from being loaded.  Returns 0 also if there is a NaN for maxima. */
FC_INLINE int by_one_masked(const fc_pool_row *r, const int is_max) {
    const fc_windows *w = &r->windows;
    const int64_t n = r->outputs, end = w->run_end - 1;
    const int cut = is_cut(w), cut_end = is_cut_end(w, n);
    if (n < 2 || n > (is_max ? 3 * VL : VL) || /* longer rows: by_one is as fast */
        (w->run > 0 && !cut) || (end < n - 1 && !cut_end)) return 0;
    const int rolls = r->rows[0] == 1 && r->rows[1] == 3 && r->line_wide == r->wide_row[1];
    const int64_t lines = r->lines, line_wide = r->line_wide, line_narrow = r->line_narrow, row = r->wide_row[1];
    const int64_t base = w->first[w->run] - r->column - cut; /* the column of the first tap of output 0 */
    for (int64_t o = 0; o < n; o += VL) {
        const int64_t at = n < VL ? 0 : lesser(o, n - VL);
        lane_mask keep[3], odd = 0;
        for (int t = 0; t < 3; t++)
            keep[t] = lanes_inside(base + at + t, r->columns);
        vec divisor = vset(is_max ? 1 : divisor_of(r, w->run));
        if (!is_max && cut && at == 0) divisor[0] = divisor_of(r, 0);
        if (!is_max && cut_end && n - at <= VL) divisor[n - 1 - at] = divisor_of(r, n - 1);
        const lane_mask written = first_lanes(n);
        const real *from = r->wide + base + at;
        real *to = r->narrow + at;
        vec before = {0}, last = {0};
        if (rolls) {
            before = three_columns(is_max, from, keep, &odd);
            last = three_columns(is_max, from + row, keep, &odd);
        }
        for (int64_t line = 0; line < lines; line++, from += line_wide, to += line_narrow) {
            vec v;
            if (rolls) {
                const vec next = three_columns(is_max, from + 2 * row, keep, &odd);
                v = is_max ? larger(larger(before, last), next) : before + last + next;
                before = last, last = next;
            } else {
                v = vset(is_max ? -(real)INFINITY : 0);
                for (int64_t d = 0; d < r->rows[0]; d++) {
                    vec slice = three_columns(is_max, from + d * r->wide_row[0], keep, &odd);
                    for (int64_t h = 1; h < r->rows[1]; h++) {
                        const vec x = three_columns(is_max, from + d * r->wide_row[0] + h * row, keep, &odd);
                        slice = is_max ? larger(slice, x) : slice + x;
                    }
                    v = is_max ? larger(v, slice) : v + slice;
                }
            }
            store_chosen(to, written, is_max ? v : v / divisor);
        }
        if (odd) return 0;
    }
    return 1;
}

/* By itself, as `twos`. */
static __attribute__((noinline)) int FC_NAME(ones_masked)(const fc_pool_row *r, int is_max) {
    return is_max ? by_one_masked(r, 1) : by_one_masked(r, 0);
}
#endif

/* Maxima of three columns, two apart: the even columns under a vector of outputs, the odd ones, and the odd ones of the
 * outputs before.  A window that begins before the first column, as padding makes it, has its own even column there. */
FC_INLINE int max_by_two(const fc_pool_row *row, const int height) {
    fc_pool_row copy = *row; /* which no store can change */
    const fc_pool_row *r = &copy;
    const fc_windows *w = &r->windows;
    const int before = w->run == 1 && w->count[0] == 2 && w->first[0] == w->first[1] - 1;
    const int64_t begin = w->run - before, n = w->run_end - begin;
    if (n < VL) return 0;
    for (int64_t line = 0; line < r->lines; line++, next_line(&copy)) {
        const real *even = r->wide + w->first[w->run] - 2 * before + 1 - r->column;
        vec last = {0};
        for (int64_t i = 0; i < n; i += VL) {
            const int64_t at = lesser(i, n - VL);
            const vec a = rows_under(1, height, r, even + 2 * at), b = rows_under(1, height, r, even + 2 * at + VL);
            const vec odd = every_second(a, b, 1, 0);
            if (at == 0)
                last = vset(before ? a[0] : column_under(1, r, even - 1));
            else if (at < i)
                last = vset(column_under(1, r, even + 2 * at - 1));
            const vec left = __builtin_shuffle(odd, last, (FC_NAME(iota) - 1) & (2 * VL - 1));
            vstore(r->narrow + begin + at, vmax(left, vmax(odd, every_second(a, b, 0, 0))));
            last = odd;
        }
        outputs_besides(r, 1, begin);
    }
    return 1;
}

FC_INLINE int is_power_of_two(real v) {
    lane bits;
    memcpy(&bits, &v, sizeof v);
    return (bits & (((lane)1 << (sizeof v == 4 ? 23 : 52)) - 1)) == 0; /* no mantissa */
}

/* Two columns, two apart, a vector of outputs or more.  Division by a power of two is exact as a product, too. */
FC_INLINE int in_twos(const fc_pool_row *row, const int is_max, const int height) {
    fc_pool_row copy = *row; /* which no store can change */
    const fc_pool_row *r = &copy;
    const fc_windows *w = &r->windows;
    const int64_t run = w->run_end - w->run;
    if (run < VL) return 0;
    const real divisor = is_max ? 1 : divisor_of(r, w->run);
    const int exact = is_power_of_two(divisor);
    const vec by = vset(exact ? 1 / divisor : divisor);
    for (int64_t line = 0; line < r->lines; line++, next_line(&copy)) {
        const real *from = r->wide + w->first[w->run] - r->column;
        for (int64_t o = 0; o < run; o += VL) {
            const int64_t at = lesser(o, run - VL);
            if (height && run >= 4 * VL) /* long rows: two lines ahead */
                FC_UNROLL for (int h = 0; h < height; h++) FC_UNROLL for (int k = 0; k < 2; k++)
                    __builtin_prefetch(from + 2 * at + k * VL + h * r->wide_row[1] + 2 * r->line_wide);
            const vec a = rows_under(is_max, height, r, from + 2 * at), b = rows_under(is_max, height, r, from + 2 * at + VL);
            const vec v = reduce(is_max, every_second(a, b, 0, 0), every_second(a, b, 1, 0));
            vstore(r->narrow + w->run + at, is_max ? v : exact ? v * by : v / by);
        }
        outputs_besides(r, is_max, w->run);
    }
    return 1;
}

/* By itself, so that the loops of other windows are compiled as without it. */
static __attribute__((noinline)) int FC_NAME(twos)(const fc_pool_row *r, int is_max) {
    const int two = r->rows[0] == 1 && r->rows[1] == 2; /* the usual windows */
    if (is_max) return two ? in_twos(r, 1, 2) : in_twos(r, 1, 0);
    return two ? in_twos(r, 0, 2) : in_twos(r, 0, 0);
}

FC_INLINE int lines_in_registers(const fc_pool_row *r, const int is_max) {
    const fc_windows *w = &r->windows;
    if (r->wide_step != 1 || r->narrow_step != 1 || w->step != 1 || w->run < 0 || w->run_end - w->run < 2 ||
        r->rows[0] * r->rows[1] > SPAN / 2)
        return 0;
    const int64_t count = w->count[w->run], step = w->run_step;
    const int square = r->rows[0] == 1 && r->rows[1] == 3; /* the usual windows */
    if (count == 2 && step == 2 && FC_NAME(twos)(r, is_max)) return 1;
    if (count == 2 && step == 2) return run_in_registers(r, is_max, 2, 2);
#if FC_MASKED
    if (count == 3 && step == 1 && FC_NAME(ones_masked)(r, is_max)) return 1;
#endif
    if (count == 3 && step == 1) return square ? by_one(r, is_max, 3) : by_one(r, is_max, 0);
    if (is_max && count == 3 && step == 2 && (square ? max_by_two(r, 3) : max_by_two(r, 0))) return 1;
    if (count == 3 && step == 2) return run_in_registers(r, is_max, 3, 2);
    if (count == 4 && step == 4) return run_in_registers(r, is_max, 4, 4);
    return 0;
}

FC_INLINE void add_few(real *to, int64_t n, vec v) {
    if (n > 0) store_few(to, 1, n, load_few(to, n) + v);
}

/* Adds even[0], odd[0], even[1], ... to `columns` elements. */
FC_INLINE void add_pairs(real *to, int64_t columns, vec even, vec odd) {
    const mask pair = FC_NAME(iota) / 2 + (FC_NAME(iota) & 1) * VL;
    add_few(to, lesser(columns, VL), __builtin_shuffle(even, odd, pair));
    add_few(to + VL, columns - VL, __builtin_shuffle(even, odd, pair + VL / 2));
}

/* The same, but stored, for VL to 2 * VL columns. */
FC_INLINE void store_pairs(real *to, int64_t columns, vec even, vec odd) {
    const mask pair = FC_NAME(iota) / 2 + (FC_NAME(iota) & 1) * VL;
    vstore(to, __builtin_shuffle(even, odd, pair));
    vstore(to + columns - VL, __builtin_shuffle(even, odd, pair + (lane)(columns - VL) / 2));
}

/* Whether windows are two columns, side by side, and `lanes` of them a vector or more: what they cover is written once,
 * so that whole vectors can be. */
FC_INLINE int in_pairs(const fc_pool_row *r, int64_t o, int64_t lanes) {
    return r->apart && r->windows.run_step == 2 && r->windows.count[o] == 2 && 2 * lanes >= VL;
}

/* How many outputs from o on the gradients can take as lanes: those of a run, one or two columns apart. */
FC_INLINE int64_t lanes_of_run(const fc_pool_row *r, int64_t o) {
    const fc_windows *w = &r->windows;
    const int fits = r->wide_step == 1 && r->narrow_step == 1 && w->step == 1 && (w->run_step == 1 || w->run_step == 2);
    return fits && o >= w->run ? lesser(VL, w->run_end - o) : 0;
}
#endif
