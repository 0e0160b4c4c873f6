"""Arrays at the door: adoption without a copy, memory order, outputs.

fastconv computes on NumPy arrays of native float32 or float64. Everything that can be viewed as one without
copying is accepted; nothing is ever cast, converted or copied in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastconv.backends import _cpu

Order = Literal["contiguous", "channels_last"]
Array = NDArray[Any]
T = TypeVar("T")

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
INT64 = np.dtype(np.int64)
# What arrays on a GPU may hold besides; bfloat16 is that of the package ml_dtypes, as in CuPy.
SHORT_FLOATS = ("float16", "bfloat16")

# DLPack device types whose memory the CPU can read: CPU, CUDA host, ROCm host, CUDA managed.
_HOST_DEVICES = frozenset({1, 3, 11, 13})

# Work limit for the exact overlap test of NumPy. Channel slices of one buffer need well under 100 units.
_OVERLAP_WORK = 100_000


def _message(op: str, text: str) -> str:
    return f"{op}: {text}" if op else text


def as_array(obj: object, name: str, op: str = "") -> Array:
    """Return `obj` as a NumPy array of float32 or float64 that shares its memory.

    Parameters
    ----------
    obj
        A NumPy array; an object with ``__dlpack__`` in host memory (a CPU tensor of PyTorch, JAX, ...); or an
        object with the buffer protocol or ``__array_interface__``. Any shape and strides. On a GPU: an array of CuPy,
        or an object with ``__cuda_array_interface__`` or ``__dlpack__``.
    name, op
        The argument and the function that errors name.

    Returns
    -------
    ndarray
        `obj` itself if it is a plain ndarray, else a view of its memory; on a GPU an array of CuPy.

    Raises
    ------
    TypeError
        For lists, scalars, masked arrays, arrays on other devices, tensors that require a gradient, and every
        dtype other than native float32 and float64; on a GPU float16 and bfloat16 are taken too.
    ValueError
        If the data are not aligned to the item size.
    """
    x = obj if type(obj) is np.ndarray else _adopt(obj, name, op)
    dtype = x.dtype
    if dtype is not FLOAT32 and dtype is not FLOAT64 and not (on_device(x) and dtype.name in SHORT_FLOATS):
        _check_float(dtype, name, op)
    if not on_device(x) and not x.flags.aligned:
        raise ValueError(_message(op, f"{name} is not aligned to its item size of {dtype.itemsize} bytes. "
                                      f"Hint: np.ascontiguousarray({name}.copy())"))
    return x


def as_indices(obj: object, name: str, op: str = "") -> Array:
    """Return `obj`, an int64 array of positions, as an ndarray that shares its memory (see `as_array`)."""
    x = obj if type(obj) is np.ndarray else _adopt(obj, name, op)
    if x.dtype != INT64 or not x.dtype.isnative:
        raise TypeError(_message(op, f"{name} has dtype {x.dtype}, but int64 is needed. "
                                     f"Hint: {name}.astype(np.int64)"))
    if not on_device(x) and not x.flags.aligned:
        raise ValueError(_message(op, f"{name} is not aligned to its item size of 8 bytes. "
                                      f"Hint: np.ascontiguousarray({name}.copy())"))
    return x


def _check_float(dtype: np.dtype[Any], name: str, op: str) -> None:
    if dtype.isnative and dtype in (FLOAT32, FLOAT64):
        return
    if not dtype.isnative:
        what, hint = f"dtype {dtype.str} in non-native byte order", f"{name}.astype({name}.dtype.newbyteorder('='))"
    elif dtype.kind == "c":
        what, hint = f"complex dtype {dtype}", f"run {name}.real and {name}.imag separately"
    else:
        what, hint = f"dtype {dtype}", f"{name}.astype(np.float32)"
    raise TypeError(_message(op, f"{name} has {what}, but float32 or float64 is needed (on a GPU also float16 or "
                                 f"bfloat16). Hint: {hint}"))


def _adopt(obj: Any, name: str, op: str) -> Array:
    """View a foreign array as an ndarray without copying, or say why that cannot be."""
    kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
    if isinstance(obj, np.ma.MaskedArray):
        raise TypeError(_message(op, f"{name} is a masked array, whose mask would be ignored. "
                                     f"Hint: {name}.filled(0)"))
    if isinstance(obj, np.ndarray):
        return np.asarray(obj)
    if getattr(obj, "requires_grad", False):
        raise TypeError(_message(op, f"{name} is a {kind} that requires a gradient, which fastconv would not "
                                     f"record. Hint: {name}.detach()"))
    if not isinstance(obj, np.generic) and (hasattr(obj, "__cuda_array_interface__") or hasattr(obj, "__dlpack__")):
        on_gpu = _adopt_device(obj, name, op, kind)
        if on_gpu is not None:
            return on_gpu
        device, _ = _view(obj.__dlpack_device__, name, op, kind)
        if int(device) not in _HOST_DEVICES:
            raise TypeError(_message(op, f"{name} is a {kind} on device {getattr(obj, 'device', '?')}, but arrays "
                                         f"in host memory are needed. Hint: copy it to the CPU first"))
        return _view(lambda: np.from_dlpack(obj), name, op, kind)
    if not isinstance(obj, np.generic):
        if hasattr(obj, "__array_interface__"):
            return _view(lambda: np.asarray(obj), name, op, kind)
        try:
            buffer = memoryview(obj)
        except TypeError:
            pass
        else:
            return _view(lambda: np.asarray(buffer), name, op, kind)
    raise TypeError(_message(op, f"{name} is a {kind}, but a NumPy array (or an object with __dlpack__, the buffer "
                                 f"protocol or __array_interface__) is needed. "
                                 f"Hint: np.asarray({name}, dtype=np.float32)"))


def _adopt_device(obj: Any, name: str, op: str, kind: str) -> Array | None:
    """View an array on a GPU as one of CuPy; None for arrays elsewhere."""
    from fastconv.backends.cuda import device  # only now: most processes never see a GPU

    try:
        return device.adopt(obj)
    except (RuntimeError, ValueError, TypeError, BufferError) as error:
        raise TypeError(_message(op, f"{name} is a {kind} on device {getattr(obj, 'device', '?')}: {error}. "
                                     "Arrays in host memory need nothing. Hint: copy it to the CPU first")) from error


def to_host(x: Any) -> Array:
    """An array or scalar in host memory as NumPy's array; one on a GPU as a copy, for which the host waits."""
    return x.get() if hasattr(x, "get") and not isinstance(x, (np.ndarray, dict)) else np.asarray(x)


