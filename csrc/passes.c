/* Passes of training over whole arrays: normalisation, elementwise operations, steps of optimisers; see passes.h. */
#include "passes.h"

#include <stddef.h>
#include <string.h>

#include "blocking.h"
#include "kernels.h"

/* Most tasks by channels, and least pixels of one. */
enum { BLOCKS = 64, MIN_PIXELS = 64, MAX_WIDTH = 64 };

#ifdef FC_F32
void fc_pass_block(fc_pass *p) {
    p->block = 1, p->tasks = p->channels;
    if (!p->by_channels) return;
    p->block = max64(ceil_div(p->outer, BLOCKS), MIN_PIXELS);
    p->tasks = ceil_div(p->outer, p->block);
}

void fc_pass_merge(const fc_pass *p, int pass) {
    if (!p->by_channels) return;
    const int64_t channels = p->channels;
    double *sums = p->sums;
    for (int64_t task = 1; task < p->tasks; task++) {
        const double *part = sums + 2 * channels * task;
        const double before = (double)(task * p->block);
        const double n = (double)min64(p->block, p->outer - task * p->block), share = n / (before + n);
        for (int64_t c = 0; c < channels; c++) {
            if (pass != FC_PASS_MOMENTS) {
                sums[c] += part[c];
                sums[channels + c] += part[channels + c];
                continue;
            }
            const double delta = part[c] - sums[c]; /* Chan, Golub and LeVeque, 1983 */
            sums[c] += delta * share;
            sums[channels + c] += part[channels + c] + delta * delta * before * share;
        }
    }
}
#endif

static void by_channels(const fc_pass *p, int pass, int64_t task) {
    const fc_kernels *k = p->kernels;
    const int64_t first = task * p->block;
    fc_norm g = {.pixels = min64(p->block, p->outer - first),
                 .channels = p->channels,
                 .relu = p->relu,
                 .mean = p->mean,
                 .scale = p->scale,
                 .bias = p->bias,
                 .along = p->along,
                 .across = p->across,
                 .shift = p->shift,
                 .x_ld = p->x.outer,
                 .dy_ld = p->dy.outer,
                 .out_ld = p->out.outer};
    if (p->x.at) g.x = (const real *)p->x.at + first * g.x_ld;
    if (p->dy.at) g.dy = (const real *)p->dy.at + first * g.dy_ld;
    if (p->out.at) g.out = (real *)p->out.at + first * g.out_ld;
    if (p->sums) g.sums = p->sums + 2 * p->channels * task;
    switch (pass) {
    case FC_PASS_MOMENTS: k->norm_moments(g.x, g.x_ld, g.pixels, g.channels, g.sums, g.sums + g.channels); return;
    case FC_PASS_APPLY: k->norm_apply(&g); return;
    case FC_PASS_GRAD_APPLY: k->norm_grad_apply(&g); return;
    default:
        memset(g.sums, 0, 2 * (size_t)g.channels * sizeof(double));
        (pass == FC_PASS_SUMS ? k->column_sums : k->norm_grad_sums)(&g);
    }
}

/* The moments of `lanes` columns of `pixels` elements each as those of all of them, joined to those of `before` ones. */
static int64_t join(const double *mean, const double *m2, int64_t lanes, int64_t pixels, int64_t before,
                    double total[2]) {
    double m = 0, w = 0;
    for (int64_t i = 0; i < lanes; i++) m += mean[i];
    m /= (double)lanes;
    for (int64_t i = 0; i < lanes; i++) w += m2[i] + (double)pixels * (mean[i] - m) * (mean[i] - m);
    const double n = (double)(lanes * pixels), share = n / ((double)before + n), delta = m - total[0];
    total[0] += delta * share;
    total[1] += w + delta * delta * (double)before * share;
    return before + lanes * pixels;
}

