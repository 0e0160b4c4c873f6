# Weight gradients: fc_wgrad in csrc/fastconv.h, tasks over threads.

cdef dict _WGRAD_FORMS = {
    "direct": FC_WGRAD_DIRECT,
    "im2col": FC_WGRAD_IM2COL,
    "winograd": FC_WGRAD_WINOGRAD,
    "channelwise": FC_WGRAD_CHANNELWISE,
}


cdef class WeightGradPlan:
    """The weight gradient over one lattice; `form` is the name of a row of the plan's table, `shape` and `dilation`
    are Winograd's.

    `swapped`: the lattice has x and dy in each other's place.
    """
    cdef _Lattice lattice
    cdef fc_wgrad plan
    cdef bint swapped

    def __cinit__(self, lattice, str isa, bint is_double, str form, int shape=0, dilation=(1, 1, 1),
                  bint swapped=False):
        cdef int axis
        self.swapped = swapped
        self.lattice = _Lattice(lattice, isa, is_double, False)
        memset(&self.plan, 0, sizeof(fc_wgrad))
        self.plan.l = self.lattice.l
        self.plan.form, self.plan.shape = _WGRAD_FORMS[form], shape
        for axis in range(3):
            self.plan.dilation[axis] = dilation[axis]
        fc_wgrad_block(&self.plan)

    @property
    def tasks(self):
        return self.plan.tasks

    @property
    def workspace_bytes(self):
        """Bytes of workspace for each thread."""
        return self.plan.workspace_bytes

    @property
    def partial_bytes(self):
        """Bytes of partial sums, for all threads together."""
        return self.plan.partial_bytes

    @property
    def splits(self):
        """Parts that the reduction over pixels is cut into."""
        return self.plan.splits

    def run(self, x, dy, dw, int threads):
        """dw = gradient of the weights of conv(x, w), from dy.

        Returns False if the result is not to be used: Winograd met numbers that are not finite.
        """
        cdef const char *x_ = data_of(dy if self.swapped else x)
        cdef const char *dy_ = data_of(x if self.swapped else dy)
        cdef char *dw_ = data_of(dw, True)
        cdef fc_wgrad *p = &self.plan
        cdef uint64_t state = 0
        cdef int64_t task, refused = 0
        cdef Buffer partials
        cdef Buffer workspaces
        cdef char *partial
        cdef char *workspace
        cdef size_t size = (<size_t>max(p.workspace_bytes, p.merge_bytes) + 4095) & ~<size_t>4095
        threads = max(1, min(<int64_t>threads, p.tasks))
        partials = take(p.partial_bytes)
        # Transforms write to as many pages at a time as there are points: huge ones are found faster.
        workspaces = take(max(size * threads, <size_t>4 << 20) if p.form == FC_WGRAD_WINOGRAD else size * threads)
        partial, workspace = partials.data, workspaces.data
        if rehearsal():
            give(workspaces)
            give(partials)
            return True
        with nogil:
            if threads == 1:
                state = fc_flush_denormals()
                for task in range(p.tasks):
                    refused += not fc_wgrad_run(p, x_, dy_, dw_, partial, workspace, task)
                for task in range(p.merge_tasks):
                    fc_wgrad_merge(p, partial, dw_, workspace, task)
                fc_restore_denormals(state)
            else:
                with parallel(num_threads=threads):
                    state = fc_flush_denormals()
                    for task in prange(p.tasks, schedule="dynamic"):
                        refused += not fc_wgrad_run(p, x_, dy_, dw_, partial, workspace + threadid() * size, task)
                    for task in prange(p.merge_tasks, schedule="static"):
                        fc_wgrad_merge(p, partial, dw_, workspace + threadid() * size, task)
                    fc_restore_denormals(state)
        give(workspaces)
        give(partials)
        return refused == 0


class WeightGradSlices:
    """Weight gradients of ranges of taps, one after the other, with the interface of one `WeightGradPlan`."""

    def __init__(self, plans):
        self.plans = tuple(plans)

    @property
    def tasks(self):
        return max(plan.tasks for plan in self.plans)

    @property
    def workspace_bytes(self):
        return max(plan.workspace_bytes for plan in self.plans)

    @property
    def partial_bytes(self):
        return max(plan.partial_bytes for plan in self.plans)

    @property
    def splits(self):
        return max(plan.splits for plan in self.plans)

    def run(self, x, dy, dw, int threads):
        """As `WeightGradPlan.run`: all ranges have to be good."""
        return all([plan.run(x, dy, dw, threads) for plan in self.plans])