def to_device(x: Array) -> Array:
    """A NumPy array of any dtype as a copy on the GPU, with its memory order; one that is there already as it is.

    Raises
    ------
    RuntimeError
        Without CuPy or a GPU.
    """
    from fastconv.backends.cuda import device  # only now: most processes never see a GPU

    if on_device(x):
        return x
    if x.ndim > 2 and memory_order(x) == "channels_last":
        return np.moveaxis(device.provider().upload(np.ascontiguousarray(np.moveaxis(x, 1, -1))), -1, 1)
    return device.provider().upload(np.ascontiguousarray(x))


def on_device(x: Array) -> bool:
    """Whether an array that `as_array` returned lies on a GPU."""
    return type(x) is not np.ndarray


def _view(make: Callable[[], T], name: str, op: str, kind: str) -> T:
    try:
        return make()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(_message(op, f"{name} is a {kind} that cannot be viewed as a NumPy array without a copy "
                                     f"({error}). Hint: convert it to float32 in host memory first")) from error


def order_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> Order:
    """Memory order of a (N, C, \\*spatial) view with these strides (in bytes or elements); see `memory_order`."""
    if shape[1] <= 1:
        return "contiguous"
    spatial = [abs(s) for n, s in zip(shape[2:], strides[2:], strict=True) if n > 1]
    if spatial and abs(strides[1]) < min(spatial):
        return "channels_last"
    return "contiguous"


