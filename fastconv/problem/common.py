"""What both kinds of problem share: parameters, padding, shapes and strides, each checked and normalised once."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fastconv.arrays import Array, Order, dense_strides

Axes = tuple[int, int, int]
Strides = tuple[int, int, int, int, int]
# What a builder knows of an array, and the key of its cache: shape, strides in bytes, dtype.
Spec = tuple[tuple[int, ...], tuple[int, ...], str]

# Parameters of one axis stay below 2**31, so that C may multiply two of them in 64 bits.
MAX_PARAMETER = 2**31 - 1
MAX_BYTES = 2**63 - 1
# Problems that each builder remembers; a network has some hundred, changing image sizes push old ones out.
CACHE = 1024
AXIS_NAMES = {1: "L", 2: "H, W", 3: "D, H, W"}


class Shaped(Protocol):
    """What the builders read of an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def strides(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...


def spec(x: Shaped) -> Spec:
    """What a builder is told of `x`, which is float32 or float64."""
    return x.shape, x.strides, _NAMES[x.dtype.char]


# dtype.name takes NumPy longer than all the rest of a call's checks.
_NAMES = {"e": "float16", "E": "bfloat16", "f": "float32", "d": "float64"}


def integer(op: str, name: str, value: Any, low: int, high: int = MAX_PARAMETER) -> int:
    """`value` as an int from `low` to `high`; bool and float are no integers here."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} is {value!r}, but an integer is needed. "
                        f"Hint: pass a Python int, such as {max(low, 1)}") from None
    if number < low:
        raise ValueError(f"{op}: {name} is {number}, but at least {low} is needed. "
                         f"Hint: {_LOW_HINTS.get(name, f'pass {low} or more')}")
    if number > high:
        raise ValueError(f"{op}: {name} is {number}, but at most {high} (2**{high.bit_length()} - 1) is supported. "
                         "Hint: check for an integer overflow in your code")
    return number


_LOW_HINTS = {
    "padding": "crop the input by slicing for a negative padding",
    "stride": "stride 1 visits every position",
    "dilation": "dilation 1 is the plain kernel",
    "groups": "groups=1 connects all channels",
}


def frozen(value: Any) -> Any:
    """A hashable, exact stand-in for a parameter: 1, 1.0 and True must not share an entry of the cache."""
    kind = type(value)
    if kind is int or kind is str or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return tuple(frozen(v) for v in value)
    try:
        return _Opaque(value) if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        return _Opaque(value)


class _Opaque:
    """A parameter that is no integer, tuple or string; equal to nothing else, so that its error is raised anew."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def per_axis(op: str, name: str, value: Any, ndim: int, low: int) -> tuple[int, ...]:
    """One integer per spatial axis, from an integer, a tuple of one, or a tuple of `ndim`."""
    value = frozen(value)
    if not isinstance(value, tuple):
        return (integer(op, name, value, low),) * ndim
    if len(value) not in (1, ndim):
        raise ValueError(f"{op}: {name} is {value} with {len(value)} numbers, but 1 or {ndim} are needed, one per "
                         f"spatial axis ({AXIS_NAMES[ndim]}). Hint: a plain integer serves all axes")
    numbers = tuple(integer(op, name, v, low) for v in value)
    return numbers * ndim if len(numbers) == 1 else numbers


def lead(values: tuple[int, ...], fill: int) -> Axes:
    """Three numbers: `values` behind as many `fill` as are missing."""
    full = (fill,) * (3 - len(values)) + values
    return full[0], full[1], full[2]


def explicit_padding(padding: Any, in_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
                     dilation: Sequence[int], op: str = "conv") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and behind each spatial axis, from any form that `padding` may have.

    Parameters
    ----------
    padding
        An integer or one integer per axis (both sides); a pair (lo, hi) per axis; ``"valid"`` (none);
        ``"same"``: out = ceil(in / stride), the odd element behind (ONNX SAME_UPPER); or ``"same_lower"``: the
        odd element before (ONNX SAME_LOWER).
    in_size, kernel, stride, dilation
        One integer per spatial axis.

    Returns
    -------
    pad_lo, pad_hi
        Tuples of one integer per spatial axis.

    Raises
    ------
    TypeError, ValueError
        For an unknown name, a wrong number of entries, or entries that are no integers >= 0.
    """
    ndim = len(in_size)
    padding = frozen(padding)
    if isinstance(padding, str):
        if padding == "valid":
            return (0,) * ndim, (0,) * ndim
        if padding not in ("same", "same_lower"):
            raise ValueError(f"{op}: padding is {padding!r}, but 'valid', 'same', 'same_lower' or numbers are "
                             "needed. Hint: padding=1 pads one element on every side")
        total = [max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
                 for n, k, s, d in zip(in_size, kernel, stride, dilation, strict=True)]
        small, large = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        return (small, large) if padding == "same" else (large, small)
    if isinstance(padding, tuple) and any(isinstance(p, tuple) for p in padding):
        if len(padding) not in (1, ndim) or any(not isinstance(p, tuple) or len(p) != 2 for p in padding):
            raise ValueError(f"{op}: padding is {padding}, but {ndim} pairs (lo, hi) are needed, one per spatial "
                             f"axis ({AXIS_NAMES[ndim]}). Hint: padding={((1, 2),) * ndim}")
        pairs = [tuple(integer(op, "padding", v, 0) for v in pair) for pair in padding]
        pairs = pairs * ndim if len(pairs) == 1 else pairs
        return tuple(lo for lo, _ in pairs), tuple(hi for _, hi in pairs)
    both = per_axis(op, "padding", padding, ndim, 0)
    return both, both


def check_rank(op: str, name: str, shape: tuple[int, ...], ndim: int) -> None:
    """Check that `shape` is (N, C, \\*spatial) with `ndim` spatial axes."""
    if len(shape) != ndim + 2:
        raise ValueError(f"{op}: {name} has shape {shape} with {len(shape)} axes, but {ndim + 2} are needed: "
                         f"(N, C, {AXIS_NAMES[ndim]}). Hint: add a missing axis with {name}[None]")


def batched(x: Array, ndim: int, op: str, name: str = "input") -> tuple[Array, bool]:
    """View `x` as (N, C, \\*spatial).

    Parameters
    ----------
    x
        (N, C, \\*spatial), or (C, \\*spatial) without a batch, with `ndim` spatial axes.

    Returns
    -------
    x, alone
        The batched view, and whether a batch axis was added (take it off the result).
    """
    if x.ndim == ndim + 2:
        return x, False
    if x.ndim == ndim + 1:
        return x[None], True
    axes = AXIS_NAMES[ndim]
    raise ValueError(f"{op}: {name} has shape {x.shape} with {x.ndim} axes, but (N, C, {axes}) or (C, {axes}) is "
                     f"needed. Hint: reshape it, or add axes with {name}[None]")


def check_ndim(ndim: int, op: str, name: str = "weight") -> int:
    """Return `ndim` if it is a supported number of spatial axes."""
    if ndim not in AXIS_NAMES:
        raise ValueError(f"{op}: {name} has {ndim} spatial axes, but 1, 2 or 3 are supported. "
                         "Hint: fold further axes into the batch or the channels")
    return ndim


def check_bias(bias: Array, channels: int, dtype: str, op: str) -> None:
    """Check that `bias` has one value of `dtype` for each of `channels` output channels."""
    if bias.shape != (channels,):
        raise ValueError(f"{op}: bias has shape {bias.shape}, but ({channels},) is needed, one value per output "
                         "channel. Hint: bias.reshape(-1) drops axes of length 1")
    if _NAMES[bias.dtype.char] != dtype:
        raise TypeError(f"{op}: bias has dtype {bias.dtype}, but input has dtype {dtype}. "
                        f"Hint: bias.astype(np.{dtype})")


def check_dtypes(op: str, first: str, a: Spec, second: str, b: Spec) -> None:
    """Check that two arrays have one dtype."""
    if a[2] != b[2]:
        raise TypeError(f"{op}: {second} has dtype {b[2]}, but {first} has dtype {a[2]}; both must be the same. "
                        f"Hint: {second}.astype(np.{a[2]})")


def check_bytes(op: str, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Check that offsets into an array of `shape` fit 64 bits."""
    count, itemsize = math.prod(shape), np.dtype(dtype).itemsize
    if count * itemsize > MAX_BYTES:
        raise ValueError(f"{op}: {name} would have shape {shape}: {count} * {itemsize} bytes, more than the "
                         f"{MAX_BYTES} (2**63 - 1) that can be addressed. Hint: check sizes and padding")


def size(op: str, name: str, value: Any) -> tuple[int, ...]:
    """A shape that the caller states, as a tuple of integers >= 0."""
    if not isinstance(value, tuple):
        raise TypeError(f"{op}: {name} is {value!r}, but a tuple of integers is needed. Hint: pass array.shape")
    return tuple(integer(op, name, v, 0, MAX_BYTES) for v in value)


def elements(op: str, name: str, array: Spec) -> Strides:
    """Strides in elements of five axes, from those in bytes of the caller's axes."""
    shape, strides, dtype = array
    itemsize = np.dtype(dtype).itemsize
    if any(s % itemsize for n, s in zip(shape, strides, strict=True) if n > 1):
        raise ValueError(f"{op}: {name} has strides {strides} (bytes), but multiples of its item size {itemsize} "
                         f"are needed. Hint: np.ascontiguousarray({name})")
    return five(tuple(s // itemsize for s in strides))


def five(strides: tuple[int, ...]) -> Strides:
    """Strides of (N, C, D, H, W), 0 for the axes that the caller does not see."""
    full = (*strides[:2], *(0,) * (5 - len(strides)), *strides[2:])
    return full[0], full[1], full[2], full[3], full[4]


def result_strides(op: str, shape: tuple[int, ...], dtype: str, order: Order,
                   out: tuple[int, ...] | None) -> Strides:
    """Strides of the result: those of ``out=`` (bytes) if given, else of a dense array in the input's order."""
    if out is None:
        return five(dense_strides(shape, order))
    if len(out) != len(shape):
        raise ValueError(f"{op}: out has {len(out)} axes, but the result has {len(shape)}: its shape is {shape}. "
                         f"Hint: np.empty({shape}, np.{dtype})")
    return elements(op, "out", (shape, out, dtype))
