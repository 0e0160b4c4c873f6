# Convolution: plans over lattices (see fastconv/backends/lattice.py and fc_lattice in csrc/fastconv.h).

cdef class _Lattice:
    """A lattice in C form, with the arrays that it points to."""
    cdef fc_lattice l
    cdef int64_t *taps

    def __cinit__(self, lattice, str isa, bint is_double, bint gather):
        cdef int64_t n = len(lattice.tap_w), i
        cdef int a
        self.taps = <int64_t *>malloc((4 * n + 1) * sizeof(int64_t))
        if self.taps == NULL:
            raise MemoryError
        for i in range(n):
            for a in range(3):
                self.taps[3 * i + a] = lattice.tap_at[i][a]
            self.taps[3 * n + i] = lattice.tap_w[i]
        cdef fc_lattice *l = &self.l
        l.taps, l.tap_at, l.tap_w = n, self.taps, self.taps + 3 * n
        l.batch, l.groups = lattice.batch, lattice.groups
        l.in_channels, l.out_channels = lattice.in_channels, lattice.out_channels
        for a in range(3):
            l.in_size[a], l.out_size[a] = lattice.in_size[a], lattice.out_size[a]
            l.step[a], l.w_stride[a] = lattice.step[a], lattice.w_strides[a]
        for a in range(5):
            l.in_stride[a], l.out_stride[a] = lattice.in_strides[a], lattice.out_strides[a]
        l.in_offset, l.out_offset = lattice.in_offset, lattice.out_offset
        l.is_double, l.gather = is_double, gather
        l.kernels = _table(isa, is_double)

    def __dealloc__(self):
        free(self.taps)


cdef class Packed:
    """Weights in the layout of one plan."""
    cdef Buffer buffer
    cdef readonly tuple layout

    @property
    def nbytes(self):
        return self.buffer.size


ctypedef void (*PackTask)(const void *plan, const void *w, void *packed, int64_t task) noexcept nogil
ctypedef int (*RunTask)(const void *plan, const void *x, const void *packed, const void *bias, void *out,
                        void *workspace, int64_t task) noexcept nogil

cdef struct PartCalls:
    const void *plan
    PackTask pack
    RunTask run
    int64_t tasks, pack_tasks
    int64_t packed_at  # bytes, where the weights of this part begin
    bint fused  # tasks pack what they need of the weights themselves


cdef class Part:
    """One lattice under one algorithm."""
    cdef _Lattice lattice
    cdef list phases  # lattices that `all_phases` copies
    cdef void *all_phases
    cdef void *plan
    cdef PartCalls calls
    cdef int64_t packed_bytes, workspace_bytes
    cdef tuple layout

    def __dealloc__(self):
        free(self.plan)
        free(self.all_phases)

    cdef void *new_plan(self, size_t size, lattice, str isa, bint is_double, bint gather) except NULL:
        self.lattice = _Lattice(lattice, isa, is_double, gather)
        self.plan = malloc(size)
        if self.plan == NULL:
            raise MemoryError
        memset(self.plan, 0, size)
        self.calls.plan = self.plan
        return self.plan

    cdef void *new_phases(self, size_t size) except NULL:
        self.all_phases = calloc(len(self.phases), size)
        if self.all_phases == NULL:
            raise MemoryError
        return self.all_phases

    cdef int sizes(self, int64_t tasks, int64_t pack_tasks, int64_t packed_bytes, int64_t workspace_bytes) except -1:
        self.calls.tasks, self.calls.pack_tasks = tasks, pack_tasks
        self.packed_bytes, self.workspace_bytes = packed_bytes, workspace_bytes
        return 0


def gemm_part(lattice, str isa, bint is_double, bint gather, bint relu):
    """im2col (gather=True), or 1x1 in place."""
    cdef Part part = Part()
    cdef fc_conv *p = <fc_conv *>part.new_plan(sizeof(fc_conv), lattice, isa, is_double, gather)
    p.l, p.relu = part.lattice.l, relu
    fc_conv_block(p)
    part.sizes(p.tasks, p.pack_tasks, p.packed_bytes, p.workspace_bytes)
    part.calls.pack, part.calls.run = <PackTask>fc_conv_pack, <RunTask>fc_conv_run
    part.layout = ("gemm", isa, is_double, p.pixels_are_rows, p.packed_bytes, p.pack_tasks, p.l.taps)
    return part


