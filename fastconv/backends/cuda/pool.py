"""Pools on the GPU: the functions of `reference`, run by pool.cu.

An index that points outside of its plane is skipped, or reads zero: to raise, the host would have to wait for the GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from fastconv.arrays import empty
from fastconv.backends.cuda.conv import DTYPES
from fastconv.backends.cuda.device import Kernel, cached, provider
from fastconv.backends.cuda.tiles import ceil_div
from fastconv.problem import PoolProblem
from fastconv.problem.common import five

Array = Any  # of the provider

# The structure of pool.cu.
POOL = np.dtype([
    ("x_strides", np.int64, 5), ("y_strides", np.int64, 5), ("x2_strides", np.int64, 5), ("y2_strides", np.int64, 5),
    ("in_size", np.int32, 3), ("out_size", np.int32, 3), ("batch", np.int32), ("channels", np.int32)], align=True)

# From this many inputs on a warp shares a window, where those of a row are neighbours in memory.
LARGE_WINDOW = 64
# Up to so many threads count elements in 32 bits.
MOST_INT = 2**31 - 256
_NO_STRIDES = (0,) * 5


def max_pool(problem: PoolProblem, x: Array, indices: bool = True, *,
             out: Array | None = None) -> tuple[Array, Array | None]:
    """(y, positions): the maximum of each window and, with `indices`, its flat position in the unpadded plane."""
    y = _y_like(problem, out, x)
    positions = empty(problem.y_shape, np.int64, problem.order, like=x) if indices else None
    _run("MAX_POOL", "max_pool", problem, x, y, None, positions, (x, y, positions, _tables(problem)))
    return y, positions


def avg_pool(problem: PoolProblem, x: Array, divisor: int | None = None, *, out: Array | None = None) -> Array:
    """y: the sum of each window over its extent, or over `divisor`."""
    y = _y_like(problem, out, x)
    _run("SUM_POOL", "sum_pool", problem, x, y, None, None, (x, y, _tables(problem)), _sum_arguments(problem, divisor),
         _kind(None))
    return y


def lp_pool(problem: PoolProblem, x: Array, p: float, *, out: Array | None = None) -> Array:
    """y: the p-norm of each window, without absolute values."""
    y = _y_like(problem, out, x)
    _run("SUM_POOL", "sum_pool", problem, x, y, None, None, (x, y, _tables(problem)), _sum_arguments(problem, p=p),
         _kind(p))
    return y


def max_pool_grad(problem: PoolProblem, dy: Array, indices: Array, *, out: Array | None = None) -> Array:
    """dx: each dy added, in row-major order, where `indices` says."""
    dx = _x_like(problem, out, dy)
    dx[...] = 0
    _scatter(problem, dx, dy, indices, adds=True)
    return dx


def max_pool_input_grad(problem: PoolProblem, x: Array, y: Array, dy: Array, *, out: Array | None = None) -> Array:
    """dx of `max_pool`, from positions that are computed again; y is not read."""
    _, positions = max_pool(problem, x)
    return max_pool_grad(problem, dy, positions, out=empty(problem.x_shape, problem.dtype, problem.order, like=x)
                         if out is None else out)


def avg_pool_grad(problem: PoolProblem, dy: Array, divisor: int | None = None, *, out: Array | None = None) -> Array:
    """dx: each dy over its extent, or over `divisor`, added to every input of its window."""
    dx = _x_like(problem, out, dy)
    _run("SUM_POOL_GRAD", "sum_pool_grad", problem, dx, dy, None, None, (dx, dy, None, None, _tables(problem)),
         _sum_arguments(problem, divisor), _kind(None))
    return dx


def lp_pool_grad(problem: PoolProblem, x: Array, y: Array, dy: Array, p: float, *, out: Array | None = None) -> Array:
    """dx of `lp_pool`, zero where y is zero."""
    dx = _x_like(problem, out, x)
    _run("SUM_POOL_GRAD", "sum_pool_grad", problem, dx, dy, x, y, (dx, dy, x, y, _tables(problem)),
         _sum_arguments(problem, p=p), _kind(p))
    return dx


def max_unpool(problem: PoolProblem, x: Array, indices: Array, *, out: Array | None = None) -> Array:
    """y: zeros, with each x written where `indices` says; of equal indices the last counts."""
    y = _x_like(problem, out, x)
    y[...] = 0
    _scatter(problem, y, x, indices, adds=False)
    return y


def max_unpool_grad(problem: PoolProblem, dy: Array, indices: Array, *, out: Array | None = None) -> Array:
    """dx: what lies in dy where `indices` says."""
    dx = _y_like(problem, out, dy)
    _run("GATHER", "gather", problem, dy, dx, None, indices, (dy, dx, indices))
    return dx


def _x_like(problem: PoolProblem, out: Array | None, like: Array) -> Array:
    return empty(problem.x_shape, problem.dtype, problem.order, like=like) if out is None else out


def _y_like(problem: PoolProblem, out: Array | None, like: Array) -> Array:
    return empty(problem.y_shape, problem.dtype, problem.order, like=like) if out is None else out


def _sum_arguments(problem: PoolProblem, divisor: int | None = None, p: float | None = None) -> tuple[Any, ...]:
    """What kernels of sums take last: the power, the divisor (0: the extents), the size of the full window."""
    real = np.float64 if problem.dtype == "float64" else np.float32
    return real(1 if p is None else p), real(divisor or 0), real(math.prod(problem.kernel))


def _kind(p: float | None) -> int:
    """KIND of pool.cu."""
    return -1 if p is None else int(p) if p in (1, 2) else 0


def _strides(x: Array | None) -> tuple[int, ...]:
    return _NO_STRIDES if x is None else five(tuple(s // x.itemsize for s in x.strides))


@lru_cache(1024)
def _structure(problem: PoolProblem, *strides: tuple[int, ...]) -> Any:
    s = np.zeros((), POOL)
    s["x_strides"], s["y_strides"], s["x2_strides"], s["y2_strides"] = strides
    s["in_size"], s["out_size"], s["batch"], s["channels"] = (
        problem.in_size, problem.out_size, problem.batch, problem.channels)
    return s


@cached
def _tables(problem: PoolProblem) -> Array:
    """The window tables of pool.cu, on the GPU."""
    parts = []
    for windows, n in zip(problem.windows, problem.in_size, strict=True):
        # Outputs before `low` end before position i, those from `high` on start behind it. Windows whose first taps lie
        # in the padding need not start in order.
        ends = np.maximum.accumulate(windows.first + (windows.count - 1) * windows.step)
        starts = np.minimum.accumulate(windows.first[::-1])[::-1]
        i = np.arange(n)
        parts += [windows.table.ravel(), np.searchsorted(ends, i), np.searchsorted(starts, i, "right")]
    return provider().upload(np.concatenate(parts).astype(np.int32))


def _run(define: str, name: str, problem: PoolProblem, x: Array, y: Array, x2: Array | None, y2: Array | None,
         arrays: tuple[Any, ...], rest: tuple[Any, ...] = (), kind: int | None = None) -> None:
    """Launch a kernel with a thread, or a warp, for each element of the result."""
    over_inputs = define == "SUM_POOL_GRAD"
    elements = problem.batch * problem.channels * math.prod(problem.in_size if over_inputs else problem.out_size)
    if elements == 0:
        return
    channels_fast = problem.channels > 1 and abs(x.strides[1]) < abs(x.strides[-1])
    large = define in ("MAX_POOL", "SUM_POOL") and math.prod(problem.kernel) >= LARGE_WINDOW and not channels_fast
    lanes = 32 if large else 1
    kernel = Kernel("pool.cu", name, (
        ("FC_DTYPE", DTYPES[problem.dtype][0]), (define, 1), ("CHANNELS_FAST", int(channels_fast)), ("LANES", lanes),
        ("INDEX", "int" if elements * lanes < MOST_INT else "int64"), *(() if kind is None else (("KIND", kind),))))
    s = _structure(problem, _strides(x), _strides(y), _strides(x2), _strides(y2))
    provider().launch(kernel, (ceil_div(elements * lanes, 256),), (256,), (*arrays, s, *rest))


def _scatter(problem: PoolProblem, dx: Array, dy: Array, indices: Array, *, adds: bool) -> None:
    planes = problem.batch * problem.channels
    if planes == 0 or math.prod(problem.out_size) == 0:
        return
    kernel = Kernel("pool.cu", "scatter", (
        ("FC_DTYPE", DTYPES[problem.dtype][0]), ("SCATTER", 1), ("CHANNELS_FAST", 0), ("LANES", 1), ("INDEX", "int64"),
        ("ADDS", int(adds))))
    s = _structure(problem, _strides(dx), _strides(dy), _NO_STRIDES, _strides(indices))
    provider().launch(kernel, (ceil_div(planes, 4),), (128,), (dx, dy, indices, s))
