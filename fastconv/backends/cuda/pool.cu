// Pools and their gradients. Windows come as tables, `tables`, for each axis one behind the other:
//
//     first[out], step[out], count[out], extent[out]     output o covers first[o] + i * step[o] for i < count[o]
//     low[in], high[in]                                  outputs whose windows may hold an input: low <= o < high
//
// Neighbouring threads take neighbouring elements: channels if CHANNELS_FAST, else pixels. INDEX counts elements, int or
// int64. LANES threads share an output's window: 1, or a warp's 32 where windows are large.
#include "prim.cuh"

struct Pool {
  int64 x_strides[5], y_strides[5]; // of the arrays of in_size and of out_size: first those that every pass has
  int64 x2_strides[5], y2_strides[5]; // then a second of each: x beside dx, y or indices beside dy
  int in_size[3], out_size[3];
  int batch, channels;
};
struct Window {
  int first, step, count, extent;
};
struct Element {
  int n, c, at[3];
};

__device__ __forceinline__ Element element_at(INDEX i, const int (&size)[3], int channels) {
  Element e;
  if (CHANNELS_FAST) e.c = (int)(i % channels), i /= channels;
  e.at[2] = (int)(i % size[2]), i /= size[2];
  e.at[1] = (int)(i % size[1]), i /= size[1];
  e.at[0] = (int)(i % size[0]), i /= size[0];
  if (!CHANNELS_FAST) e.c = (int)(i % channels), i /= channels;
  e.n = (int)i;
  return e;
}
__device__ __forceinline__ int64 plane_of(const int64 (&s)[5], const Element &e) { return e.n * s[0] + e.c * s[1]; }
__device__ __forceinline__ int64 offset_of(const int64 (&s)[5], const Element &e) {
  return plane_of(s, e) + e.at[0] * s[2] + e.at[1] * s[3] + e.at[2] * s[4];
}
__device__ __forceinline__ const int *table_of(const Pool &p, const int *tables, int axis) {
  for (int a = 0; a < axis; a++) tables += 4 * p.out_size[a] + 2 * p.in_size[a];
  return tables;
}
__device__ __forceinline__ Window window_of(const Pool &p, const int *tables, int axis, int o) {
  const int *t = table_of(p, tables, axis), n = p.out_size[axis];
  Window w = {t[o], t[n + o], t[2 * n + o], t[3 * n + o]};
  return w;
}
// KIND says what a sum is of: -1 an average, else of powers p: KIND is p if that is 1 or 2, else 0.
#ifdef KIND
__device__ __forceinline__ real power(real x, real p) {
#if KIND == 0
  return pow(x, p);
#elif KIND == 2
  return x * x;
#else
  return x;
#endif
}
#endif

#if LANES == 32
#define SHARE(i) (i / 32)
#else
#define SHARE(i) (i)
#endif

// ---- maximum: of equal ones the first counts, NaN is greater than everything, and of several the last counts -------
struct Best {
  real value;
  int64 at;
};
__device__ __forceinline__ bool better(const Best &a, const Best &b) { // whether a beats b
  if (a.at < 0 || b.at < 0) return a.at >= 0;
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan || b_nan) return a_nan && (!b_nan || a.at > b.at);
  return a.value > b.value || (a.value == b.value && a.at < b.at);
}
#ifdef MAX_POOL
extern "C" __global__ void __launch_bounds__(256, 2)
    max_pool(const element *__restrict__ x, element *__restrict__ y, int64 *__restrict__ indices,
             const int *__restrict__ tables, const Pool p) {
  const INDEX outputs = (INDEX)p.batch * p.channels * p.out_size[0] * p.out_size[1] * p.out_size[2];
  const INDEX i = SHARE(((INDEX)blockIdx.x * 256 + threadIdx.x));
  if (i >= outputs) return;
  const Element e = element_at(i, p.out_size, p.channels);
  const Window d = window_of(p, tables, 0, e.at[0]), h = window_of(p, tables, 1, e.at[1]),
               w = window_of(p, tables, 2, e.at[2]);
  x += plane_of(p.x_strides, e);
  Best best = {real(0), -1};
  const int area = h.count * w.count;
  for (int t = LANES == 1 ? 0 : threadIdx.x % 32; t < d.count * area; t += LANES) {
    const int64 a = d.first + t / area * d.step, b = h.first + t % area / w.count * h.step,
                c = w.first + t % w.count * w.step;
    const Best next = {to_real(__ldg(&x[a * p.x_strides[2] + b * p.x_strides[3] + c * p.x_strides[4]])),
                       (a * p.in_size[1] + b) * p.in_size[2] + c};
    if (better(next, best)) best = next;
  }
#if LANES == 32
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    const Best other = {__shfl_xor_sync(~0u, best.value, mask), __shfl_xor_sync(~0u, best.at, mask)};
    if (better(other, best)) best = other;
  }
  if (threadIdx.x % 32) return;
