# cython: language_level=3, boundscheck=False, cdivision=True, embedsignature=True
"""The compiled backend: owns memory, threads and the GIL; csrc/ does the arithmetic.

Arrays come in through the buffer protocol and are trusted: `problem` has checked shapes, strides and dtypes.
"""
import os

from cpython.buffer cimport (PyBUF_STRIDES, PyBUF_WRITABLE, Py_buffer, PyBuffer_FillInfo, PyBuffer_Release,
                             PyObject_GetBuffer)
from cpython.pythread cimport PyThread_get_thread_ident
from cython.parallel cimport parallel, prange, threadid
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from fastconv.backends._capi cimport *


# ---- Instruction sets --------------------------------------------------------------------------------------------

def _isas_under_cap():
    names, i = [], 0
    while fc_isa_name(i) != NULL:
        names.append((<bytes>fc_isa_name(i)).decode())
        i += 1
    cap = os.environ.get("FASTCONV_CPU") or None  # set to nothing is not set
    if cap is not None and cap not in names:
        raise ValueError(f"FASTCONV_CPU is {cap!r}, but on this machine one of {', '.join(names)} is needed. "
                         "Hint: unset it to use the best")
    if cap is not None:
        names = names[:names.index(cap) + 1]
    return tuple(n for n in names if fc_kernel_table(n.encode(), 0) != NULL)


cdef tuple _ISAS = _isas_under_cap()


def available_isas():
    """Names of the kernel tables of this build that this CPU can run and FASTCONV_CPU allows, portable one first."""
    return _ISAS


def default_isa():
    """The name of the best of them."""
    return _ISAS[-1]


def kernel_names():
    """Names of the kernels that every table holds."""
    names, i = [], 0
    while fc_kernel_name(i) != NULL:
        names.append((<bytes>fc_kernel_name(i)).decode())
        i += 1
    return tuple(names)


cdef const void *_table(str isa, bint is_double) except NULL:
    cdef const void *table = fc_kernel_table(isa.encode(), is_double) if isa in _ISAS else NULL
    if table == NULL:
        raise ValueError(f"isa is {isa!r}, but one of {', '.join(_ISAS)} is needed")
    return table


def tile(str isa, str dtype):
    """(rows, columns) of the largest register tile of a table, for "float32" or "float64"."""
    cdef int sizes[3]
    fc_tile(_table(isa, dtype == "float64"), dtype == "float64", sizes)
    return sizes[1], sizes[2]


def vector_lanes(str isa, str dtype):
    """Lanes of a vector of a table, for "float32" or "float64"."""
    cdef int sizes[3]
    fc_tile(_table(isa, dtype == "float64"), dtype == "float64", sizes)
    return sizes[0]


def fma_rate(str isa):
    """Multiply-adds of whole vectors of a table that a core of this CPU starts in a cycle."""
    return fc_fma_rate(isa.encode())


def openmp():
    """Whether this build can use several threads."""
    return _OPENMP


cdef extern from *:
    """
    #ifdef _OPENMP
    #define FC_OPENMP 1
    #else
    #define FC_OPENMP 0
    #endif
    """
    const bint _OPENMP "FC_OPENMP"


# ---- Memory ------------------------------------------------------------------------------------------------------

cdef char *data_of(object array, bint writable=False) except? NULL:
    # The pointer stays valid after the release: the caller holds the array, and arrays do not move.
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_STRIDES | (PyBUF_WRITABLE if writable else 0))
    cdef char *data = <char *>view.buf
    PyBuffer_Release(&view)
    return data


cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __linux__
    #include <sys/mman.h>
    #endif
    #define FC_HUGE_PAGE ((size_t)2 << 20)
    #define FC_MAPPED ((size_t)1 << 20)

    /* Large blocks are streamed through, and ask for huge pages: with small ones, half of the time of a read is spent
     * on finding them.  They are mapped one by one: the C library would keep what is freed between others in use. */
    #ifdef __linux__
    static void *fc_allocate(size_t size) {
        void *p;
        if (size < FC_MAPPED) return posix_memalign(&p, 64, size) ? NULL : p;
        const size_t align = size >= 2 * FC_HUGE_PAGE ? FC_HUGE_PAGE : 4096, all = size + align;
        char *map = (char *)mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == (char *)MAP_FAILED) return NULL;
        char *from = (char *)(((size_t)map + align - 1) / align * align);
        const size_t end = (size + 4095) / 4096 * 4096;
        if (from > map) munmap(map, (size_t)(from - map));
        if (map + all > from + end) munmap(from + end, (size_t)(map + all - from - end));
    #ifdef MADV_HUGEPAGE
        if (align == FC_HUGE_PAGE) madvise(from, size / FC_HUGE_PAGE * FC_HUGE_PAGE, MADV_HUGEPAGE);
    #endif
        return from;
    }

    static void fc_free(void *p, size_t size) {
        if (p && size >= FC_MAPPED)
            munmap(p, (size + 4095) / 4096 * 4096);
        else
            free(p);
    }
    #else
    static void *fc_allocate(size_t size) {
        void *p;
        return posix_memalign(&p, 64, size) ? NULL : p;
    }
    static void fc_free(void *p, size_t size) { free(p); }
    #endif
    """
    void *fc_allocate(size_t size) nogil
    void fc_free(void *p, size_t size) nogil


# Bytes of arrays and workspaces, in use or kept, and the most that they were.
cdef size_t _held = 0, _held_peak = 0


cdef char *new_memory(size_t size) except NULL:
    global _held, _held_peak
    cdef char *data = <char *>fc_allocate(size if size else 1)
    if data == NULL:
        raise MemoryError(f"fastconv: {size} bytes could not be had")
    _held += size
    _held_peak = max(_held_peak, _held)
    return data


cdef void free_memory(char *data, size_t size) noexcept:
    global _held
    if data != NULL:
        _held -= size
    fc_free(data, size)


cdef unsigned long _rehearsing = 0  # the thread whose calls take memory, but compute nothing


cdef bint rehearsal() noexcept:
    return _rehearsing != 0 and PyThread_get_thread_ident() == _rehearsing


def begin_rehearsal():
    """Let calls of this thread take and give memory as always, but compute nothing; returns the bytes held before.

    What is kept is given back first, so that it is as in a process that begins.
    """
    global _rehearsing, _held_peak
    if _rehearsing:
        raise RuntimeError("a thread is rehearsing already")
    release_idle()
    del _spare[:]
    _held_peak = _held
    _rehearsing = PyThread_get_thread_ident()
    return _held


def end_rehearsal():
    """Compute again, and return the most bytes that were held at a time."""
    global _rehearsing
    _rehearsing = 0
    release_idle()
    del _spare[:]
    return _held_peak


cdef bint _poison = False
cdef list _spare = []  # free buffers, smallest first
cdef size_t _SPARE_BYTES = 64 << 20  # more than this is given back to the system


def poison_workspaces(bint on):
    """Fill every workspace with NaN before each use (for tests: nothing may depend on what was there)."""
    global _poison
    _poison = on


def spare_bytes():
    """Bytes of workspace that are kept for the next call."""
    return sum([(<Buffer>b).size for b in _spare])


cdef class Buffer:
    """Memory aligned to cache lines, from a small pool."""
    cdef char *data
    cdef size_t size

    def __dealloc__(self):
        free_memory(self.data, self.size)


cdef Buffer take(size_t size):
    """A buffer of at least `size` bytes; `give` it back.  Called with the GIL, which guards the pool."""
    cdef Buffer buffer
    cdef Py_ssize_t i
    for i in range(len(_spare)):
        if (<Buffer>_spare[i]).size >= size:
            buffer = _spare.pop(i)
            break
    else:
        buffer = Buffer()
        buffer.data = new_memory(size)
        buffer.size = size
    if _poison:
        memset(buffer.data, 0xFF, buffer.size)  # every float32 and float64 of these bytes is NaN
    return buffer


cdef int give(Buffer buffer) except -1:
    cdef size_t kept = buffer.size
    cdef Py_ssize_t i = 0
    if kept > _SPARE_BYTES:
        return 0
    while i < len(_spare) and (<Buffer>_spare[i]).size < buffer.size:
        i += 1
    _spare.insert(i, buffer)
    for b in _spare:
        kept += (<Buffer>b).size
    while kept - buffer.size > _SPARE_BYTES or len(_spare) > 16:
        kept -= (<Buffer>_spare[0]).size
        del _spare[0]
    return 0


include "_cpu_memory.pxi"
include "_cpu_call.pxi"
include "_cpu_conv.pxi"
include "_cpu_wgrad.pxi"
include "_cpu_pool.pxi"
include "_cpu_train.pxi"
