"""Pools on the GPU: the functions of `reference`, run by pool.cu.

An index that points outside of its plane is skipped, or reads zero: to raise, the host would have to wait for the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastconv.backends.cuda.device import Kernel, cached, provider
from fastconv.backends.cuda.launches import DTYPES, byte_strides
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
    y = _y_like(problem, out)
    positions = _new(problem, problem.y_shape, np.int64) if indices else None
    _run("max_pool", problem, (x, y, None, positions), (x, y, positions, _tables(problem)))
    return y, positions


def avg_pool(problem: PoolProblem, x: Array, divisor: int | None = None, *, out: Array | None = None) -> Array:
    """y: the sum of each window over its extent, or over `divisor`."""
    y = _y_like(problem, out)
    _run("sum_pool", problem, (x, y), (x, y, _tables(problem)), (None, divisor or 0))
    return y


def lp_pool(problem: PoolProblem, x: Array, p: float, *, out: Array | None = None) -> Array:
    """y: the p-norm of each window, without absolute values."""
    y = _y_like(problem, out)
    _run("sum_pool", problem, (x, y), (x, y, _tables(problem)), (p, 0))
    return y


def max_pool_grad(problem: PoolProblem, dy: Array, indices: Array, *, out: Array | None = None) -> Array:
    """dx: each dy added, in row-major order, where `indices` says."""
    dx = _x_like(problem, out)
    dx.fill(0)
    _run("scatter", problem, (dx, dy, None, indices), (dx, dy, indices), ("ADDS", 1))
    return dx


def max_pool_input_grad(problem: PoolProblem, x: Array, y: Array, dy: Array, *, out: Array | None = None) -> Array:
    """dx of `max_pool`, from positions that are computed again; y is not read."""
    _, positions = max_pool(problem, x)
    return max_pool_grad(problem, dy, positions, out=out)


def avg_pool_grad(problem: PoolProblem, dy: Array, divisor: int | None = None, *, out: Array | None = None) -> Array:
    """dx: each dy over its extent, or over `divisor`, added to every input of its window."""
    dx = _x_like(problem, out)
    _run("sum_pool_grad", problem, (dx, dy), (dx, dy, None, None, _tables(problem)), (None, divisor or 0))
    return dx


def lp_pool_grad(problem: PoolProblem, x: Array, y: Array, dy: Array, p: float, *, out: Array | None = None) -> Array:
    """dx of `lp_pool`, zero where y is zero."""
    dx = _x_like(problem, out)
    _run("sum_pool_grad", problem, (dx, dy, x, y), (dx, dy, x, y, _tables(problem)), (p, 0))
    return dx


def max_unpool(problem: PoolProblem, x: Array, indices: Array, *, out: Array | None = None) -> Array:
    """y: zeros, with each x written where `indices` says; of equal indices the last counts."""
    y = _x_like(problem, out)
    y.fill(0)
    _run("scatter", problem, (y, x, None, indices), (y, x, indices), ("ADDS", 0))
    return y


def max_unpool_grad(problem: PoolProblem, dy: Array, indices: Array, *, out: Array | None = None) -> Array:
    """dx: what lies in dy where `indices` says."""
    dx = _y_like(problem, out)
    _run("gather", problem, (dy, dx, None, indices), (dy, dx, indices))
    return dx


def _x_like(problem: PoolProblem, out: Array | None) -> Array:
    return _new(problem, problem.x_shape, problem.dtype) if out is None else out


def _y_like(problem: PoolProblem, out: Array | None) -> Array:
    return _new(problem, problem.y_shape, problem.dtype) if out is None else out


def _new(problem: PoolProblem, shape: tuple[int, ...], dtype: Any) -> Array:
    kind = np.dtype(dtype)
    return provider().empty(shape, kind, byte_strides(shape, problem.order, kind.itemsize))


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


def _run(name: str, problem: PoolProblem, placed: tuple[Array | None, ...], arrays: tuple[Array | None, ...],
         option: tuple[Any, ...] = ()) -> None:
    """Launch a kernel for `arrays`; `placed` are those whose strides the structure holds, in its order."""
    launch = _launch(name, problem, option, *[a if a is None else (a.strides, a.itemsize) for a in placed])
    if launch is not None:
        launch(*arrays)


@cached
def _launch(name: str, problem: PoolProblem, option: tuple[Any, ...],
            *layouts: tuple[tuple[int, ...], int] | None) -> Callable[..., None] | None:
    """Prepare a launch, which takes the arrays; None where there is nothing to compute.

    `option` is that of sums, (power or None for an average, divisor or 0 for the extents), or of the scatter,
    ("ADDS", 0 or 1).
    """
    size = math.prod(problem.in_size if name == "sum_pool_grad" else problem.out_size)
    planes = problem.batch * problem.channels
    if planes * size == 0:
        return None
    strides = [_NO_STRIDES if layout is None else five(tuple(step // layout[1] for step in layout[0]))
               for layout in (*layouts, *[None] * (4 - len(layouts)))]
    channels_fast = problem.channels > 1 and abs(strides[0][1]) < abs(strides[0][4]) and name != "scatter"
    large = name in ("max_pool", "sum_pool") and math.prod(problem.kernel) >= LARGE_WINDOW and not channels_fast
    lanes = 32 if large else 1
    threads = 32 * planes if name == "scatter" else planes * size * lanes
    index = "int" if threads < MOST_INT and name != "scatter" else "int64"
    further: tuple[tuple[str, int], ...] = ()
    args: tuple[Any, ...] = ()
    if name == "scatter":
        further = (option,)
    elif option:
        p, divisor = option
        real = np.float64 if problem.dtype == "float64" else np.float32
        args = real(1 if p is None else p), real(divisor), real(math.prod(problem.kernel))
        further = (("KIND", -1 if p is None else int(p) if p in (1, 2) else 0),)
    kernel = Kernel("pool.cu", name, (
        ("FC_DTYPE", DTYPES[problem.dtype][0]), (name.upper(), 1), ("CHANNELS_FAST", int(channels_fast)),
        ("LANES", lanes), ("INDEX", index), *further))
    s = np.zeros((), POOL)
    s["x_strides"], s["y_strides"], s["x2_strides"], s["y2_strides"] = strides
    s["in_size"], s["out_size"], s["batch"], s["channels"] = (
        problem.in_size, problem.out_size, problem.batch, problem.channels)
    block = 128 if name == "scatter" else 256
    return provider().launcher(kernel, (ceil_div(threads, block),), (block,), (s, *args))
