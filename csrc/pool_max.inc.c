/* Max pools, and their gradient; the vocabulary is in pool.inc.c. */
/* Lanes in which v, which comes later, takes the place of best. */
FC_INLINE mask wins(vec v, vec best) { return (mask)(v > best) | (mask)(v != v); }

/* Keeps the larger values and, if that is asked for, `here` where v is one. */
FC_INLINE void take_larger(const int indices, vec v, mask here, vec *best, mask *at) {
    if (!indices) {
        *best = vmax(v, *best);
        return;
    }
    const mask m = wins(v, *best);
    *best = vblend(*best, v, m);
    *at = choose(*at, here, m);
}

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
            FC_UNROLL for (int v = 0; v < vectors; v++)
                take_larger(indices, load_lanes(row + v * VL * step, step, lanes), here, &best[v], &at[v]);
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
    for (; i + VL <= n; i += VL) take_larger(1, vload(p + i), lane_at + (lane)i, &best, &at);
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

static void pool_max_rows(const fc_pool_row *row) {
    const int one_row = row->rows[0] == 1 && row->rows[1] == 1 && row->wide_step == 1;
    if (row->indices && one_row) {
        max_across(row, row->wide, 1);
        return;
    }
    if (row->indices) {
        max_all_columns(row, 1);
        max_across(row, row->buffer, 0);
        return;
    }
    if (lines_in_registers(row, 1)) return;
    fc_pool_row r = *row;
    for (int64_t line = 0; line < r.lines; line++, next_line(&r)) {
        if (!one_row) max_all_columns(&r, 0);
        if (one_row)
            max_values_across(&r, r.wide, 0);
        else
            max_values_across(&r, r.buffer, 1);
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
                FC_UNROLL for (int v = 0; v < vectors; v++)
                    take_larger(indices, load_lanes(tap + v * VL, 1, lanes), here, &best[v], &at[v]);
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

FC_INLINE int any_lane(mask m) {
    uint64_t words[FC_VBYTES / 8], all = 0;
    memcpy(words, &m, sizeof m);
    FC_UNROLL for (int i = 0; i < FC_VBYTES / 8; i++) all |= words[i];
    return all != 0;
}

/* The last tap that is NaN. */
static int64_t last_nan(const fc_pool_row *r, int64_t o, int64_t c) {
    const fc_windows *win = &r->windows;
    int64_t last = 0;
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++)
            for (int64_t t = 0; t < win->count[o]; t++) {
                const int64_t w = win->first[o] + t * win->step;
                const real x = r->wide[d * r->wide_row[0] + h * r->wide_row[1] + w * r->wide_step + c];
                if (x != x) last = d * r->tap_row[0] + h * r->tap_row[1] + t;
            }
    return last;
}

/* `here` in lanes where a is b, else `at`: two instructions, which GCC makes of such a loop alone. */
FC_INLINE mask where_equal(vec a, vec b, lane here, mask at) {
    mask m = at;
    for (int i = 0; i < VL; i++) m[i] = a[i] == b[i] ? here : at[i];
    return m;
}

/* The taps that are the maxima y, `count` to a row: the last one first, so that of equal ones the first remains. */
FC_INLINE void taps_of(const fc_pool_row *r, const int64_t count, int64_t o, int64_t c, int vectors, int64_t lanes) {
    typedef uint8_t bytes __attribute__((vector_size(VL)));
    const int64_t step = r->windows.step * r->wide_step;
    const real *from = r->wide + r->windows.first[o] * r->wide_step + c;
    vec y[4];
    mask at[4], none = {0};
    FC_UNROLL for (int v = 0; v < vectors; v++) {
        y[v] = load_few(r->narrow + o * r->narrow_step + c + v * VL, lanes);
        at[v] = (mask){0} - 1;
    }
    for (int64_t d = r->rows[0] - 1; d >= 0; d--)
        for (int64_t h = r->rows[1] - 1; h >= 0; h--) {
            const real *row = from + d * r->wide_row[0] + h * r->wide_row[1];
            const lane first = (lane)(d * r->tap_row[0] + h * r->tap_row[1]);
            FC_UNROLL for (int64_t t = count - 1; t >= 0; t--)
                FC_UNROLL for (int v = 0; v < vectors; v++)
                    at[v] = where_equal(load_few(row + t * step + v * VL, lanes), y[v], first + (lane)t, at[v]);
        }
    uint8_t *taps = r->taps + o * r->taps_step + c;
    FC_UNROLL for (int v = 0; v < vectors; v++) {
        const bytes b = __builtin_convertvector(at[v], bytes);
        memcpy(taps + v * VL, &b, lanes);
        none |= (mask)(at[v] < 0);
    }
    if (any_lane(none))
        for (int64_t i = 0; i < (vectors - 1) * VL + lanes; i++) {
            const real best = r->narrow[o * r->narrow_step + c + i];
            if (best != best) taps[i] = (uint8_t)last_nan(r, o, c + i);
        }
}

FC_INLINE void taps_of_all(const fc_pool_row *r, const int64_t count, int64_t o) {
    int64_t c = 0;
    for (; c + 4 * VL <= r->channels; c += 4 * VL) taps_of(r, count, o, c, 4, VL);
    for (; c + VL <= r->channels; c += VL) taps_of(r, count, o, c, 1, VL);
    if (c < r->channels) taps_of(r, count, o, c, 1, r->channels - c);
}

static void pool_max_channels(const fc_pool_row *row) {
    if (row->indices) {
        max_all_channels(row, 1);
        return;
    }
    max_all_channels(row, 0);
    if (row->taps == NULL) return;
    const fc_pool_row copy = *row, *r = &copy; /* which no store can change */
    for (int64_t o = 0; o < r->outputs; o++)
        if (r->windows.count[o] == 3)
            taps_of_all(r, 3, o);
        else
            taps_of_all(r, r->windows.count[o], o);
}

/* ---- Gradient --------------------------------------------------------------------------------------------------- */

/* Output o of channel c: dy goes to the first input that is equal to the maximum; of NaNs to the last. */
static void spread_one(const fc_pool_row *r, int64_t o, int64_t c) {
    const int64_t first = r->windows.first[o] - r->column, count = r->windows.count[o];
    const real best = r->y[o * r->y_step + c];
    real *to = NULL;
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++)
            for (int64_t t = 0; t < count && (to == NULL || best != best); t++) {
                const int64_t w = first + t * r->windows.step;
                const real x = r->x[d * r->x_row[0] + h * r->x_row[1] + w * r->x_step + c];
                if (x == best || (x != x && best != best))
                    to = r->wide + d * r->wide_row[0] + h * r->wide_row[1] + w * r->wide_step + c;
            }
    if (to) *to += r->narrow[o * r->narrow_step + c];
}

