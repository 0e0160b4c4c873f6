"""An array that stands for CuPy's: NumPy's memory behind what CuPy offers, and no more than that.

What CuPy refuses is refused: conversion to NumPy in silence, mixing with NumPy's arrays, ``where=`` of ufuncs, and
every function that `FUNCTIONS` does not list. `test_cuda_device.py` checks the lists against CuPy where that is there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

# NumPy's functions that fastconv calls and that CuPy has under the same name, with the keywords that it takes.
FUNCTIONS: dict[str, set[str]] = {
    "all": {"axis"},
    "any": {"axis"},
    "argmax": {"axis"},
    "array": {"dtype", "copy", "order"},
    "array_equal": set(),
    "ascontiguousarray": {"dtype"},
    "asarray": {"dtype"},
    "broadcast_to": set(),
    "can_cast": set(),
    "clip": {"out"},
    "concatenate": {"axis", "out", "dtype"},
    "copyto": {"casting", "where"},
    "count_nonzero": {"axis"},
    "empty": {"dtype"},
    "empty_like": {"dtype"},
    "full_like": {"dtype"},
    "max": {"axis", "keepdims"},
    "mean": {"axis", "dtype"},
    "may_share_memory": set(),
    "moveaxis": set(),
    "ndim": set(),
    "ones_like": {"dtype", "shape"},
    "pad": {"mode"},
    "put_along_axis": set(),
    "shape": set(),
    "shares_memory": {"max_work"},
    "sum": {"axis", "dtype", "keepdims"},
    "take": {"axis"},
    "take_along_axis": {"axis"},
    "where": set(),
    "zeros": {"dtype"},
    "zeros_like": {"dtype"},
}
UFUNCS = {
    "absolute", "add", "bitwise_and", "bitwise_or", "divide", "equal", "exp", "expm1", "greater", "greater_equal",
    "invert", "isfinite", "isnan", "less", "less_equal", "log", "log1p", "logical_and", "logical_not", "logical_or",
    "maximum", "minimum", "multiply", "negative", "not_equal", "power", "sign", "sqrt", "square", "subtract", "tanh",
}
KEYWORDS = {"out", "dtype", "casting"}  # of ufuncs


class DeviceArray(NDArrayOperatorsMixin):
    """See the module; `host` looks inside."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    shape = property(lambda self: self._values.shape)
    strides = property(lambda self: self._values.strides)
    dtype = property(lambda self: self._values.dtype)
    ndim = property(lambda self: self._values.ndim)
    size = property(lambda self: self._values.size)
    itemsize = property(lambda self: self._values.itemsize)
    nbytes = property(lambda self: self._values.nbytes)
    T = property(lambda self: DeviceArray(self._values.T))

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self._values.__array_interface__["data"][0])

    @property
    def flags(self) -> Any:
        flags = self._values.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, owndata=flags.owndata)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self._values.__array_interface__, "version": 3}

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        assert method == "__call__", f"CuPy has no {ufunc.__name__}.{method} that fastconv could use"
        assert ufunc.__name__ in UFUNCS, f"{ufunc.__name__} is not in the list of ufuncs of CuPy that fastconv uses"
        assert set(kwargs) <= KEYWORDS, f"CuPy's ufuncs take no {sorted(set(kwargs) - KEYWORDS)}"
        return _wrapped(ufunc(*_unwrapped(inputs), **_unwrapped(kwargs)), kwargs.get("out"))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        name = function.__name__
        assert name in FUNCTIONS, f"{name} is not in the list of functions of CuPy that fastconv uses"
        assert set(kwargs) <= FUNCTIONS[name], f"CuPy's {name} takes no {sorted(set(kwargs) - FUNCTIONS[name])}"
        if name in ("empty", "zeros", "array", "asarray"):  # like= brought us here; a NumPy array is uploaded
            return DeviceArray(function(*(host(a) if isinstance(a, DeviceArray) else a for a in args), **kwargs))
        return _wrapped(function(*_unwrapped(args), **_unwrapped(kwargs)), kwargs.get("out"))

    def __getitem__(self, key: Any) -> DeviceArray:
        return DeviceArray(np.asarray(self._values[_index(key)]))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._values[_index(key)] = _unwrapped(value)

    def __len__(self) -> int:
        return len(self._values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def __float__(self) -> float:
        return float(self._values)

    def __int__(self) -> int:
        return int(self._values)

    def __index__(self) -> int:
        return self._values.__index__()

    def __repr__(self) -> str:
        return f"DeviceArray({self._values!r})"

    def item(self, *args: int) -> Any:
        return self._values.item(*args)

    def get(self) -> np.ndarray:
        return self._values.copy()

    def tolist(self) -> Any:
        return self._values.tolist()


def _method(name: str) -> Any:
    def method(self: DeviceArray, *args: Any, **kwargs: Any) -> Any:
        return _wrapped(getattr(self._values, name)(*_unwrapped(args), **_unwrapped(kwargs)), None)

    return method


for _name in ("all", "any", "argmax", "astype", "copy", "fill", "max", "mean", "min", "ravel", "reshape", "sum",
              "transpose", "view"):
    setattr(DeviceArray, _name, _method(_name))


def _unwrapped(values: Any) -> Any:
    """The NumPy arrays behind the arguments; an array of NumPy itself among them is a mistake, as for CuPy."""
    if isinstance(values, DeviceArray):
        return values._values
    if isinstance(values, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>")
    if isinstance(values, dict):
        return {k: _unwrapped(v) for k, v in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_unwrapped(v) for v in values)
    return values


def _index(key: Any) -> Any:
    """As a key CuPy takes arrays of NumPy too."""
    if isinstance(key, tuple):
        return tuple(_index(k) for k in key)
    return key._values if isinstance(key, DeviceArray) else key


def _wrapped(result: Any, out: Any) -> Any:
    if out is not None:
        return out[0] if isinstance(out, tuple) else out
    # A sum over everything is an array of no axes in CuPy, not a number.
    return DeviceArray(np.asarray(result)) if isinstance(result, (np.ndarray, np.generic)) else result


def device(x: np.ndarray) -> DeviceArray:
    """A copy of `x` on the "device", with the same strides."""
    low, high = np.lib.array_utils.byte_bounds(x) if x.size else (0, 0)
    memory = np.empty(high - low, np.uint8)
    start = x.__array_interface__["data"][0] - low if x.size else 0
    copy = np.ndarray(x.shape, x.dtype, memory, start, x.strides)
    copy[...] = x
    return DeviceArray(copy)


def host(x: Any) -> np.ndarray:
    """What lies in `x`, as a view."""
    assert isinstance(x, DeviceArray), f"{type(x).__qualname__} is not on the device"
    return x._values
