# Passes of training: normalisation, elementwise operations, steps of optimisers (csrc/passes.h), over threads.

cdef extern from "passes.h" nogil:
    enum:
        FC_PASS_MOMENTS
        FC_PASS_APPLY
        FC_PASS_GRAD_SUMS
        FC_PASS_GRAD_APPLY
        FC_PASS_SUMS

    ctypedef struct fc_plane:
        void *at
        int64_t outer, channel

    ctypedef struct fc_pass:
        const void *kernels
        int by_channels, relu
        int64_t outer, channels, inner
        fc_plane x, dy, out
        const void *mean
        const void *scale
        const void *bias
        const void *along
        const void *across
        const void *shift
        double *sums
        int64_t block, tasks

    void fc_pass_block(fc_pass *p)
    void fc_pass_merge(const fc_pass *p, int which)
    void fc_pass_run_f32(const fc_pass *p, int which, int64_t task)
    void fc_pass_run_f64(const fc_pass *p, int which, int64_t task)
    void fc_relu_f32(const void *kernels, const void *x, int64_t n, void *y)
    void fc_relu_f64(const void *kernels, const void *x, int64_t n, void *y)
    void fc_relu_grad_f32(const void *kernels, const void *dy, const void *y, int64_t n, void *dx)
    void fc_relu_grad_f64(const void *kernels, const void *dy, const void *y, int64_t n, void *dx)
    void fc_add_f32(const void *kernels, const void *a, const void *b, int relu, int64_t n, void *y)
    void fc_add_f64(const void *kernels, const void *a, const void *b, int relu, int64_t n, void *y)
    void fc_sgd_step_f32(const void *kernels, void *value, void *velocity, const void *grad, int64_t n,
                         const double *constants, int first, int nesterov)
    void fc_sgd_step_f64(const void *kernels, void *value, void *velocity, const void *grad, int64_t n,
                         const double *constants, int first, int nesterov)
    void fc_adam_step_f32(const void *kernels, void *value, void *mean, void *square, const void *grad, int64_t n,
                          const double *constants)
    void fc_adam_step_f64(const void *kernels, void *value, void *mean, void *square, const void *grad, int64_t n,
                          const double *constants)

from libc.math cimport sqrt

# Below this many elements the start of a second thread costs more than it gains; elements of an elementwise task.
cdef int64_t _PASS_SMALL = 100_000
cdef int64_t _RUN = 32768


cdef struct Strided:
    char *at
    int64_t shape[5]  # batch, channels, three spatial axes
    int64_t stride[5]


cdef int strided(Strided *view, object array) except -1:
    cdef Py_buffer buffer
    cdef int axis, to
    PyObject_GetBuffer(array, &buffer, PyBUF_STRIDES)
    view.at = <char *>buffer.buf
    for axis in range(5):
        view.shape[axis], view.stride[axis] = 1, 0
    for axis in range(buffer.ndim):
        to = axis if axis < 2 else axis + 5 - buffer.ndim
        view.shape[to], view.stride[to] = buffer.shape[axis], buffer.strides[axis] // buffer.itemsize
    PyBuffer_Release(&buffer)
    return 0


cdef bint collapses(const Strided *v, bint with_batch, int64_t *step) noexcept:
    """Whether the spatial axes (and the batch) are one axis of `step` elements; 0 if they have one element."""
    cdef int axis = 4
    cdef int64_t span = 0
    step[0] = 0
    while axis >= 0:
        if v.shape[axis] != 1:
            if span == 0:
                step[0] = v.stride[axis]
            elif v.stride[axis] != span:
                return False
            span = v.stride[axis] * v.shape[axis]
        axis -= 1
        if axis == 1:
            if not with_batch:
                break
            axis = 0
    return True


cdef bint plane_of(fc_pass *p, fc_plane *plane, object array) except -1:
    """Fill in one array of a pass whose order is known; False if it does not fit."""
    cdef Strided v
    cdef int64_t step
    strided(&v, array)
    plane.at = v.at
    if p.by_channels:
        if v.shape[1] != 1 and v.stride[1] != 1 or not collapses(&v, True, &step):
            return False
        plane.outer = step
        return True
    if not collapses(&v, False, &step) or step not in (0, 1):
        return False
    plane.outer, plane.channel = v.stride[0], v.stride[1]
    return True