def direct_part(lattice, str isa, bint is_double, bint relu, int min_tasks):
    """Products with rows of the input, in place or from a padded copy."""
    cdef Part part = Part()
    cdef fc_direct *p = <fc_direct *>part.new_plan(sizeof(fc_direct), lattice, isa, is_double, False)
    p.l, p.relu, p.min_tasks = part.lattice.l, relu, min_tasks
    fc_direct_block(p)
    part.sizes(p.tasks, p.pack_tasks, p.packed_bytes, p.workspace_bytes)
    part.calls.pack, part.calls.run = <PackTask>fc_direct_pack, <RunTask>fc_direct_run
    part.layout = ("direct", isa, is_double, p.packed_bytes, p.pack_tasks, p.l.taps)
    return part


def direct_raw_part(lattices, str isa, bint is_double, bint relu, int min_tasks):
    """The same as the `direct_part` of each of `lattices`, from weights as they are; None where packing them is better."""
    cdef Part part = Part()
    taps = tuple([tap for lattice in lattices for tap in lattice.tap_at])
    joint = lattices[0]._replace(tap_at=taps, tap_w=tuple([tap for lattice in lattices for tap in lattice.tap_w]))
    cdef fc_direct_raw *p = <fc_direct_raw *>part.new_plan(sizeof(fc_direct_raw), joint, isa, is_double, False)
    cdef Py_ssize_t i
    part.phases = [_Lattice(lattice, isa, is_double, False) for lattice in lattices]
    cdef fc_direct *phases = <fc_direct *>part.new_phases(sizeof(fc_direct))
    for i in range(len(part.phases)):
        phases[i].l, phases[i].relu = (<_Lattice>part.phases[i]).l, relu
    p.l, p.phases, p.n_phases, p.min_tasks = part.lattice.l, phases, len(part.phases), min_tasks
    fc_direct_raw_block(p)
    if not p.worth:
        return None
    part.sizes(p.tasks, 0, 0, p.workspace_bytes)
    part.calls.run, part.calls.fused = <RunTask>fc_direct_raw_run, True
    return part


def pixels_part(lattices, str isa, bint is_double, bint relu, int min_tasks):
    """Products with lanes of pixels from a padded copy; `lattices` are phases that write the same rows."""
    cdef Part part = Part()
    cdef fc_pixels *p = <fc_pixels *>part.new_plan(sizeof(fc_pixels), lattices[0], isa, is_double, False)
    cdef Py_ssize_t i
    part.phases = [_Lattice(lattice, isa, is_double, False) for lattice in lattices]
    cdef fc_lattice *phases = <fc_lattice *>part.new_phases(sizeof(fc_lattice))
    for i in range(len(part.phases)):
        phases[i] = (<_Lattice>part.phases[i]).l
    p.phases, p.n_phases, p.relu, p.min_tasks = phases, len(part.phases), relu, min_tasks
    fc_pixels_block(p)
    part.sizes(p.tasks, p.pack_tasks, p.packed_bytes, p.workspace_bytes)
    part.calls.pack, part.calls.run = <PackTask>fc_pixels_pack, <RunTask>fc_pixels_run
    part.layout = ("pixels", isa, is_double, p.packed_bytes, p.pack_tasks,
                   tuple([tuple(lattice.tap_w) for lattice in lattices]))
    return part


