"""Pools: `PoolProblem`, one description of every kind of pool, and its builders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from threading import Lock
from typing import Any, TypeVarTuple

import numpy as np

from fastconv.arrays import Array, Order, order_of
from fastconv.problem.common import (
    AXIS_NAMES,
    CACHE,
    Axes,
    Shaped,
    Spec,
    Strides,
    check_bytes,
    check_rank,
    elements,
    explicit_padding,
    frozen,
    integer,
    lead,
    per_axis,
    result_strides,
    size,
    spec,
)


@dataclass(frozen=True, eq=False)
class Windows:
    """Which inputs each output of a pool covers along one axis.

    Output o covers the inputs ``first[o] + i * step[o]`` for i in [0, count[o]), all inside the input:

        in_size 5, kernel 3, stride 2, padding 1        o=0: first 0, count 2 (padding cut off), extent 3
          .  0  1  2  3  4  .                           o=1: first 1, count 3, extent 3
         [-------]                                      o=2: first 3, count 2, extent 3
               [-------]
                     [-------]

    Attributes
    ----------
    table
        Read-only int64 array (4, out_size), whose rows are `first`, `step`, `count` and `extent`.
    extent
        What this axis contributes to the divisor of an average: its divisor is the product over the axes.
    """

    table: Array = field(repr=False)
    first: Array
    step: Array
    count: Array
    extent: Array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Windows) and np.array_equal(self.table, other.table)

    def __hash__(self) -> int:
        return hash(self.table.tobytes())


def _windows(first: Array, step: Array, count: Array, extent: Array) -> Windows:
    table = np.array([first, step, count, extent], np.int64)
    table.flags.writeable = False
    first, step, count, extent = table
    return Windows(table, first, step, count, extent)


@dataclass(frozen=True, eq=True)
class PoolProblem:
    """A pool of any kind in either pass: max, average, Lp, adaptive, global, or the inverse of a max pool.

    Attributes
    ----------
    ndim
        Number of spatial axes that the caller sees, 1 to 3.
    in_size, out_size
        Three numbers each, leading ones below 3D. In a max_unpool, `in_size` is the unpooled size.
    kernel
        The full window along each axis; in adaptive pools, the largest.
    windows
        One `Windows` per axis; for gradients and max_unpool by index, which need none, empty tables.
    dtype
        "float32" or "float64".
    x_strides, y_strides
        Strides in elements of (N, C, D, H, W) of the array of size `in_size` and of that of size `out_size`,
        whichever of them is computed; 0 for the axes that the caller does not see.
    order
        Memory order of the result if fastconv allocates it: the order of the input.
    """

    ndim: int
    batch: int
    channels: int
    in_size: Axes
    out_size: Axes
    kernel: Axes
    windows: tuple[Windows, Windows, Windows]
    dtype: str
    x_strides: Strides
    y_strides: Strides
    order: Order

    @cached_property
    def _hash(self) -> int:
        return hash((self.batch, self.channels, self.in_size, self.out_size, self.windows, self.dtype,
                     self.x_strides, self.y_strides))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def x_shape(self) -> tuple[int, ...]:
        """(N, C, \\*in_size) as the caller sees it."""
        return (self.batch, self.channels, *self.in_size[3 - self.ndim:])

    @cached_property
    def y_shape(self) -> tuple[int, ...]:
        """(N, C, \\*out_size) as the caller sees it."""
        return (self.batch, self.channels, *self.out_size[3 - self.ndim:])


_NO_WINDOWS = _windows(*np.empty((4, 0), np.int64))
_ONE_WINDOW = _windows(*np.array([[0], [1], [1], [1]]))


# Problems with larger window tables than this are not remembered, so that the cache stays below 64 MiB.
_LARGE = 64 * 1024

Ts = TypeVarTuple("Ts")


def _remembered(build: Callable[[*Ts], PoolProblem]) -> Callable[[*Ts], PoolProblem]:
    """Cache problems by the arguments of `build`, as functools.lru_cache would, but for those with large tables."""
    known: dict[Any, PoolProblem] = {}
    lock = Lock()

    @wraps(build)
    def find(*key: *Ts) -> PoolProblem:
        problem = known.get(key)
        if problem is None:
            problem = build(*key)
            if sum(w.table.nbytes for w in problem.windows) <= _LARGE:
                with lock:
                    if len(known) >= CACHE:
                        known.pop(next(iter(known)))
                    known[key] = problem
        return problem

    return find


@dataclass(frozen=True)
class _Axis:
    """Checked parameters of a pool along one axis."""

    size: int
    kernel: int
    stride: int
    dilation: int
    lo: int
    hi: int

    def outputs(self, op: str, ceil_mode: bool) -> int:
        """Number of outputs: floor((in + lo + hi - dilation * (kernel - 1) - 1) / stride) + 1.

        ``ceil_mode`` rounds up instead, unless the window thus added would start behind the input (PyTorch's rule).
        """
        extent, padded = self.dilation * (self.kernel - 1) + 1, self.size + self.lo + self.hi
        span = padded - extent
        count = span // self.stride + 1
        if ceil_mode and span % self.stride and count * self.stride < self.size + self.lo:
            count += 1
        if count < 1:
            raise ValueError(f"{op}: the window covers dilation * (kernel - 1) + 1 = {self.dilation} * "
                             f"({self.kernel} - 1) + 1 = {extent} elements, but the padded input has only "
                             f"{self.size} + {self.lo} + {self.hi} = {padded}. Hint: use a smaller kernel_size, or "
                             "an adaptive pool")
        return count


def _sliding(axis: _Axis, outputs: int, include_pad: bool) -> Windows:
    start = np.arange(outputs, dtype=np.int64) * axis.stride - axis.lo
    # Taps before the input, and taps before its end (before the end of its padding): taps are `dilation` apart.
    skipped = np.maximum(-(start // axis.dilation), 0)
    inside = np.minimum(-((start - axis.size) // axis.dilation), axis.kernel)
    padded = np.minimum(-((start - axis.size - axis.hi) // axis.dilation), axis.kernel)
    count = np.maximum(inside - skipped, 0)
    return _windows(start + skipped * axis.dilation, np.full_like(start, axis.dilation), count,
                    padded if include_pad else count)


def _adaptive(in_size: int, outputs: int) -> Windows:
    """Output o covers [floor(o * in / out), ceil((o + 1) * in / out)): PyTorch's adaptive pools."""
    o = np.arange(outputs, dtype=np.int64)
    first = o * in_size // max(outputs, 1)
    count = -(-(o + 1) * in_size // max(outputs, 1)) - first
    return _windows(first, np.ones_like(o), count, count)


def _pool(op: str, dtype: str, order: Order, windows: tuple[Windows, ...], kernel: tuple[int, ...],
          x_shape: tuple[int, ...], y_shape: tuple[int, ...], x_strides: Strides, y_strides: Strides) -> PoolProblem:
    for name, shape in (("input", x_shape), ("output", y_shape)):
        check_bytes(op, name, shape, dtype)
    depth, height, width = (_ONE_WINDOW,) * (3 - len(windows)) + windows
    return PoolProblem(
        ndim=len(kernel), batch=x_shape[0], channels=x_shape[1], in_size=lead(x_shape[2:], 1),
        out_size=lead(y_shape[2:], 1), kernel=lead(kernel, 1), windows=(depth, height, width), dtype=dtype,
        x_strides=x_strides, y_strides=y_strides, order=order)


def _check_not_empty(op: str, name: str, shape: tuple[int, ...]) -> None:
    if min(shape[1:]) < 1:
        raise ValueError(f"{op}: {name} has shape {shape}, but every axis behind the batch must be at least 1. "
                         "Hint: only the batch may be empty")


def _sliding_windows(op: str, in_size: tuple[int, ...], kernel_size: Any, stride: Any, padding: Any, dilation: Any,
                     ceil_mode: bool, include_pad: bool) -> tuple[tuple[Windows, ...], tuple[int, ...]]:
    """Window tables and kernel of each axis, from the parameters of a public function."""
    ndim = len(in_size)
    kernel = per_axis(op, "kernel_size", kernel_size, ndim, 1)
    stride = kernel if stride is None or stride == () else per_axis(op, "stride", stride, ndim, 1)
    dilation = per_axis(op, "dilation", dilation, ndim, 1)
    pad_lo, pad_hi = explicit_padding(padding, in_size, kernel, stride, dilation, op)
    symmetric = not isinstance(padding, str) and pad_lo == pad_hi
    windows = []
    for n, k, s, d, lo, hi in zip(in_size, kernel, stride, dilation, pad_lo, pad_hi, strict=True):
        if symmetric and lo > k // 2:
            raise ValueError(f"{op}: padding is {lo}, but at most half of kernel_size is allowed: {k} // 2 = {k // 2}. "
                             f"Hint: pairs, padding=(({lo}, {hi}),), may be larger")
        axis = _Axis(n, k, s, d, lo, hi)
        outputs = axis.outputs(op, ceil_mode)
        # The first and the last window are checked first, lest an absurd padding ask for a table of gigabytes.
        ends_outside = lo > d * (k - 1) or (outputs - 1) * s - lo >= n
        table = _NO_WINDOWS if ends_outside else _sliding(axis, outputs, include_pad)
        if ends_outside or table.count.min() < 1:
            raise ValueError(f"{op}: some window covers only padding: input size {n}, kernel_size {k}, stride {s}, "
                             f"dilation {d}, padding ({lo}, {hi}). Hint: reduce the padding")
        windows.append(table)
    return tuple(windows), kernel


def pool_problem(x: Shaped, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
                 ceil_mode: bool = False, include_pad: bool = True, *, ndim: int, op: str,
                 out: Shaped | None = None) -> PoolProblem:
    """Describe a pool with a sliding window over `x` (N, C, \\*spatial).

    Parameters
    ----------
    kernel_size, dilation
        An integer or one per spatial axis, >= 1.
    stride
        The same; None is `kernel_size`.
    padding
        See `explicit_padding`; as numbers at most ``kernel_size // 2`` (PyTorch's rule), as pairs anything that
        leaves no window without an input.
    ceil_mode
        Round the output size up: a last window may hang over the end, if it starts inside the input or the
        padding before it.
    include_pad
        Count the padding in the divisor of an average.

    Raises
    ------
    TypeError, ValueError
        With the argument, its value, the rule and a hint.
    """
    return _sliding_pool(op, ndim, spec(x), None if out is None else out.strides, frozen(kernel_size),
                         frozen(stride), frozen(padding), frozen(dilation), bool(ceil_mode), bool(include_pad))


@_remembered
def _sliding_pool(op: str, ndim: int, x: Spec, out: tuple[int, ...] | None, kernel_size: Any, stride: Any,
                  padding: Any, dilation: Any, ceil_mode: bool, include_pad: bool) -> PoolProblem:
    shape, strides, dtype = x
    check_rank(op, "input", shape, ndim)
    _check_not_empty(op, "input", shape)
    windows, kernel = _sliding_windows(op, shape[2:], kernel_size, stride, padding, dilation, ceil_mode, include_pad)
    y_shape = (*shape[:2], *(len(w.first) for w in windows))
    order = order_of(shape, strides)
    return _pool(op, dtype, order, windows, kernel, shape, y_shape, elements(op, "input", x),
                 result_strides(op, y_shape, dtype, order, out))


def pool_grad_problem(input_size: Sequence[int], dy: Shaped, kernel_size: Any, stride: Any = None, padding: Any = 0,
                      dilation: Any = 1, ceil_mode: bool = False, include_pad: bool = True, *, ndim: int, op: str,
                      out: Shaped | None = None) -> PoolProblem:
    """Describe the gradient, of shape `input_size`, of the pool that `pool_problem` describes, from `dy`."""
    return _sliding_pool_grad(op, ndim, frozen(input_size), spec(dy), None if out is None else out.strides,
                              frozen(kernel_size), frozen(stride), frozen(padding), frozen(dilation),
                              bool(ceil_mode), bool(include_pad))


@_remembered
def _sliding_pool_grad(op: str, ndim: int, input_size: Any, dy: Spec, out: tuple[int, ...] | None, kernel_size: Any,
                       stride: Any, padding: Any, dilation: Any, ceil_mode: bool, include_pad: bool) -> PoolProblem:
    x_shape = _grad_input_size(op, ndim, input_size, dy)
    windows, kernel = _sliding_windows(op, x_shape[2:], kernel_size, stride, padding, dilation, ceil_mode, include_pad)
    return _grad(op, x_shape, dy, windows, kernel, out)


def _grad_input_size(op: str, ndim: int, input_size: Any, dy: Spec) -> tuple[int, ...]:
    x_shape = size(op, "input_size", input_size)
    check_rank(op, "input_size", x_shape, ndim)
    check_rank(op, "grad_output", dy[0], ndim)
    _check_not_empty(op, "input_size", x_shape)
    return x_shape


def _grad(op: str, x_shape: tuple[int, ...], dy: Spec, windows: tuple[Windows, ...], kernel: tuple[int, ...],
          out: tuple[int, ...] | None) -> PoolProblem:
    dy_shape, dy_strides, dtype = dy
    wanted = (*x_shape[:2], *(len(w.first) for w in windows))
    if dy_shape != wanted:
        raise ValueError(f"{op}: grad_output has shape {dy_shape}, but the output has shape {wanted}; both must be the "
                         "same. Hint: pass the parameters of the forward pass")
    order = order_of(dy_shape, dy_strides)
    return _pool(op, dtype, order, windows, kernel, x_shape, dy_shape,
                 result_strides(op, x_shape, dtype, order, out), elements(op, "grad_output", dy))


def adaptive_pool_problem(x: Shaped, output_size: Any, *, ndim: int, op: str,
                          out: Shaped | None = None) -> PoolProblem:
    """Describe a pool whose windows divide `x` (N, C, \\*spatial) into `output_size` parts of about equal length.

    Parameters
    ----------
    output_size
        An integer or one per spatial axis, >= 0; None keeps the size of the axis.

    Raises
    ------
    TypeError, ValueError
        With the argument, its value, the rule and a hint.
    """
    return _adaptive_pool(op, ndim, spec(x), None if out is None else out.strides, frozen(output_size))


@_remembered
def _adaptive_pool(op: str, ndim: int, x: Spec, out: tuple[int, ...] | None, output_size: Any) -> PoolProblem:
    shape, strides, dtype = x
    check_rank(op, "input", shape, ndim)
    _check_not_empty(op, "input", shape)
    windows, kernel = _adaptive_windows(op, shape[2:], output_size)
    y_shape = (*shape[:2], *(len(w.first) for w in windows))
    order = order_of(shape, strides)
    return _pool(op, dtype, order, windows, kernel, shape, y_shape, elements(op, "input", x),
                 result_strides(op, y_shape, dtype, order, out))


def adaptive_pool_grad_problem(input_size: Sequence[int], dy: Shaped, *, ndim: int, op: str,
                               out: Shaped | None = None) -> PoolProblem:
    """Describe the gradient, of shape `input_size`, of an adaptive pool to the spatial size of `dy`."""
    return _adaptive_pool_grad(op, ndim, frozen(input_size), spec(dy), None if out is None else out.strides)


@_remembered
def _adaptive_pool_grad(op: str, ndim: int, input_size: Any, dy: Spec, out: tuple[int, ...] | None) -> PoolProblem:
    x_shape = _grad_input_size(op, ndim, input_size, dy)
    windows, kernel = _adaptive_windows(op, x_shape[2:], dy[0][2:])
    return _grad(op, x_shape, dy, windows, kernel, out)


def _adaptive_windows(op: str, in_size: tuple[int, ...],
                      output_size: Any) -> tuple[tuple[Windows, ...], tuple[int, ...]]:
    ndim = len(in_size)
    wanted = output_size if isinstance(output_size, tuple) else (output_size,) * ndim
    if len(wanted) != ndim:
        raise ValueError(f"{op}: output_size is {wanted} with {len(wanted)} numbers, but {ndim} are needed, one per "
                         f"spatial axis ({AXIS_NAMES[ndim]}). Hint: a plain integer serves all axes")
    sizes = [n if o is None else integer(op, "output_size", o, 0) for n, o in zip(in_size, wanted, strict=True)]
    windows = tuple(_adaptive(n, o) for n, o in zip(in_size, sizes, strict=True))
    return windows, tuple(int(w.count.max(initial=1)) for w in windows)


def indexed_grad_problem(input_size: Sequence[int], dy: Shaped, *, ndim: int, op: str,
                         out: Shaped | None = None) -> PoolProblem:
    """Describe the gradient, of shape `input_size`, of a max pool of any kind; the indices say where `dy` goes."""
    return _indexed_grad(op, ndim, frozen(input_size), spec(dy), None if out is None else out.strides)


@_remembered
def _indexed_grad(op: str, ndim: int, input_size: Any, dy: Spec, out: tuple[int, ...] | None) -> PoolProblem:
    x_shape = _grad_input_size(op, ndim, input_size, dy)
    dy_shape, dy_strides, dtype = dy
    if dy_shape[:2] != x_shape[:2]:
        raise ValueError(f"{op}: grad_output has shape {dy_shape}, but input_size is {x_shape}; batch and channels "
                         "must be the same. Hint: pass the shape of the input of the max pool")
    order = order_of(dy_shape, dy_strides)
    return _pool(op, dtype, order, (_NO_WINDOWS,) * ndim, (1,) * ndim, x_shape, dy_shape,
                 result_strides(op, x_shape, dtype, order, out), elements(op, "grad_output", dy))


def unpool_problem(x: Shaped, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None, *,
                   ndim: int, op: str, out: Shaped | None = None) -> PoolProblem:
    """Describe the inverse of a max pool: `x` (N, C, \\*pooled) back to size (N, C, \\*unpooled).

    Parameters
    ----------
    kernel_size, stride, padding
        Those of the max pool; an integer or one per spatial axis.
    output_size
        The unpooled size, with or without N and C, less than one stride away from
        (in - 1) * stride + kernel_size - 2 * padding, which None chooses.

    Raises
    ------
    TypeError, ValueError
        With the argument, its value, the rule and a hint.
    """
    return _unpool(op, ndim, spec(x), None if out is None else out.strides, frozen(kernel_size), frozen(stride),
                   frozen(padding), frozen(output_size))


@_remembered
def _unpool(op: str, ndim: int, x: Spec, out: tuple[int, ...] | None, kernel_size: Any, stride: Any, padding: Any,
            output_size: Any) -> PoolProblem:
    shape, strides, dtype = x
    check_rank(op, "input", shape, ndim)
    _check_not_empty(op, "input", shape)
    kernel = per_axis(op, "kernel_size", kernel_size, ndim, 1)
    steps = kernel if stride is None or stride == () else per_axis(op, "stride", stride, ndim, 1)
    pads = per_axis(op, "padding", padding, ndim, 0)
    default = tuple((n - 1) * s + k - 2 * p for n, s, k, p in zip(shape[2:], steps, kernel, pads, strict=True))
    unpooled = default if output_size is None else _unpooled_size(op, output_size, default, steps)
    if min(unpooled) < 1:
        raise ValueError(f"{op}: the output would have spatial size (in - 1) * stride + kernel_size - 2 * padding = "
                         f"{unpooled}, but at least 1 is needed. Hint: reduce the padding {pads}")
    result = (*shape[:2], *unpooled)
    order = order_of(shape, strides)
    return _pool(op, dtype, order, (_NO_WINDOWS,) * ndim, kernel, result, shape,
                 result_strides(op, result, dtype, order, out), elements(op, "input", x))


def _unpooled_size(op: str, output_size: Any, default: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    ndim = len(default)
    wanted = size(op, "output_size", output_size)
    if len(wanted) not in (ndim, ndim + 1, ndim + 2):
        raise ValueError(f"{op}: output_size is {wanted} with {len(wanted)} numbers, but {ndim} are needed, one per "
                         f"spatial axis ({AXIS_NAMES[ndim]}), with or without batch and channels. "
                         "Hint: pass the shape of the input of the max pool")
    wanted = wanted[-ndim:]
    for n, d, s in zip(wanted, default, stride, strict=True):
        if not d - s < n < d + s:
            raise ValueError(f"{op}: output_size is {wanted}, but it must be less than one stride away from {default}: "
                             f"{d} - {s} < {n} < {d} + {s} is false. "
                             "Hint: pass the shape of the input of the max pool")
    return wanted


def unpool_grad_problem(dy: Shaped, x_shape: tuple[int, ...], *, ndim: int, op: str,
                        out: Shaped | None = None) -> PoolProblem:
    """Describe the gradient of a max unpool, of shape `x_shape` (that of the indices), from `dy`."""
    return _unpool_grad(op, ndim, spec(dy), x_shape, None if out is None else out.strides)


@_remembered
def _unpool_grad(op: str, ndim: int, dy: Spec, x_shape: tuple[int, ...], out: tuple[int, ...] | None) -> PoolProblem:
    dy_shape, dy_strides, dtype = dy
    check_rank(op, "grad_output", dy_shape, ndim)
    check_rank(op, "indices", x_shape, ndim)
    _check_not_empty(op, "grad_output", dy_shape)
    if dy_shape[:2] != x_shape[:2]:
        raise ValueError(f"{op}: grad_output has shape {dy_shape}, but indices have shape {x_shape}; batch and "
                         "channels must be the same. Hint: pass the indices of the forward pass")
    order = order_of(dy_shape, dy_strides)
    return _pool(op, dtype, order, (_NO_WINDOWS,) * ndim, (1,) * ndim, dy_shape, x_shape,
                 elements(op, "grad_output", dy), result_strides(op, x_shape, dtype, order, out))