cdef bint begin_pass(fc_pass *p, object x, str isa) except -1:
    """Fill in the geometry of a pass from one of its arrays; False if no pass reads such strides."""
    cdef Strided v
    cdef int64_t step
    memset(p, 0, sizeof(fc_pass))
    strided(&v, x)
    p.kernels = _table(isa, x.dtype.itemsize == 8)
    p.channels = v.shape[1]
    p.outer, p.inner = v.shape[0], v.shape[2] * v.shape[3] * v.shape[4]
    p.by_channels = (v.stride[1] == 1 and v.shape[1] > 1 or p.inner == 1) and collapses(&v, True, &step)
    if p.by_channels and v.shape[1] > 1 and v.stride[1] != 1:
        p.by_channels = 0
    if p.by_channels:
        p.outer, p.inner = p.outer * p.inner, 1
    fc_pass_block(p)
    return True


cdef int run_pass(const fc_pass *p, int which, bint is_double, int threads) noexcept nogil:
    cdef int64_t task
    if p.outer * p.channels * p.inner < _PASS_SMALL:
        threads = 1
    if threads == 1:
        for task in range(p.tasks):
            if is_double:
                fc_pass_run_f64(p, which, task)
            else:
                fc_pass_run_f32(p, which, task)
    else:
        for task in prange(p.tasks, num_threads=threads, schedule="static"):
            if is_double:
                fc_pass_run_f64(p, which, task)
            else:
                fc_pass_run_f32(p, which, task)
    if which != FC_PASS_APPLY and which != FC_PASS_GRAD_APPLY:
        fc_pass_merge(p, which)
    return 0


cdef void put(void *to, int64_t i, double value, bint is_double) noexcept nogil:
    if is_double:
        (<double *>to)[i] = value
    else:
        (<float *>to)[i] = <float>value


cdef double got(const void *from_, int64_t i, bint is_double) noexcept nogil:
    return (<const double *>from_)[i] if is_double else (<const float *>from_)[i]


cdef int constants_of(fc_pass *p, char *room, const double *mean, const double *var, const void *weight,
                      const void *bias, double eps, bint is_double) noexcept nogil:
    """Mean, scale and bias of each channel; what rounding the mean takes away is in the bias."""
    cdef int64_t c, n = p.channels
    cdef size_t size = 8 if is_double else 4
    cdef void *means = room
    cdef void *scales = room + n * size
    cdef void *biases = room + 2 * n * size
    cdef double scale
    for c in range(n):
        scale = 1 / sqrt(var[c] + eps)
        if weight != NULL:
            scale *= got(weight, c, is_double)
        put(means, c, mean[c], is_double)
        put(scales, c, scale, is_double)
        put(biases, c, (got(bias, c, is_double) if bias != NULL else 0)
            - (mean[c] - got(means, c, is_double)) * scale, is_double)
    p.mean, p.scale, p.bias = means, scales, biases
    return 0