#endif
  y[offset_of(p.y_strides, e)] = to_element(best.value);
  if (indices) indices[offset_of(p.y2_strides, e)] = best.at;
}
FC_EXPORT(max_pool)
#endif

// ---- sums: averages and Lp norms ------------------------------------------------------------------------------------
#ifdef SUM_POOL
extern "C" __global__ void __launch_bounds__(256, 2)
    sum_pool(const element *__restrict__ x, element *__restrict__ y, const int *__restrict__ tables, const Pool p,
             const real exponent, const real divisor, const real volume) {
  const INDEX outputs = (INDEX)p.batch * p.channels * p.out_size[0] * p.out_size[1] * p.out_size[2];
  const INDEX i = SHARE(((INDEX)blockIdx.x * 256 + threadIdx.x));
  if (i >= outputs) return;
  const Element e = element_at(i, p.out_size, p.channels);
  const Window d = window_of(p, tables, 0, e.at[0]), h = window_of(p, tables, 1, e.at[1]),
               w = window_of(p, tables, 2, e.at[2]);
  x += plane_of(p.x_strides, e);
  real sum = real(0);
#if LANES == 32
  const int area = h.count * w.count;
  for (int t = threadIdx.x % 32; t < d.count * area; t += LANES) {
    const int64 a = d.first + t / area * d.step, b = h.first + t % area / w.count * h.step,
                c = w.first + t % w.count * w.step;
    const real v = to_real(__ldg(&x[a * p.x_strides[2] + b * p.x_strides[3] + c * p.x_strides[4]]));
    sum += power(v, exponent);
  }
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  if (threadIdx.x % 32) return;
#else
  for (int a = 0; a < d.count; a++) { // sums of rows, of planes and of all: errors grow with the longest axis
    real plane = real(0);
    for (int b = 0; b < h.count; b++) {
      real row = real(0);
      const element *from = x + (d.first + (int64)a * d.step) * p.x_strides[2] +
                            (h.first + (int64)b * h.step) * p.x_strides[3] + w.first * p.x_strides[4];
      for (int c = 0; c < w.count; c++) {
        const real v = to_real(__ldg(&from[(int64)c * w.step * p.x_strides[4]]));
        row += power(v, exponent);
      }
      plane += row;
    }
    sum += plane;
  }
#endif
  const real extent = (real)d.extent * (real)h.extent * (real)w.extent;
#if KIND < 0
  sum /= divisor != real(0) ? divisor : extent;
#else
  sum *= volume / extent;
#if KIND == 2
  sum = sqrt(sum);
#elif KIND == 0
  sum = pow(sum, real(1) / exponent);
#endif
#endif
  y[offset_of(p.y_strides, e)] = to_element(sum);
}
FC_EXPORT(sum_pool)
#endif

// ---- gradients of sums: every input gathers from the windows that hold it, in order ---------------------------------
#ifdef SUM_POOL_GRAD
struct Range {
  const int *table;
  int outputs, low, high;
};
__device__ __forceinline__ Range range_of(const Pool &p, const int *tables, int axis, int i) {
  Range r;
  r.table = table_of(p, tables, axis);
  r.outputs = p.out_size[axis];
  r.low = r.table[4 * r.outputs + i];
  r.high = r.table[4 * r.outputs + p.in_size[axis] + i];
  return r;
}
// The extent of window o if it holds position i, else 0.
__device__ __forceinline__ int extent_if_inside(const Range &r, int o, int i) {
  const int from = i - r.table[o], step = r.table[r.outputs + o];
  const bool holds = from >= 0 && from % step == 0 && from / step < r.table[2 * r.outputs + o];
  return holds ? r.table[3 * r.outputs + o] : 0;
}
extern "C" __global__ void __launch_bounds__(256, 2)
    sum_pool_grad(element *__restrict__ dx, const element *__restrict__ dy, const element *__restrict__ x,
                  const element *__restrict__ y, const int *__restrict__ tables, const Pool p, const real exponent,
                  const real divisor, const real volume) {
  const INDEX inputs = (INDEX)p.batch * p.channels * p.in_size[0] * p.in_size[1] * p.in_size[2];
  const INDEX i = (INDEX)blockIdx.x * 256 + threadIdx.x;
  if (i >= inputs) return;
  const Element e = element_at(i, p.in_size, p.channels);
  const Range d = range_of(p, tables, 0, e.at[0]), h = range_of(p, tables, 1, e.at[1]),
              w = range_of(p, tables, 2, e.at[2]);
  dy += plane_of(p.y_strides, e);
  if (KIND >= 0) y += plane_of(p.y2_strides, e);
  real sum = real(0);
  for (int a = d.low; a < d.high; a++) {
    const int deep = extent_if_inside(d, a, e.at[0]);
    for (int b = h.low; deep && b < h.high; b++) {
      const int high = extent_if_inside(h, b, e.at[1]);
      for (int c = w.low; high && c < w.high; c++) {
        const int wide = extent_if_inside(w, c, e.at[2]);
        if (!wide) continue;
        const real extent = (real)deep * (real)high * (real)wide;
        const real g = to_real(__ldg(&dy[a * p.y_strides[2] + b * p.y_strides[3] + c * p.y_strides[4]]));
#if KIND < 0
        sum += g / (divisor != real(0) ? divisor : extent);
#else
        const real v = to_real(__ldg(&y[a * p.y2_strides[2] + b * p.y2_strides[3] + c * p.y2_strides[4]]));
        const real root = KIND == 1 ? real(1) : KIND == 2 ? real(1) / v : pow(v, real(1) - exponent);
        if (v != real(0)) sum += g * root * (volume / extent);
#endif
      }
    }
  }
#if KIND == 0 || KIND == 2
  const real v = to_real(x[offset_of(p.x2_strides, e)]);
  sum *= KIND == 2 ? v : pow(v, exponent - real(1));
#endif
  dx[offset_of(p.x_strides, e)] = to_element(sum);
}
FC_EXPORT(sum_pool_grad)
#endif

