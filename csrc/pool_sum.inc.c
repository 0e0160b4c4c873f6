/* Average and Lp pools, and their gradient; the vocabulary is in pool.inc.c. */
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

static void pool_sum_rows(const fc_pool_row *row) {
    if (row->power == 1 && lines_in_registers(row, 0)) return;
    const int one_row = row->rows[0] == 1 && row->rows[1] == 1 && row->wide_step == 1 && row->power == 1;
    fc_pool_row r = *row;
    for (int64_t line = 0; line < r.lines; line++, next_line(&r)) {
        if (one_row) {
            sum_across(&r, r.wide, 0);
            continue;
        }
        if (r.power == 1)
            sum_all_columns(&r, 1);
        else
            sum_all_columns(&r, r.power);
        sum_across(&r, r.buffer, 1);
    }
}

/* a and b hold parts of sums, `parts` side by side of each: half as many of each of a's, then of each of b's.
 *
 *      a a a a a' a' a' a'    b b b b b' b' b' b'    ->    a a a' a' b b b' b'      (parts = 4)  */
FC_INLINE vec FC_NAME(halve_parts)(vec a, vec b, const int parts) {
    const int half = parts / 2;
#ifdef __clang__ /* has no shuffle by a computed mask */
    vec v;
    for (int i = 0; i < VL; i++) {
        const int at = i / half * parts + i % half;
        v[i] = at < VL ? a[at & (VL - 1)] + a[(at + half) & (VL - 1)] : b[at & (VL - 1)] + b[(at + half) & (VL - 1)];
    }
    return v;
#else
    mask at;
    FC_UNROLL for (int i = 0; i < VL; i++) at[i] = i / half * parts + i % half;
    return __builtin_shuffle(a, b, at) + __builtin_shuffle(a, b, at + half);
#endif
}

/* The first `parts` sums become half as many, if vectors have so many lanes. */
FC_INLINE void FC_NAME(halve_all)(vec sums[VL], const int parts) {
    if (parts > VL) return;
    FC_UNROLL for (int i = 0; i < parts / 2; i++)
        sums[i] = FC_NAME(halve_parts)(sums[2 * i], sums[2 * i + 1], parts);
}

/* Means of whole lines of n >= VL elements, side by side; see fc_pool_run. */
static void pool_sum_lines(const real *from, int64_t line_step, int64_t lines, int64_t n, real divisor, real *to,
                           int64_t to_step) {
    mask last; /* of the last vector, which overlaps the one before, the lanes that are new */
    for (int i = 0; i < VL; i++) last[i] = i >= VL - n % VL ? -1 : 0;
    for (int64_t line = 0; line < lines; line += VL) {
        const int64_t count = lesser(lines - line, VL);
        vec sums[VL];
        for (int64_t i = 0; i < VL; i++) {
            const real *p = from + (line + lesser(i, count - 1)) * line_step;
            vec sum = (vec)((mask)vload(p + n - VL) & last);
            for (int64_t x = 0; x + VL <= n; x += VL) sum += vload(p + x);
            sums[i] = sum;
        }
        FC_NAME(halve_all)(sums, 16);
        FC_NAME(halve_all)(sums, 8);
        FC_NAME(halve_all)(sums, 4);
        FC_NAME(halve_all)(sums, 2);
        store_few(to + line * to_step, to_step, count, sums[0] / vset(divisor));
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

/* Gradients of whole lines, side by side, the way back of pool_sum_lines. */
static void pool_spread_lines(const real *from, int64_t from_step, int64_t lines, real divisor, real *to,
                              int64_t line_step, int64_t n) {
    for (int64_t line = 0; line < lines; line++, to += line_step) {
        const vec v = vset(from[line * from_step] / divisor);
        for (int64_t x = 0; x + VL <= n; x += VL) vstore(to + x, v);
        vstore(to + n - VL, v);
    }
}

#ifdef __clang__ /* has no shuffle by a computed mask */
FC_INLINE int spread_in_registers(const fc_pool_row *r) {
    (void)r;
    return 0;
}
#else
FC_INLINE void spread_mean(const int run_step, const fc_pool_row *r, int64_t o, int64_t lanes) {
    const int64_t first = r->windows.first[o] - r->column, count = r->windows.count[o];
    const vec dy = load_few(r->narrow + o, lanes) / vset(divisor_of(r, o));
    for (int64_t d = 0; d < r->rows[0]; d++)
        for (int64_t h = 0; h < r->rows[1]; h++) {
            real *to = r->wide + d * r->wide_row[0] + h * r->wide_row[1] + first;
            if (run_step == 2 && in_pairs(r, o, lanes)) {
                store_pairs(to, 2 * lanes, dy, dy);
                continue;
            }
            for (int64_t t = 0; t < count; t += run_step)
                if (run_step == 1)
                    add_few(to + t, lanes, dy);
                else
                    add_pairs(to + t, 2 * lanes - (t + 1 == count), dy, t + 1 < count ? dy : (vec){0});
        }
}

/* Averages of small windows, output by output outside the run; returns whether that is what the row is. */
FC_INLINE int spread_in_registers(const fc_pool_row *r) {
    const fc_windows *w = &r->windows;
    if (r->y || w->run_end == w->run || lanes_of_run(r, w->run) < 2 || w->count[w->run] > 3) return 0;
    for (int64_t o = 0; o < r->outputs;) {
        const int64_t lanes = o < w->run_end ? lanes_of_run(r, o) : 0;
        if (lanes == 0)
            spread_mean(1, r, o++, 1);
        else {
            (w->run_step == 1 ? spread_mean(1, r, o, lanes) : spread_mean(2, r, o, lanes));
            o += lanes;
        }
    }
    return 1;
}
#endif

/* The way back of pool_sum_rows: outputs are spread over the columns of one row, which is added to each window row.
 * Outputs outside the run come first, so that a run of some length can go tap by tap. */
static void pool_spread_rows(const fc_pool_row *row) {
    const fc_pool_row copy = *row, *r = &copy; /* which no store can change */
    if (spread_in_registers(r)) return;
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
                FC_UNROLL for (int v = 0; v < vectors; v++) {
                    const vec before = r->apart ? (vec){0} : load_lanes(row + v * VL, 1, lanes);
                    store_lanes(row + v * VL, 1, lanes, before + from[v]);
                }
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
