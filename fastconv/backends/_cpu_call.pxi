# Keys by which a repeated call is recognised, before anything of it is checked again.

from cpython.buffer cimport PyBUF_FORMAT
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.tuple cimport PyTuple_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact

from numpy import ndarray as _ndarray


cdef int LEAVES = 60  # of the options of a call


cdef int64_t plain(object value, int64_t kinds) noexcept:
    """`kinds` and a bit for each number in `value`, set for True and False; 0 if it holds something else.

    1, 1.0 and True are equal and hash alike, but only the first or the last is an argument that was accepted before.
    """
    if type(value) is int or type(value) is bool:
        return 0 if kinds >> LEAVES else 2 * kinds + (type(value) is bool)
    if value is None or PyUnicode_CheckExact(value):
        return kinds
    if not PyTuple_CheckExact(value):
        return 0
    for item in <tuple>value:
        kinds = plain(item, kinds)
        if kinds == 0:
            return 0
    return kinds


cdef struct Span:
    uintptr_t low, high  # addresses of the bytes from the first element in memory to the last one
    bint readonly


cdef int layout_of(object array, int64_t *layout, Span *span) except -1:
    """Write dimensions, item size, shape and strides of a NumPy array, and say how many numbers these are.

    0 if it is none of native, aligned float32 or float64 of at most five axes.
    """
    cdef Py_buffer view
    cdef int i, n = 0
    cdef Py_ssize_t reach
    if type(array) is not _ndarray:
        return 0
    try:
        PyObject_GetBuffer(array, &view, PyBUF_STRIDES | PyBUF_FORMAT)
    except (BufferError, ValueError):  # datetimes and their like have no buffer
        return 0
    if (view.ndim <= 5 and view.format[0] in (b"f", b"d") and view.format[1] == 0
            and <uintptr_t>view.buf % <uintptr_t>view.itemsize == 0):
        layout[0], layout[1] = view.ndim, view.itemsize
        span.low = <uintptr_t>view.buf
        span.high = span.low + (view.itemsize if view.len else 0)
        span.readonly = view.readonly
        for i in range(view.ndim):
            layout[2 + 2 * i], layout[3 + 2 * i] = view.shape[i], view.strides[i]
            reach = (view.shape[i] - 1) * view.strides[i] if view.len else 0
            if reach < 0:
                span.low += reach
            else:
                span.high += reach
        n = 2 + 2 * view.ndim
    PyBuffer_Release(&view)
    return n


def call_key(tuple options, a, b=None, c=None, out=None):
    """What two calls have in common that need the same checks and the same plan, or None.

    `options` are the arguments that are no arrays, a, b, c those that are: float32 or float64 of at most five axes;
    `out` is what will be written.  None, if one of the arrays or options is of another kind, or if `out` is read-only
    or may share memory with the others, so that the call has to be checked in full.
    """
    cdef int64_t layouts[1 + 4 * 12]
    cdef Span spans[4]
    cdef int n = 1, i = 0, size
    layouts[0] = plain(options, 1)
    if layouts[0] == 0:
        return None
    for array in (a, b, c, out):
        if array is None:
            layouts[n] = -1
            spans[i].low = spans[i].high = 0
            size = 1
        else:
            size = layout_of(array, layouts + n, &spans[i])
            if size == 0:
                return None
        n += size
        i += 1
    if out is not None:
        if spans[3].readonly:
            return None
        for i in range(3):
            if spans[i].low < spans[3].high and spans[3].low < spans[i].high:
                return None
    return options, PyBytes_FromStringAndSize(<char *>layouts, n * sizeof(int64_t))