def winograd_part(lattice, str isa, bint is_double, int shape, bint relu, dilation, int min_tasks, bint raw):
    """Winograd's minimal filtering, `shape` being a row of `winograd_shapes`.

    With `raw`, weights come as they are, and tasks may transform them, as much as they need at a time.
    """
    cdef Part part = Part()
    cdef int axis
    cdef fc_wino *p = <fc_wino *>part.new_plan(sizeof(fc_wino), lattice, isa, is_double, False)
    p.l, p.relu, p.shape, p.min_tasks, p.raw = part.lattice.l, relu, shape, min_tasks, raw
    for axis in range(3):
        p.dilation[axis] = dilation[axis]
    fc_wino_block(p)
    part.sizes(p.tasks, p.pack_tasks, p.packed_bytes, p.workspace_bytes)
    part.calls.pack, part.calls.run, part.calls.fused = <PackTask>fc_wino_pack, <RunTask>fc_wino_run, p.fused
    part.layout = ("winograd", isa, is_double, shape, p.packed_bytes, p.pack_tasks, tuple(lattice.step),
                   tuple(lattice.tap_w))
    return part


def channelwise_part(lattice, str isa, bint is_double, bint relu):
    """Groups of one input and one output channel."""
    cdef Part part = Part()
    cdef fc_channelwise *p = <fc_channelwise *>part.new_plan(sizeof(fc_channelwise), lattice, isa, is_double, False)
    p.l, p.relu = part.lattice.l, relu
    fc_channelwise_block(p)
    part.sizes(p.tasks, p.pack_tasks, p.packed_bytes, p.workspace_bytes)
    part.calls.pack, part.calls.run = <PackTask>fc_channelwise_pack, <RunTask>fc_channelwise_run
    part.layout = ("channelwise", isa, is_double, p.pack_tasks, p.l.taps, p.form == FC_BY_PIXELS)
    return part


def winograd_shapes():
    """[(name, outputs per tile, points, taps)], three numbers each along the axes, taps of the axes with points."""
    cdef int outputs[3]
    cdef int points[3]
    cdef int taps
    cdef const char *name
    rows = []
    name = fc_wino_shape(0, outputs, points, &taps)
    while name != NULL:
        rows.append(((<bytes>name).decode(), tuple([outputs[0], outputs[1], outputs[2]]),
                     tuple([points[0], points[1], points[2]]), taps))
        name = fc_wino_shape(len(rows), outputs, points, &taps)
    return rows


cdef extern from *:
    """
    #define fc_fetch_and_add(p) __atomic_fetch_add(p, 1, __ATOMIC_RELAXED)
    """
    int64_t fc_fetch_and_add(int64_t *p) nogil


cdef struct Share:
    # Neighbouring tasks that one thread begins with, before it helps the others: what it reads and writes is then the
    # same in every call, and often still in its own cache.  As long as a cache line.
    int64_t next, refused
    int64_t unused[6]


