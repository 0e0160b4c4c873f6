/* Elementwise passes of training over contiguous runs: one pass over memory each. */
#include "kernels.h"
#include "simd.h"

#define FC_EACH(n, body)                                  \
    for (int64_t i = 0; i + VL <= (n); i += VL) body(VL); \
    if ((n) % VL) {                                       \
        const int64_t i = (n) / VL * VL, rest = (n) % VL; \
        body(rest);                                       \
    }
#define AT(p, lanes) load_lanes((p) + i, 1, lanes)
#define TO(p, lanes, v) store_lanes((p) + i, 1, lanes, v)

static void relu_run(const real *x, int64_t n, real *y) {
#define BODY(lanes) TO(y, lanes, vrelu(AT(x, lanes)))
    FC_EACH(n, BODY)
#undef BODY
}

static void relu_grad_run(const real *dy, const real *y, int64_t n, real *dx) {
#define BODY(lanes) TO(dx, lanes, (vec)((mask)AT(dy, lanes) & ~(mask)(AT(y, lanes) <= (vec){0})))
    FC_EACH(n, BODY)
#undef BODY
}

static void add_run(const real *a, const real *b, int relu, int64_t n, real *y) {
#define BODY(lanes)                                \
    do {                                           \
        const vec s = AT(a, lanes) + AT(b, lanes); \
        TO(y, lanes, relu ? vrelu(s) : s);         \
    } while (0)
    FC_EACH(n, BODY)
#undef BODY
}

static void sgd_run(const fc_sgd *g) {
    const int64_t n = g->n;
    const vec decay = vset(g->weight_decay), momentum = vset(g->momentum), fresh = vset(g->fresh), lr = vset(g->lr);
#define BODY(lanes)                                                                     \
    do {                                                                                \
        vec w = AT(g->value, lanes), d = AT(g->grad, lanes) + decay * w;                \
        if (g->velocity) {                                                              \
            const vec v = g->first ? d : momentum * AT(g->velocity, lanes) + fresh * d; \
            TO(g->velocity, lanes, v);                                                  \
            d = g->nesterov ? d + momentum * v : v;                                     \
        }                                                                               \
        TO(g->value, lanes, w - lr * d);                                                \
    } while (0)
    FC_EACH(n, BODY)
#undef BODY
}

FC_INLINE vec FC_NAME(vsqrt)(vec v) {
    real s[VL];
    vstore(s, v);
    for (int i = 0; i < VL; i++) s[i] = sizeof(real) == 4 ? __builtin_sqrtf((float)s[i]) : __builtin_sqrt(s[i]);
    return vload(s);
}

static void adam_run(const fc_adam *g) {
    const int64_t n = g->n;
    const vec decay = vset(g->weight_decay), shrink = vset(g->shrink), new1 = vset(g->new1), beta2 = vset(g->beta2);
    const vec new2 = vset(g->new2), root = vset(g->root), eps = vset(g->eps), rate = vset(g->rate);
#define BODY(lanes)                                                               \
    do {                                                                          \
        vec w = AT(g->value, lanes) * shrink, d = AT(g->grad, lanes) + decay * w; \
        vec m = AT(g->mean, lanes), s = AT(g->square, lanes);                     \
        m += new1 * (d - m);                                                      \
        s = beta2 * s + new2 * d * d;                                             \
        TO(g->mean, lanes, m);                                                    \
        TO(g->square, lanes, s);                                                  \
        TO(g->value, lanes, w - rate * m / (FC_NAME(vsqrt)(s) * root + eps));     \
    } while (0)
    FC_EACH(n, BODY)
#undef BODY
}

#undef FC_EACH
#undef AT
#undef TO