def memory_order(x: Array) -> Order:
    """Memory order of a batched array of shape (N, C, \\*spatial).

    ``"channels_last"`` iff C > 1, some spatial axis is longer than 1, and the stride of C is smaller in magnitude
    than every stride of a spatial axis longer than 1; else ``"contiguous"``. Outputs keep the order of the input.
    """
    return order_of(x.shape, x.strides)


def dense_strides(shape: tuple[int, ...], order: Order) -> tuple[int, ...]:
    """Strides in elements of a dense array of `shape` (N, C, \\*spatial) in `order`."""
    axes = range(len(shape)) if order == "contiguous" else (0, *range(2, len(shape)), 1)
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(axes):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


# Arrays of so many bytes live in memory that is kept for the next ones; smaller ones are the allocator's business.
_KEPT_BYTES = 64 * 1024


def empty(shape: tuple[int, ...], dtype: Any, order: Order = "contiguous", *, like: Array | None = None) -> Array:
    """Uninitialised dense array of logical `shape` (N, C, \\*spatial) in memory `order`, where `like` lies."""
    if order == "contiguous":
        return _new(shape, dtype, like)
    last = len(shape) - 1
    return _new((shape[0], *shape[2:], shape[1]), dtype, like).transpose(0, last, *range(1, last))


def _new(shape: tuple[int, ...], dtype: Any, like: Array | None) -> Array:
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _KEPT_BYTES or not (like is None or isinstance(like, np.ndarray)):
        return np.empty(shape, dtype, like=like)
    return np.ndarray(shape, dtype, _cpu.Block(size))  # type: ignore[arg-type]  # any buffer will do


def empty_like(x: Array) -> Array:
    """Uninitialised dense array with the shape, the dtype and the order of axes in memory of `x`, where `x` lies."""
    if not isinstance(x, np.ndarray) or x.nbytes < _KEPT_BYTES:
        return np.empty_like(x)
    if x.flags.c_contiguous:
        return _new(x.shape, x.dtype, None)
    # Axes from the longest stride to the shortest, as NumPy has them; of equal ones the first is the outer one.
    axes = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    new = _new(tuple(x.shape[axis] for axis in axes), x.dtype, None)
    return new.transpose([axes.index(axis) for axis in range(x.ndim)])


@contextmanager
def rehearsal() -> Iterator[list[int]]:
    """Context in which compiled passes of this thread take the memory that they need, but compute nothing.

    Yields a list to which the most bytes that arrays and workspaces held at a time are appended at the end. Small
    arrays count too.

    Raises
    ------
    RuntimeError
        If another thread is rehearsing.
    """
    global _KEPT_BYTES
    held: list[int] = []
    before, usual = _cpu.begin_rehearsal(), _KEPT_BYTES
    _KEPT_BYTES = 1
    try:
        yield held
    finally:
        _KEPT_BYTES = usual
        held.append(_cpu.end_rehearsal() - before)


def release_memory() -> int:
    """Give the memory that is kept for large arrays back to the system.

    Returns
    -------
    int
        How many bytes that were. At most an eighth and 1 MB more is kept than was in use at one time.
    """
    size = _cpu.idle_bytes()
    _cpu.release_idle()
    return size


def to_channels_last(x: object) -> Array:
    """Return `x` (N, C, \\*spatial), float32 or float64, dense in channels_last memory order.

    The shape stays (N, C, \\*spatial); only the strides change. Returns `x` itself if it is that already, else a
    copy. See `as_array` for what is accepted and raised; fewer than 3 axes raise ValueError.
    """
    array = as_array(x, "x", "to_channels_last")
    if array.ndim < 3:
        raise ValueError(f"to_channels_last: x has shape {array.shape}, but (N, C, *spatial) is needed. "
                         "Hint: add the missing axes with x[None]")
    if np.moveaxis(array, 1, -1).flags.c_contiguous:
        return array
    copy = empty(array.shape, array.dtype, "channels_last", like=array)
    copy[...] = array
    return copy


