/* Gradient of max pools whose windows overlap, one row of inputs at a time; lanes are channels, see fc_pool_inputs.
 *
 *      maxima of the row            m=0 |-----|             that are maxima of the window get the dy of its output, and
 *      under each window            m=1    |-----|          give it to the first input that is equal: an input is loaded
 *                                   m=2       |-----|       once, and dx stored once
 *      inputs                           . . . . . . .       (kernel 3, stride 1)
 *
 * The first of equal maxima in row-major order lies in the first row that has one. */

/* Row r of outputs gives dy to the maximum m of a row under its window if that is the maximum of the window, which
 * then is taken: NaN is equal to nothing. */
FC_INLINE vec take_dy(const fc_pool_inputs *g, int64_t r, int64_t at, vec m) {
    const vec open = vload(g->open[r] + at);
    const mask hit = (mask)(m == open);
    vstore(g->open[r] + at, (vec)((mask)open | hit));
    return (vec)((mask)vload(g->dy[r] + at) & hit);
}

FC_INLINE vec take_all(const fc_pool_inputs *g, const int rows, int64_t at, vec m) {
    vec sum = take_dy(g, 0, at, m);
    if (rows == 2) return sum + take_dy(g, 1, at, m);
    if (rows == 1) return sum;
    for (int64_t r = 1; r < g->rows; r++) sum += take_dy(g, r, at, m);
    return sum;
}

/* The larger; of NaN, anything: what has one in its window is not found here. */
FC_INLINE vec larger(vec a, vec b) {
    for (int i = 0; i < VL; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}

/* Any windows, for channels [c, c + lanes). */
FC_INLINE void give_windows(const fc_pool_inputs *g, int64_t c, int64_t lanes) {
    const fc_windows *win = &g->windows;
    for (int64_t w = 0; w < g->columns; w++) store_few(g->dx + w * g->dx_step + c, 1, lanes, (vec){0});
    for (int64_t o = 0; o < g->outputs && g->rows > 0; o++) {
        const int64_t first = win->first[o], end = first + win->count[o] * win->step;
        vec m = load_few(g->x + first * g->x_step + c, lanes);
        for (int64_t w = first + win->step; w < end; w += win->step)
            m = larger(load_few(g->x + w * g->x_step + c, lanes), m);
        vec left = take_all(g, 0, (c / VL * g->outputs + o) * VL, m);
        for (int64_t w = first; w < end; w += win->step) {
            const mask hit = (mask)(load_few(g->x + w * g->x_step + c, lanes) == m);
            real *to = g->dx + w * g->dx_step + c;
            store_few(to, 1, lanes, load_few(to, lanes) + (vec)((mask)left & hit));
            left = (vec)((mask)left & ~hit);
        }
    }
}

/* Columns from w on under window o; `bounded`: not all of them exist. */
FC_INLINE void slide_step(const int count, const int run_step, const int rows, const int bounded,
                          const fc_pool_inputs *g, int64_t o, int64_t w, int64_t c, vec x[3], vec sum[3]) {
    const real *from = g->x + w * g->x_step + c;
    real *to = g->dx + w * g->dx_step + c;
    int valid[3];
    FC_UNROLL for (int t = 0; t < count; t++) valid[t] = !bounded || (w + t >= 0 && w + t < g->columns);
    FC_UNROLL for (int t = count - run_step; t < count; t++) {
        x[t] = valid[t] ? vload(from + t * g->x_step) : vset(-(real)INFINITY);
        sum[t] = (vec){0};
    }
    vec m = x[0];
    FC_UNROLL for (int t = 1; t < count; t++) m = larger(x[t], m);
    vec left = take_all(g, rows, (c / VL * g->outputs + o) * VL, m);
    FC_UNROLL for (int t = 0; t < count - 1; t++) {
        if (!valid[t]) continue;
        const mask hit = (mask)(x[t] == m);
        sum[t] += (vec)((mask)left & hit);
        left = (vec)((mask)left & ~hit);
    }
    sum[count - 1] += left;
    FC_UNROLL for (int t = 0; t < run_step; t++)
        if (valid[t]) vstore(to + t * g->dx_step, sum[t]);
    FC_UNROLL for (int t = 0; t < count - run_step; t++) x[t] = x[t + run_step], sum[t] = sum[t + run_step];
}

/* Windows of `count` columns, run_step apart but for the borders. */
FC_INLINE void give_slide(const int count, const int run_step, const int rows, const fc_pool_inputs *g, int64_t c) {
    vec x[3], sum[3];
    FC_UNROLL for (int t = 0; t < count - run_step; t++) {
        const int64_t w = g->first + t;
        x[t] = w >= 0 && w < g->columns ? vload(g->x + w * g->x_step + c) : vset(-(real)INFINITY), sum[t] = (vec){0};
    }
    int64_t o = 0, w = g->first;
    for (; o < g->outputs && w < 0; o++, w += run_step) slide_step(count, run_step, rows, 1, g, o, w, c, x, sum);
    for (; o < g->outputs && w + count <= g->columns; o++, w += run_step)
        slide_step(count, run_step, rows, 0, g, o, w, c, x, sum);
    for (; o < g->outputs; o++, w += run_step) slide_step(count, run_step, rows, 1, g, o, w, c, x, sum);
    FC_UNROLL for (int t = 0; t < count - run_step; t++)
        if (w + t >= 0 && w + t < g->columns) vstore(g->dx + (w + t) * g->dx_step + c, sum[t]);
    for (w = w + count - run_step; w < g->columns; w++) vstore(g->dx + w * g->dx_step + c, (vec){0});
}

FC_INLINE void give_row(const int count, const int run_step, const fc_pool_inputs *row) {
    const fc_pool_inputs copy = *row, *g = &copy; /* which no store can change */
    int64_t c = 0;
    for (; c + VL <= g->channels; c += VL) {
        if (g->rows == 1)
            give_slide(count, run_step, 1, g, c);
        else if (g->rows == 2)
            give_slide(count, run_step, 2, g, c);
        else
            give_slide(count, run_step, 0, g, c);
    }
    if (c < g->channels) give_windows(g, c, g->channels - c);
}

static void pool_max_give(const fc_pool_inputs *g) {
    if (g->rows > 0 && g->count == 3 && g->run_step == 1) return give_row(3, 1, g);
    if (g->rows > 0 && g->count == 3 && g->run_step == 2) return give_row(3, 2, g);
    if (g->rows > 0 && g->count == 2 && g->run_step == 1) return give_row(2, 1, g);
    int64_t c = 0;
    for (; c + VL <= g->channels; c += VL) give_windows(g, c, VL);
    if (c < g->channels) give_windows(g, c, g->channels - c);
}

/* See kernels.def. */
static int pool_max_open(const real *from, int64_t step, int64_t pixels, int64_t channels, real *to) {
    mask nan = {0};
    for (int64_t i = 0; i < pixels; i++, from += step)
        for (int64_t c = 0; c < channels; c += VL) {
            const vec v = load_few(from + c, lesser(VL, channels - c));
            nan |= (mask)(v != v);
            vstore(to + (c / VL * pixels + i) * VL, v);
        }
    return any_lane(nan);
}