/* One channel: its elements are dealt out over the lanes of a few vectors, as pixels of so many channels alike. */
static void by_planes(const fc_pass *p, int pass, int64_t c) {
    const fc_kernels *k = p->kernels;
    const int64_t width = min64(4 * k->vl, MAX_WIDTH), whole = p->inner / width, rest = p->inner % width;
    real constants[6][MAX_WIDTH];
    double sums[2 * MAX_WIDTH], total[2] = {0, 0};
    const void *const given[6] = {p->mean, p->scale, p->bias, p->along, p->across, p->shift};
    for (int i = 0; i < 6; i++)
        for (int64_t j = 0; given[i] && j < width; j++) constants[i][j] = ((const real *)given[i])[c];
    fc_norm g = {.relu = p->relu,
                 .mean = constants[0],
                 .scale = constants[1],
                 .bias = constants[2],
                 .along = constants[3],
                 .across = p->across ? constants[4] : NULL,
                 .shift = constants[5],
                 .x_ld = width,
                 .dy_ld = width,
                 .out_ld = width,
                 .sums = sums};
    int64_t before = 0;
    for (int64_t image = 0; image < p->outer; image++)
        for (int part = 0; part < 2; part++) {
            g.pixels = part ? 1 : whole, g.channels = part ? rest : width;
            if (g.pixels == 0 || g.channels == 0) continue;
            const int64_t at = part ? whole * width : 0;
            if (p->x.at) g.x = (const real *)p->x.at + image * p->x.outer + c * p->x.channel + at;
            if (p->dy.at) g.dy = (const real *)p->dy.at + image * p->dy.outer + c * p->dy.channel + at;
            if (p->out.at) g.out = (real *)p->out.at + image * p->out.outer + c * p->out.channel + at;
            switch (pass) {
            case FC_PASS_MOMENTS:
                k->norm_moments(g.x, g.x_ld, g.pixels, g.channels, sums, sums + g.channels);
                before = join(sums, sums + g.channels, g.channels, g.pixels, before, total);
                break;
            case FC_PASS_APPLY: k->norm_apply(&g); break;
            case FC_PASS_GRAD_APPLY: k->norm_grad_apply(&g); break;
            default:
                memset(sums, 0, 2 * (size_t)g.channels * sizeof(double));
                (pass == FC_PASS_SUMS ? k->column_sums : k->norm_grad_sums)(&g);
                for (int64_t i = 0; i < g.channels; i++) total[0] += sums[i], total[1] += sums[g.channels + i];
            }
        }
    if (p->sums) p->sums[c] = total[0], p->sums[p->channels + c] = total[1];
}

void FC_NAME(fc_pass_run)(const fc_pass *p, int pass, int64_t task) {
    (p->by_channels ? by_channels : by_planes)(p, pass, task);
}

void FC_NAME(fc_relu)(const void *kernels, const void *x, int64_t n, void *y) {
    ((const fc_kernels *)kernels)->relu_run(x, n, y);
}

void FC_NAME(fc_relu_grad)(const void *kernels, const void *dy, const void *y, int64_t n, void *dx) {
    ((const fc_kernels *)kernels)->relu_grad_run(dy, y, n, dx);
}

void FC_NAME(fc_add)(const void *kernels, const void *a, const void *b, int relu, int64_t n, void *y) {
    ((const fc_kernels *)kernels)->add_run(a, b, relu, n, y);
}

void FC_NAME(fc_sgd_step)(const void *kernels, void *value, void *velocity, const void *grad, int64_t n,
                          const double constants[4], int first, int nesterov) {
    const fc_sgd g = {.value = value,
                      .velocity = velocity,
                      .grad = grad,
                      .n = n,
                      .lr = (real)constants[0],
                      .momentum = (real)constants[1],
                      .fresh = (real)constants[2],
                      .weight_decay = (real)constants[3],
                      .first = first,
                      .nesterov = nesterov};
    ((const fc_kernels *)kernels)->sgd_run(&g);
}

void FC_NAME(fc_adam_step)(const void *kernels, void *value, void *mean, void *square, const void *grad, int64_t n,
                           const double constants[8]) {
    const fc_adam g = {.value = value,
                       .mean = mean,
                       .square = square,
                       .grad = grad,
                       .n = n,
                       .shrink = (real)constants[0],
                       .weight_decay = (real)constants[1],
                       .new1 = (real)constants[2],
                       .beta2 = (real)constants[3],
                       .new2 = (real)constants[4],
                       .rate = (real)constants[5],
                       .root = (real)constants[6],
                       .eps = (real)constants[7]};
    ((const fc_kernels *)kernels)->adam_run(&g);
}