/* Lanes that `x` wins and nothing before did, which `open` loses. */
FC_INLINE mask hits(vec x, vec best, mask *open) {
    const mask hit = *open & (mask)(x == best);
    *open &= ~hit;
    return hit;
}

FC_INLINE void spread_max(const fc_pool_row *r, int64_t o, int64_t c, int vectors, int64_t lanes) {
    const int64_t first = r->windows.first[o], count = r->windows.count[o], step = r->windows.step;
    vec best[4], dy[4];
    mask open[4], nan = {0};
    FC_UNROLL for (int v = 0; v < vectors; v++) {
        best[v] = load_lanes(r->y + o * r->y_step + c + v * VL, 1, lanes);
        dy[v] = load_lanes(r->narrow + o * r->narrow_step + c + v * VL, 1, lanes);
        open[v] = ~(mask){0};
        nan |= (mask)(best[v] != best[v]);
    }
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++)
            for (int64_t t = 0; t < count; t++) {
                const int64_t w = first + t * step;
                const real *x = r->x + d * r->x_row[0] + h * r->x_row[1] + w * r->x_step + c;
                real *to = r->wide + d * r->wide_row[0] + h * r->wide_row[1] + w * r->wide_step + c;
                FC_UNROLL for (int v = 0; v < vectors; v++) {
                    const mask hit = hits(load_lanes(x + v * VL, 1, lanes), best[v], &open[v]);
                    store_lanes(to + v * VL, 1, lanes, (vec)((mask)dy[v] & hit));
                }
            }
    if (any_lane(nan))
        for (int64_t i = 0; i < vectors * lanes; i++)
            if (r->y[o * r->y_step + c + i] != r->y[o * r->y_step + c + i]) spread_one(r, o, c + i);
}

