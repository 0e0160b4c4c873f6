# Pools: arrays and window tables in C form (see fc_pool in csrc/pool.h), tasks over threads.

cdef extern from "pool.h" nogil:
    ctypedef struct fc_view:
        void *at
        int64_t stride[5]

    ctypedef struct fc_windows:
        const int64_t *first
        const int64_t *count
        const int64_t *extent
        int64_t step

    ctypedef struct fc_taps:
        unsigned char *at
        int64_t lanes
        int together, wanted
        int64_t bytes

    ctypedef struct fc_pool:
        int op
        int64_t batch, channels
        int64_t in_size[3]
        int64_t out_size[3]
        fc_windows windows[3]
        double power, volume, divisor
        fc_view wide, narrow, indices, x, y
        fc_taps taps
        int batch_invariant
        int64_t tasks, workspace_bytes

    enum:
        FC_MAX_POOL
        FC_SUM_POOL
        FC_MAX_POOL_GRAD
        FC_SUM_POOL_GRAD
        FC_MAX_UNPOOL
        FC_MAX_UNPOOL_GRAD
        FC_MAX_POOL_INPUT_GRAD
        FC_MAX_POOL_TAPS_GRAD

    int fc_pool_block_f32(const void *kernels, fc_pool *p)
    int fc_pool_block_f64(const void *kernels, fc_pool *p)
    int fc_pool_run_f32(const void *kernels, const fc_pool *p, void *workspace, int64_t task)
    int fc_pool_run_f64(const void *kernels, const fc_pool *p, void *workspace, int64_t task)


ctypedef int (*_PoolBlock)(const void *, fc_pool *) noexcept nogil
ctypedef int (*_PoolRun)(const void *, const fc_pool *, void *, int64_t) noexcept nogil

# by is_double
cdef _PoolBlock[2] _POOL_BLOCK = [<_PoolBlock>fc_pool_block_f32, <_PoolBlock>fc_pool_block_f64]
cdef _PoolRun[2] _POOL_RUN = [<_PoolRun>fc_pool_run_f32, <_PoolRun>fc_pool_run_f64]

cdef dict _POOL_OPS = {
    "max_pool": FC_MAX_POOL,
    "sum_pool": FC_SUM_POOL,
    "max_pool_grad": FC_MAX_POOL_GRAD,
    "sum_pool_grad": FC_SUM_POOL_GRAD,
    "max_unpool": FC_MAX_UNPOOL,
    "max_unpool_grad": FC_MAX_UNPOOL_GRAD,
    "max_pool_input_grad": FC_MAX_POOL_INPUT_GRAD,
    "max_pool_taps_grad": FC_MAX_POOL_TAPS_GRAD,
}

# Below this many elements the start of a second thread costs more than it gains.
cdef int64_t _POOL_SMALL = 100_000


cdef int _view(fc_view *view, object array) except -1:
    """Fill in pointer and element strides; spatial axes that the array lacks have stride 0."""
    cdef Py_buffer buffer
    cdef int axis
    PyObject_GetBuffer(array, &buffer, PyBUF_STRIDES)
    view.at = buffer.buf
    for axis in range(5):
        view.stride[axis] = 0
    for axis in range(buffer.ndim):
        view.stride[axis if axis < 2 else axis + 5 - buffer.ndim] = buffer.strides[axis] // buffer.itemsize
    PyBuffer_Release(&buffer)
    return 0


cdef class PoolPlan:
    """One row of the table in csrc/pool.h for arrays of given layouts, to be run many times.

    `wide` has the size of the pool's input and `narrow` and `indices` that of its output, whichever of them is
    written; `x` and `y`, of the forward pass, are given for the gradients that read them. `taps` is True for a max pool
    that is to keep them, in `taps_bytes` bytes, and `taps_layout` of that pool for the gradient that reads them.
    """
    cdef fc_pool p
    cdef list tables  # what the windows point to
    cdef const void *kernels
    cdef _PoolRun task
    cdef readonly int status
    cdef int threads
    cdef size_t workspace

    def __cinit__(self, str op, problem, str isa, int threads, wide, narrow, indices=None, x=None, y=None,
                  double power=1, double volume=1, double divisor=0, bint batch_invariant=False, taps=None):
        cdef bint is_double = problem.dtype == "float64"
        cdef fc_pool *p = &self.p
        cdef fc_windows *w
        cdef const int64_t *table
        cdef int64_t outputs, elements
        cdef int axis
        self.kernels = _table(isa, is_double)
        self.task = _POOL_RUN[is_double]
        self.tables = [problem.windows[axis].table for axis in range(3)]
        memset(p, 0, sizeof(fc_pool))
        p.op = _POOL_OPS[op]
        p.batch, p.channels = problem.batch, problem.channels
        p.power, p.volume, p.divisor, p.batch_invariant = power, volume, divisor, batch_invariant
        for axis in range(3):
            p.in_size[axis], p.out_size[axis] = problem.in_size[axis], problem.out_size[axis]
            outputs = self.tables[axis].shape[1]
            table = <const int64_t *>data_of(self.tables[axis])
            w = &p.windows[axis]
            w.first, w.count, w.extent = table, table + 2 * outputs, table + 3 * outputs
            w.step = table[outputs] if outputs else 1  # the same for all outputs
        _view(&p.wide, wide)
        _view(&p.narrow, narrow)
        if indices is not None:
            _view(&p.indices, indices)
        if x is not None:
            _view(&p.x, x)
            _view(&p.y, y)
        if taps is True:
            p.taps.wanted = True
        elif taps is not None:
            p.taps.lanes, p.taps.together = taps
        elements = p.batch * p.channels * (p.in_size[0] * p.in_size[1] * p.in_size[2]
                                           + p.out_size[0] * p.out_size[1] * p.out_size[2])
        self.status = _POOL_BLOCK[is_double](self.kernels, p)
        self.threads = 1 if elements < _POOL_SMALL else max(1, min(<int64_t>threads, p.tasks))
        self.workspace = (<size_t>p.workspace_bytes + 4095) & ~<size_t>4095

    @property
    def taps_bytes(self):
        """Size of the array of taps; 0 if the pool cannot keep them."""
        return self.p.taps.bytes

    @property
    def taps_layout(self):
        """What a gradient must know of their order."""
        return self.p.taps.lanes, self.p.taps.together

    def run(self, wide, narrow, indices=None, x=None, y=None, taps=None):
        """Run on arrays of the same layouts; returns the status of csrc/pool.h."""
        cdef fc_pool p = self.p
        cdef int status = self.status, threads = self.threads
        cdef int64_t task
        cdef Buffer workspaces
        cdef char *workspace
        cdef size_t size = self.workspace
        cdef const void *kernels = self.kernels
        cdef _PoolRun run = self.task
        if status or p.tasks == 0:
            return status
        p.wide.at, p.narrow.at = data_of(wide), data_of(narrow)
        if indices is not None:
            p.indices.at = data_of(indices)
        if x is not None:
            p.x.at, p.y.at = data_of(x), data_of(y)
        if taps is not None:
            p.taps.at = <unsigned char *>data_of(taps)
        workspaces = take(size * threads)
        workspace = workspaces.data
        if rehearsal():
            give(workspaces)
            return status
        with nogil:
            if threads == 1:
                for task in range(p.tasks):
                    status |= run(kernels, &p, workspace, task)
            else:
                with parallel(num_threads=threads):
                    for task in prange(p.tasks, schedule="dynamic"):
                        status |= run(kernels, &p, workspace + threadid() * size, task)
        give(workspaces)
        return status
