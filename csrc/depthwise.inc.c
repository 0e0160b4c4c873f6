/* Convolution of every channel by itself: no reduction over channels, so lanes are channels (NHWC) or pixels (NCHW). */
#include "kernels.h"
#include "simd.h"

/* m pixels x v channel vectors in registers; per tap v loads of weights, m * v loads of the input. */
FC_INLINE void FC_NAME(depthwise_tile)(const int m, const int v, const fc_depthwise *g, int64_t c, const real *w) {
    vec acc[4][2];
    FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++) acc[i][j] = (vec){0};
    for (int64_t t = 0; t < g->n_taps; t++, w += 2 * VL) {
        const real *x = g->taps[t] + c;
        vec wv[2];
        FC_UNROLL for (int j = 0; j < v; j++) wv[j] = vload(w + j * VL);
        FC_UNROLL for (int i = 0; i < m; i++) FC_UNROLL for (int j = 0; j < v; j++)
            acc[i][j] += vload(x + i * g->in_step + j * VL) * wv[j];
    }
    FC_UNROLL for (int j = 0; j < v; j++) {
        const vec bias = g->bias ? vload(g->bias + c + j * VL) : (vec){0};
        FC_UNROLL for (int i = 0; i < m; i++) {
            if (g->bias) acc[i][j] += bias;
            if (g->relu) acc[i][j] = vrelu(acc[i][j]);
            vstore(g->out + i * g->out_step + c + j * VL, acc[i][j]);
        }
    }
}

FC_INLINE void FC_NAME(depthwise_body)(const int m, const fc_depthwise *g) {
    const real *w = g->w;
    int64_t c = 0;
    for (; c + 2 * VL <= g->channels; c += 2 * VL, w += g->n_taps * 2 * VL) FC_NAME(depthwise_tile)(m, 2, g, c, w);
    if (c + VL <= g->channels) {
        FC_NAME(depthwise_tile)(m, 1, g, c, w);
        c += VL, w += VL;
    }
    for (; c < g->channels; c++, w++)
        for (int i = 0; i < m; i++) {
            real s = 0;
            for (int64_t t = 0; t < g->n_taps; t++) s += g->taps[t][c + i * g->in_step] * w[t * 2 * VL];
            if (g->bias) s += g->bias[c];
            if (g->relu && s < 0) s = 0;
            g->out[i * g->out_step + c] = s;
        }
}

static void depthwise_pixels(const fc_depthwise *g) {
    if (g->pixels == 4)
        FC_NAME(depthwise_body)(4, g);
    else
        FC_NAME(depthwise_body)(1, g);
}

/* m vectors of pixels from pixel i on; the last one may reach past the row. */
FC_INLINE void FC_NAME(depthwise_run)(const int m, const fc_depthwise *g, int64_t i) {
    vec acc[4];
    FC_UNROLL for (int j = 0; j < m; j++) acc[j] = (vec){0};
    for (int64_t t = 0; t < g->n_taps; t++) {
        const real w = g->w[t], *x = g->taps[t] + i;
        FC_UNROLL for (int j = 0; j < m; j++) acc[j] += w * vload(x + j * VL);
    }
    FC_UNROLL for (int j = 0; j < m; j++) {
        if (g->bias) acc[j] += *g->bias;
        if (g->relu) acc[j] = vrelu(acc[j]);
        const int64_t left = g->pixels - i - j * VL;
        real *out = g->out + (i + j * VL) * g->out_step;
        if (left >= VL && g->out_step == 1)
            vstore(out, acc[j]);
        else
            for (int l = 0; l < VL && l < left; l++) out[l * g->out_step] = acc[j][l];
    }
}

static void depthwise_row(const fc_depthwise *g) {
    int64_t i = 0;
    for (; i + 4 * VL <= g->pixels; i += 4 * VL) FC_NAME(depthwise_run)(4, g, i);
    const int64_t vectors = (g->pixels - i + VL - 1) / VL;
    if (vectors == 4)
        FC_NAME(depthwise_run)(4, g, i);
    else if (vectors == 3)
        FC_NAME(depthwise_run)(3, g, i);
    else if (vectors == 2)
        FC_NAME(depthwise_run)(2, g, i);
    else if (vectors == 1)
        FC_NAME(depthwise_run)(1, g, i);
}