static void pool_max_spread_channels(const fc_pool_row *row) {
    const fc_pool_row copy = *row, *r = &copy; /* which no store can change */
    for (int64_t o = 0; o < r->outputs; o++) {
        int64_t c = 0;
        for (; c + 4 * VL <= r->channels; c += 4 * VL) spread_max(r, o, c, 4, VL);
        for (; c + VL <= r->channels; c += VL) spread_max(r, o, c, 1, VL);
        if (c < r->channels) spread_max(r, o, c, 1, r->channels - c);
    }
}

#ifdef __clang__ /* has no shuffle by a computed mask */
FC_INLINE int64_t spread_run(const fc_pool_row *r, int64_t o) {
    spread_one(r, o, 0);
    return 1;
}
#else
FC_INLINE void spread_nan(const fc_pool_row *r, int64_t o, int64_t lanes, vec best) {
    if (any_lane((mask)(best != best)))
        for (int64_t i = 0; i < lanes; i++)
            if (r->y[o + i] != r->y[o + i]) spread_one(r, o + i, 0);
}

/* `lanes` outputs of the run from o on; windows are run_step (1 or 2) columns apart. */
FC_INLINE void spread_lanes(const int run_step, const fc_pool_row *r, int64_t o, int64_t lanes) {
    const int64_t first = r->windows.first[o] - r->column, count = r->windows.count[o];
    const vec best = load_few(r->y + o, lanes), dy = load_few(r->narrow + o, lanes);
    mask open = ~(mask){0};
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real *x = r->x + d * r->x_row[0] + h * r->x_row[1] + first;
            real *to = r->wide + d * r->wide_row[0] + h * r->wide_row[1] + first;
            for (int64_t t = 0; t < count; t += run_step) {
                if (run_step == 1) {
                    const mask hit = hits(load_few(x + t, lanes), best, &open);
                    add_few(to + t, lanes, (vec)((mask)dy & hit));
                    continue;
                }
                /* two taps, which are the even and the odd columns */
                const int odd = t + 1 < count;
                const int64_t columns = 2 * lanes - !odd, left = lesser(columns, VL), right = columns - left;
                const vec a = load_few(x + t, left), b = right > 0 ? load_few(x + t + VL, right) : (vec){0};
                const vec p = (vec)((mask)dy & hits(every_second(a, b, 0, 0), best, &open));
                const vec q = odd ? (vec)((mask)dy & hits(every_second(a, b, 1, 0), best, &open)) : (vec){0};
                add_pairs(to + t, columns, p, q);
            }
        }
    spread_nan(r, o, lanes, best);
}

FC_INLINE void spread_pairs(const fc_pool_row *r, int64_t o, int64_t lanes) {
    const int64_t first = r->windows.first[o] - r->column, columns = 2 * lanes;
    const vec best = load_few(r->y + o, lanes), dy = load_few(r->narrow + o, lanes);
    mask open = ~(mask){0};
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++) {
            const real *x = r->x + d * r->x_row[0] + h * r->x_row[1] + first;
            const vec a = vload(x), b = vload(x + columns - VL);
            const vec even = every_second(a, b, 0, 2 * VL - columns), odd = every_second(a, b, 1, 2 * VL - columns);
            const vec p = (vec)((mask)dy & hits(even, best, &open)), q = (vec)((mask)dy & hits(odd, best, &open));
            store_pairs(r->wide + d * r->wide_row[0] + h * r->wide_row[1] + first, columns, p, q);
        }
    spread_nan(r, o, lanes, best);
}

/* Output o, or several of the run from there on; returns how many. */
FC_INLINE int64_t spread_run(const fc_pool_row *r, int64_t o) {
    const fc_windows *w = &r->windows;
    const int64_t lanes = lanes_of_run(r, o);
    if (lanes < 2 || r->x_step != 1 || r->y_step != 1) {
        spread_one(r, o, 0);
        return 1;
    }
    if (in_pairs(r, o, lanes))
        spread_pairs(r, o, lanes);
    else
        (w->run_step == 1 ? spread_lanes(1, r, o, lanes) : spread_lanes(2, r, o, lanes));
    return lanes;
}
#endif

static void pool_max_spread_rows(const fc_pool_row *row) {
    const fc_pool_row copy = *row, *r = &copy; /* which no store can change */
    for (int64_t o = 0; o < r->outputs;) o += spread_run(r, o);
}