def to_contiguous(x: object) -> Array:
    """Return `x`, float32 or float64, dense in C order (NCHW): `x` itself if it is that already, else a copy."""
    return np.ascontiguousarray(as_array(x, "x", "to_contiguous"))


def check_out(out: object, shape: tuple[int, ...], dtype: Any, name: str = "out", op: str = "",
              inputs: Iterable[Array] = ()) -> Array:
    """Check an output that the caller supplies and return it as an ndarray.

    Parameters
    ----------
    out
        Any writable view of exactly `shape` and `dtype`, float32, float64 or (for indices) int64.
    inputs
        Arrays that are read while `out` is written.

    Raises
    ------
    TypeError
        If `out` has another dtype or is no array.
    ValueError
        If `out` has another shape, is read-only, overlaps itself, or shares memory with an input.
    """
    dtype = np.dtype(dtype)
    array = as_indices(out, name, op) if dtype == INT64 else as_array(out, name, op)
    if array.shape != shape:
        raise ValueError(_message(op, f"{name} has shape {array.shape}, but the result has shape {shape}. "
                                      f"Hint: np.empty({shape}, np.{dtype})"))
    if array.dtype != dtype:
        raise TypeError(_message(op, f"{name} has dtype {array.dtype}, but the result has dtype {dtype}. "
                                     f"Hint: np.empty({shape}, np.{dtype})"))
    if not on_device(array) and not array.flags.writeable:
        raise ValueError(_message(op, f"{name} is read-only. Hint: pass a writable array, or {name}.copy()"))
    if not array.flags.c_contiguous and _overlaps_itself(array):
        raise ValueError(_message(op, f"{name} has strides {array.strides} (bytes) for shape {shape}, so that "
                                      f"several elements may share memory. Hint: np.empty({shape}, np.{dtype})"))
    inputs = tuple(inputs)
    check_same_place(op, (name, array), *(("an input", other) for other in inputs))
    if any(_overlap(array, other) for other in inputs):
        raise ValueError(_message(op, f"{name} shares memory with an input, which would be overwritten while it "
                                      f"is read. Hint: np.empty({shape}, np.{dtype})"))
    return array


def check_same_place(op: str, *arrays: tuple[str, Array | None]) -> bool:
    """Check that arrays, given with their names, lie all on a GPU or all in host memory; return whether on a GPU.

    Raises
    ------
    TypeError
        If they are mixed; nothing is ever copied from one place to the other in silence.
    """
    there = [(name, on_device(x)) for name, x in arrays if x is not None]
    place = there[0][1]
    for name, other in there:
        if other is not place:
            gpu, cpu = (name, there[0][0]) if other else (there[0][0], name)
            raise TypeError(_message(op, f"{gpu} is on the GPU and {cpu} in host memory, but all arrays must lie in "
                                         "one place. Hint: cupy.asarray(x) copies to the GPU, x.get() from it, and "
                                         "net.to('cuda') the parameters of a network"))
    return place


def _overlaps_itself(x: Array) -> bool:
    """True unless each stride steps over all that the smaller strides span; true of all views made by slicing.

    The rule refuses a few interleaved views that touch no element twice (shape (2, 3), strides (3, 2)); nobody
    makes these by indexing.
    """
    if math.prod(x.shape) == 0:
        return False
    span = x.itemsize
    for stride, n in sorted((abs(s), n) for n, s in zip(x.shape, x.strides, strict=True) if n > 1):
        if stride < span:
            return True
        span += (n - 1) * stride
    return False


def _overlap(a: Array, b: Array) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