// ---- by index ------------------------------------------------------------------------------------------------------------
// dx[indices[o]] += dy[o] (ADDS), or = dy[o], of which the last counts. A warp takes a plane, 32 outputs after the other,
// so that the order is fixed. Indices outside of the plane are skipped.
#ifdef SCATTER
extern "C" __global__ void __launch_bounds__(128)
    scatter(element *__restrict__ dx, const element *__restrict__ dy, const int64 *__restrict__ indices, const Pool p) {
  const int64 plane = (int64)blockIdx.x * 4 + threadIdx.x / 32;
  if (plane >= (int64)p.batch * p.channels) return;
  const int lane = threadIdx.x % 32, outputs = p.out_size[0] * p.out_size[1] * p.out_size[2];
  const int64 inputs = (int64)p.in_size[0] * p.in_size[1] * p.in_size[2];
  Element e;
  e.n = (int)(plane / p.channels);
  e.c = (int)(plane % p.channels);
  dx += plane_of(p.x_strides, e);
  dy += plane_of(p.y_strides, e);
  indices += plane_of(p.y2_strides, e);
  for (int base = 0; base < outputs; base += 32) {
    const int o = base + lane;
    int64 at = -1 - lane; // nobody else's
    real value = real(0);
    if (o < outputs) {
      const int64 a = o / p.out_size[2] / p.out_size[1], b = o / p.out_size[2] % p.out_size[1], c = o % p.out_size[2];
      const int64 index = indices[a * p.y2_strides[2] + b * p.y2_strides[3] + c * p.y2_strides[4]];
      if (index >= 0 && index < inputs) {
        at = index;
        value = to_real(dy[a * p.y_strides[2] + b * p.y_strides[3] + c * p.y_strides[4]]);
      }
    }
    const unsigned same = __match_any_sync(~0u, at);
    const bool mine = lane == (ADDS ? __ffs((int)same) - 1 : 31 - __clz((int)same));
    if (ADDS && __ballot_sync(~0u, same != 1u << lane)) {
      real total = real(0);
      for (int l = 0; l < 32; l++) {
        const real other = __shfl_sync(~0u, value, l);
        if (same >> l & 1) total += other;
      }
      value = total;
    }
    if (at >= 0 && mine) {
      const int64 row = at / p.in_size[2];
      element &to = dx[row / p.in_size[1] * p.x_strides[2] + row % p.in_size[1] * p.x_strides[3] +
                       at % p.in_size[2] * p.x_strides[4]];
      to = to_element(ADDS ? to_real(to) + value : value);
    }
    __syncwarp();
  }
}
FC_EXPORT(scatter)
#endif

// dy[o] = dx[indices[o]], or 0 for an index outside of the plane.
#ifdef GATHER
extern "C" __global__ void __launch_bounds__(256, 2)
    gather(const element *__restrict__ dx, element *__restrict__ dy, const int64 *__restrict__ indices, const Pool p) {
  const INDEX outputs = (INDEX)p.batch * p.channels * p.out_size[0] * p.out_size[1] * p.out_size[2];
  const INDEX i = (INDEX)blockIdx.x * 256 + threadIdx.x;
  if (i >= outputs) return;
  const Element e = element_at(i, p.out_size, p.channels);
  const int64 at = indices[offset_of(p.y2_strides, e)];
  const int64 row = at / p.in_size[2];
  element v = to_element(real(0));
  if (at >= 0 && row < (int64)p.in_size[0] * p.in_size[1])
    v = dx[plane_of(p.x_strides, e) + row / p.in_size[1] * p.x_strides[2] + row % p.in_size[1] * p.x_strides[3] +
           at % p.in_size[2] * p.x_strides[4]];
  dy[offset_of(p.y_strides, e)] = v;
}
FC_EXPORT(gather)
#endif