def batch_norm(x, y, weight, bias, mean, var, double eps, bint training, bint relu, str isa, int threads):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with `relu` max(., 0) of it.

    mean and var are contiguous float64; `training` writes them, the moments of x, first. Without y that is all. Returns
    False, having done nothing, if the strides of x or y are not those of dense memory in one of the two orders.
    """
    cdef fc_pass p
    cdef bint is_double = x.dtype.itemsize == 8
    begin_pass(&p, x, isa)
    if not plane_of(&p, &p.x, x) or y is not None and not plane_of(&p, &p.out, y):
        return False
    cdef double *mean_ = <double *>data_of(mean)
    cdef double *var_ = <double *>data_of(var)
    cdef const void *weight_ = NULL if weight is None else data_of(weight)
    cdef const void *bias_ = NULL if bias is None else data_of(bias)
    cdef int64_t c, count = p.outer * p.inner
    cdef size_t sums = 2 * p.channels * (p.tasks if p.by_channels else 1) * sizeof(double)
    cdef Buffer room = take(sums + 3 * p.channels * sizeof(double))
    p.relu = relu
    if rehearsal():
        mean[...], var[...] = 0, 1
        give(room)
        return True
    with nogil:
        if training:
            p.sums = <double *>room.data
            run_pass(&p, FC_PASS_MOMENTS, is_double, threads)
            for c in range(p.channels):
                mean_[c] = p.sums[c]
                var_[c] = max(p.sums[p.channels + c] / count, 0) if p.sums[p.channels + c] == p.sums[p.channels + c] \
                    else p.sums[p.channels + c]
            p.sums = NULL
        if p.out.at != NULL:
            constants_of(&p, room.data + sums, mean_, var_, weight_, bias_, eps, is_double)
            run_pass(&p, FC_PASS_APPLY, is_double, threads)
    give(room)
    return True


def update_running(running, batch, double factor, double momentum):
    """running += momentum * (factor * batch - running) in double; `batch` is float64, both are contiguous."""
    cdef bint is_double = running.dtype.itemsize == 8
    cdef void *running_ = data_of(running, True)
    cdef const double *batch_ = <const double *>data_of(batch)
    cdef int64_t c, n = running.size
    for c in range(n):
        put(running_, c, got(running_, c, is_double) + momentum * (factor * batch_[c] - got(running_, c, is_double)),
            is_double)


def batch_norm_grad(x, dy, dx, weight, bias, mean, var, double eps, bint training, bint relu, dw, db, str isa,
                    int threads):
    """Gradients of `batch_norm` with respect to x, weight and bias, into dx, dw and db; False as there."""
    cdef fc_pass p
    cdef bint is_double = x.dtype.itemsize == 8
    begin_pass(&p, x, isa)
    if not plane_of(&p, &p.x, x) or not plane_of(&p, &p.dy, dy) or not plane_of(&p, &p.out, dx):
        return False
    cdef const double *mean_ = <const double *>data_of(mean)
    cdef const double *var_ = <const double *>data_of(var)
    cdef const void *weight_ = NULL if weight is None else data_of(weight)
    cdef const void *bias_ = NULL if bias is None else data_of(bias)
    cdef void *dw_ = data_of(dw, True)
    cdef void *db_ = data_of(db, True)
    cdef int64_t c, n = p.channels, count = p.outer * p.inner
    cdef size_t sums = 2 * n * (p.tasks if p.by_channels else 1) * sizeof(double), size = 8 if is_double else 4
    cdef Buffer room = take(sums + 6 * n * sizeof(double))
    cdef char *more = room.data + sums + 3 * n * size
    cdef double inverse, along, across, product, off
    p.relu = relu
    if rehearsal():
        give(room)
        return True
    with nogil:
        constants_of(&p, room.data + sums, mean_, var_, weight_, bias_, eps, is_double)
        p.sums = <double *>room.data
        run_pass(&p, FC_PASS_GRAD_SUMS, is_double, threads)
        p.along, p.across, p.shift = more, more + n * size, more + 2 * n * size
        for c in range(n):
            inverse = 1 / sqrt(var_[c] + eps)
            off = mean_[c] - got(p.mean, c, is_double)
            product = p.sums[n + c] - off * p.sums[c]
            along = inverse * (got(weight_, c, is_double) if weight_ != NULL else 1)
            across = -along * inverse * inverse * product / count
            put(<void *>p.along, c, along, is_double)
            put(<void *>p.across, c, across, is_double)
            put(<void *>p.shift, c, -along * p.sums[c] / count - across * off, is_double)
            put(dw_, c, product * inverse, is_double)
            put(db_, c, p.sums[c], is_double)
        if not training:
            p.across = NULL
        p.sums = NULL
        run_pass(&p, FC_PASS_GRAD_APPLY, is_double, threads)
    give(room)
    return True


def channel_sums(dy, out, str isa, int threads):
    """Sums over all axes but that of the channels, into `out`; False as in `batch_norm`."""
    cdef fc_pass p
    cdef bint is_double = dy.dtype.itemsize == 8
    cdef int64_t c
    cdef void *out_ = data_of(out, True)
    begin_pass(&p, dy, isa)
    if not plane_of(&p, &p.dy, dy):
        return False
    cdef Buffer room = take(2 * p.channels * (p.tasks if p.by_channels else 1) * sizeof(double))
    p.sums = <double *>room.data
    if rehearsal():
        give(room)
        return True
    with nogil:
        if p.tasks:
            run_pass(&p, FC_PASS_SUMS, is_double, threads)
        for c in range(p.channels):
            put(out_, c, p.sums[c] if p.tasks else 0, is_double)
    give(room)
    return True


# ---- Elementwise: arrays with the same dense strides, which are one run ------------------------------------------

def relu_pass(x, y, str isa, int threads):
    """y = max(x, 0)."""
    cdef bint is_double = x.dtype.itemsize == 8
    cdef const void *kernels = _table(isa, is_double)
    cdef const char *x_ = data_of(x)
    cdef char *y_ = data_of(y, True)
    cdef int64_t n = x.size, i, size = x.dtype.itemsize, at
    if n < _PASS_SMALL:
        threads = 1
    if rehearsal():
        return
    with nogil:
        for i in prange((n + _RUN - 1) // _RUN, num_threads=threads, schedule="static"):
            at = i * _RUN
            if is_double:
                fc_relu_f64(kernels, x_ + at * size, min(_RUN, n - at), y_ + at * size)
            else:
                fc_relu_f32(kernels, x_ + at * size, min(_RUN, n - at), y_ + at * size)


def relu_grad_pass(dy, y, dx, str isa, int threads):
    """dx = dy, but 0 where y <= 0."""
    cdef bint is_double = y.dtype.itemsize == 8
    cdef const void *kernels = _table(isa, is_double)
    cdef const char *dy_ = data_of(dy)
    cdef const char *y_ = data_of(y)
    cdef char *dx_ = data_of(dx, True)
    cdef int64_t n = y.size, i, size = y.dtype.itemsize, at
    if n < _PASS_SMALL:
        threads = 1
    if rehearsal():
        return
    with nogil:
        for i in prange((n + _RUN - 1) // _RUN, num_threads=threads, schedule="static"):
            at = i * _RUN
            if is_double:
                fc_relu_grad_f64(kernels, dy_ + at * size, y_ + at * size, min(_RUN, n - at), dx_ + at * size)
            else:
                fc_relu_grad_f32(kernels, dy_ + at * size, y_ + at * size, min(_RUN, n - at), dx_ + at * size)


def add_pass(a, b, y, bint relu, str isa, int threads):
    """y = a + b, with `relu` max(., 0) of it."""
    cdef bint is_double = a.dtype.itemsize == 8
    cdef const void *kernels = _table(isa, is_double)
    cdef const char *a_ = data_of(a)
    cdef const char *b_ = data_of(b)
    cdef char *y_ = data_of(y, True)
    cdef int64_t n = a.size, i, size = a.dtype.itemsize, at
    if n < _PASS_SMALL:
        threads = 1
    if rehearsal():
        return
    with nogil:
        for i in prange((n + _RUN - 1) // _RUN, num_threads=threads, schedule="static"):
            at = i * _RUN
            if is_double:
                fc_add_f64(kernels, a_ + at * size, b_ + at * size, relu, min(_RUN, n - at), y_ + at * size)
            else:
                fc_add_f32(kernels, a_ + at * size, b_ + at * size, relu, min(_RUN, n - at), y_ + at * size)


def sgd_step(value, grad, velocity, double lr, double momentum, double fresh, double weight_decay, bint first,
             bint nesterov, str isa, int threads):
    """One step of SGD over contiguous arrays; `velocity` may be None."""
    cdef bint is_double = value.dtype.itemsize == 8
    cdef const void *kernels = _table(isa, is_double)
    cdef char *value_ = data_of(value, True)
    cdef const char *grad_ = data_of(grad)
    cdef char *velocity_ = NULL if velocity is None else data_of(velocity, True)
    cdef double[4] constants = [lr, momentum, fresh, weight_decay]
    cdef int64_t n = value.size, i, size = value.dtype.itemsize, at
    if n < _PASS_SMALL:
        threads = 1
    if rehearsal():
        return
    with nogil:
        for i in prange((n + _RUN - 1) // _RUN, num_threads=threads, schedule="static"):
            at = i * _RUN
            if is_double:
                fc_sgd_step_f64(kernels, value_ + at * size, velocity_ + at * size if velocity_ != NULL else NULL,
                                grad_ + at * size, min(_RUN, n - at), constants, first, nesterov)
            else:
                fc_sgd_step_f32(kernels, value_ + at * size, velocity_ + at * size if velocity_ != NULL else NULL,
                                grad_ + at * size, min(_RUN, n - at), constants, first, nesterov)


def adam_step(value, grad, mean, square, tuple constants, str isa, int threads):
    """One step of Adam over contiguous arrays; constants as in fc_adam (csrc/kernels.h), from `shrink` on."""
    cdef bint is_double = value.dtype.itemsize == 8
    cdef const void *kernels = _table(isa, is_double)
    cdef char *value_ = data_of(value, True)
    cdef const char *grad_ = data_of(grad)
    cdef char *mean_ = data_of(mean, True)
    cdef char *square_ = data_of(square, True)
    cdef double[8] all_of
    cdef int64_t n = value.size, i, size = value.dtype.itemsize, at
    for i in range(8):
        all_of[i] = constants[i]
    if n < _PASS_SMALL:
        threads = 1
    if rehearsal():
        return
    with nogil:
        for i in prange((n + _RUN - 1) // _RUN, num_threads=threads, schedule="static"):
            at = i * _RUN
            if is_double:
                fc_adam_step_f64(kernels, value_ + at * size, mean_ + at * size, square_ + at * size,
                                 grad_ + at * size, min(_RUN, n - at), all_of)
            else:
                fc_adam_step_f32(kernels, value_ + at * size, mean_ + at * size, square_ + at * size,
                                 grad_ + at * size, min(_RUN, n - at), all_of)
