# Keys by which a repeated call is recognised, before anything of it is checked again.

from cpython.buffer cimport PyBUF_FORMAT
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.tuple cimport PyTuple_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact

from numpy import ndarray as _ndarray


cdef bint plain(object value) noexcept:
    # 1, 1.0 and True are equal and hash alike, but only the first is an argument that was accepted before.
    if type(value) is int or value is None or PyUnicode_CheckExact(value):
        return True
    if not PyTuple_CheckExact(value):
        return False
    for item in <tuple>value:
        if not plain(item):
            return False
    return True


cdef struct Layout:
    int64_t ndim, itemsize
    int64_t sizes[10]  # shape and strides of at most five axes


cdef bint layout_of(object array, Layout *layout) except -1:
    """Write the layout of a NumPy array; False if it is none of native, aligned float32 or float64."""
    cdef Py_buffer view
    cdef bint fits
    cdef int i
    if type(array) is not _ndarray:
        return False
    try:
        PyObject_GetBuffer(array, &view, PyBUF_STRIDES | PyBUF_FORMAT)
    except (BufferError, ValueError):  # datetimes and their like have no buffer
        return False
    fits = (view.ndim <= 5 and view.format[0] in (b"f", b"d") and view.format[1] == 0
            and <uintptr_t>view.buf % <uintptr_t>view.itemsize == 0)
    if fits:
        layout.ndim, layout.itemsize = view.ndim, view.itemsize
        for i in range(view.ndim):
            layout.sizes[2 * i] = view.shape[i]
            layout.sizes[2 * i + 1] = view.strides[i]
        for i in range(2 * view.ndim, 10):
            layout.sizes[i] = 0
    PyBuffer_Release(&view)
    return fits


def call_key(tuple options, a, b=None, c=None):
    """What two calls have in common that need the same checks and the same plan, or None.

    `options` are the arguments that are no arrays, a, b, c those that are: float32 or float64 of at most five axes.
    None, if one of the arrays or options is of another kind, so that the call has to be checked in full.
    """
    cdef Layout layouts[3]
    cdef int n = 0
    if not plain(options):
        return None
    for array in (a, b, c):
        if array is None:
            layouts[n].ndim = -1
            memset(&layouts[n].itemsize, 0, sizeof(Layout) - sizeof(int64_t))
        elif not layout_of(array, &layouts[n]):
            return None
        n += 1
    return options, PyBytes_FromStringAndSize(<char *>layouts, sizeof(layouts))
