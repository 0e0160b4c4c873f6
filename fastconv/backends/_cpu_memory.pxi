# Memory of large arrays, which is kept when they go and handed to the next ones: fresh memory has to be cleared, page by
# page, by the system, at each step of a training anew.

cdef extern from "Python.h":
    int PyTraceMalloc_Track(unsigned int domain, uintptr_t ptr, size_t size)
    int PyTraceMalloc_Untrack(unsigned int domain, uintptr_t ptr)

cdef struct Idle:
    char *data
    size_t size

cdef enum:
    _MOST_IDLE = 512
    _SLACK = 1 << 20
    _TRACE_DOMAIN = 0x66617374  # of tracemalloc, for those who want to tell our arrays from others

cdef Idle[_MOST_IDLE] _idle  # oldest first
cdef int _idle_count = 0
cdef size_t _idle_size = 0, _used_size = 0, _peak_size = 0


cdef void drop_idle(int i) noexcept:
    global _idle_count, _idle_size
    cdef int j
    _idle_size -= _idle[i].size
    _idle_count -= 1
    for j in range(i, _idle_count):
        _idle[j] = _idle[j + 1]


cdef void free_idle() noexcept:
    """Give the oldest back to the system."""
    free_memory(_idle[0].data, _idle[0].size)
    drop_idle(0)


cdef class Block:
    """Memory of one array, as a buffer; it goes back when the last array that views it is gone.

    Arrays and what lies idle together take an eighth and 1 MB more than arrays alone took at their peak, at most: at the
    peak itself, blocks of other sizes lie idle, too. tracemalloc sees what is in use, not what lies idle.
    """
    cdef char *data
    cdef size_t size

    def __cinit__(self, size_t size):
        global _used_size, _peak_size
        cdef int i, best = -1
        size = (size + 4095) & ~<size_t>4095
        cdef bint full = _used_size + _idle_size + size > _peak_size + _peak_size // 8 + _SLACK
        for i in range(_idle_count):  # of those that fit, none much too large while there is room for more
            if (size <= _idle[i].size <= (2 * size if full else size + size // 8)
                    and (best < 0 or _idle[i].size <= _idle[best].size)):
                best = i
        if best >= 0:
            self.data, self.size = _idle[best].data, _idle[best].size
            drop_idle(best)
        else:
            while _idle_count and _used_size + _idle_size + size > _peak_size + _peak_size // 8 + _SLACK:
                free_idle()
            self.data = new_memory(size)
            self.size = size
        _used_size += self.size
        _peak_size = max(_peak_size, _used_size)
        PyTraceMalloc_Track(_TRACE_DOMAIN, <uintptr_t>self.data, self.size)
        if _poison:
            memset(self.data, 0xFF, self.size)

    def __dealloc__(self):
        global _idle_count, _idle_size, _used_size
        if self.data == NULL:
            return
        PyTraceMalloc_Untrack(_TRACE_DOMAIN, <uintptr_t>self.data)
        _used_size -= self.size
        if _idle_count == _MOST_IDLE:
            free_idle()
        _idle[_idle_count].data, _idle[_idle_count].size = self.data, self.size
        _idle_count += 1
        _idle_size += self.size

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data, self.size, 0, flags)


def idle_bytes():
    """Bytes of memory of arrays that are gone, kept for the next ones."""
    return _idle_size


def release_idle():
    """Give what lies idle back to the system, and forget how much was in use at the peak."""
    global _peak_size
    while _idle_count:
        free_idle()
    _peak_size = _used_size