cdef class ConvPlan:
    """Parts that write disjoint pieces of one output: forward pass, data gradient or transposed convolution."""
    cdef list parts
    cdef PartCalls *calls
    cdef size_t workspace
    cdef readonly int64_t tasks
    cdef readonly int64_t pack_tasks
    cdef readonly int64_t packed_bytes
    cdef readonly tuple layout
    cdef bint fused

    def __cinit__(self, parts):
        cdef Part part
        cdef Py_ssize_t i
        self.parts = list(parts)
        self.calls = <PartCalls *>malloc((len(self.parts) + 1) * sizeof(PartCalls))
        if self.calls == NULL:
            raise MemoryError
        for i, part in enumerate(self.parts):
            self.calls[i] = part.calls
            self.fused |= part.calls.fused
            self.tasks += part.calls.tasks
            self.calls[i].packed_at = self.packed_bytes
            self.pack_tasks += part.calls.pack_tasks
            self.packed_bytes += (part.packed_bytes + 63) & ~63
            self.workspace = max(self.workspace, <size_t>part.workspace_bytes)
        self.layout = tuple([(<Part>part).layout for part in self.parts])

    def __dealloc__(self):
        free(self.calls)

    @property
    def workspace_bytes(self):
        """Bytes of workspace for each thread."""
        return self.workspace

    cdef void pack_task(self, const char *w, char *packed, int64_t task) noexcept nogil:
        cdef PartCalls *part = self.calls
        while task >= part.pack_tasks:
            task -= part.pack_tasks
            part += 1
        part.pack(part.plan, w, packed + part.packed_at, task)

    cdef int run_task(self, const char *x, const char *w, const char *packed, const char *bias, char *out,
                      char *workspace, int64_t task) noexcept nogil:
        cdef PartCalls *part = self.calls
        while task >= part.tasks:
            task -= part.tasks
            part += 1
        return part.run(part.plan, x, w if part.fused else packed + part.packed_at, bias, out, workspace, task)

    cdef void pack_all(self, const char *w, char *packed, int threads) noexcept nogil:
        cdef int64_t task
        if threads == 1 or self.pack_tasks == 1:
            for task in range(self.pack_tasks):
                self.pack_task(w, packed, task)
        else:
            for task in prange(self.pack_tasks, num_threads=threads, schedule="static"):
                self.pack_task(w, packed, task)

    def pack(self, w, int threads):
        """Weights in this plan's layout, for `run`."""
        cdef Packed packed = Packed()
        if self.fused:
            raise ValueError("this plan is for weights as they are")
        cdef const char *from_ = data_of(w)
        packed.layout = self.layout
        packed.buffer = take(self.packed_bytes)
        if rehearsal():
            return packed
        with nogil:
            self.pack_all(from_, packed.buffer.data, threads)
        return packed

    cdef void run_shares(self, const char *x, const char *w, const char *packed, const char *bias, char *out,
                         char *workspace, Share *shares, int threads, int thread) noexcept nogil:
        cdef uint64_t state = fc_flush_denormals()
        cdef int64_t task, end
        cdef int i, whose
        for i in range(threads):
            whose = (thread + i) % threads
            end = self.tasks * (whose + 1) // threads
            task = fc_fetch_and_add(&shares[whose].next)
            while task < end:
                shares[thread].refused += not self.run_task(x, w, packed, bias, out, workspace, task)
                task = fc_fetch_and_add(&shares[whose].next)
        fc_restore_denormals(state)

    def run(self, x, w, bias, out, int threads):
        """out = conv(x, w) + bias; `w` is the weight or what `pack` made of it.

        Returns False if the result is not to be used: a Winograd part met numbers that are not finite.
        """
        cdef const char *x_ = data_of(x)
        cdef const char *bias_ = NULL if bias is None else data_of(bias)
        cdef char *out_ = data_of(out, True)
        cdef const char *w_ = NULL
        cdef char *packed
        cdef Buffer own = None
        cdef Buffer workspaces
        cdef char *workspace
        cdef size_t size = (self.workspace + 4095) & ~<size_t>4095
        cdef uint64_t state = 0
        cdef int64_t task, refused = 0
        cdef Share *shares
        if type(w) is Packed:
            if (<Packed>w).layout != self.layout:
                raise ValueError("packed weights belong to another plan")
            packed = (<Packed>w).buffer.data
        else:
            w_ = data_of(w)
            own = take(self.packed_bytes)
            packed = own.data
        threads = max(1, min(<int64_t>threads, self.tasks))
        workspaces = take((size + sizeof(Share)) * threads)
        workspace = workspaces.data
        if rehearsal():
            give(workspaces)
            if own is not None:
                give(own)
            return True
        with nogil:
            if w_ != NULL and self.pack_tasks > 0:
                self.pack_all(w_, packed, threads)
            if threads == 1:
                state = fc_flush_denormals()
                for task in range(self.tasks):
                    refused += not self.run_task(x_, w_, packed, bias_, out_, workspace, task)
                fc_restore_denormals(state)
            else:
                shares = <Share *>(workspace + size * threads)
                for task in range(threads):
                    shares[task].next, shares[task].refused = self.tasks * task // threads, 0
                with parallel(num_threads=threads):
                    self.run_shares(x_, w_, packed, bias_, out_, workspace + threadid() * size, shares, threads,
                                    threadid())
                for task in range(threads):
                    refused += shares[task].refused
        give(workspaces)
        if own is not None:
            give(own)
        return refused == 0
