"""The compiled backend's pools: the functions of `reference`, run by csrc/pool.c.

Sums of the average and Lp pools are made of partial sums, so that for windows of kD x kH x kW elements their error is
at most (128 + kH * ceil(kW / 128) + kD) * eps * sum |x| (eps of the dtype, in which they are accumulated), and have the
same bits for any number of threads and in any batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastconv.arrays import Array, empty
from fastconv.backends import _cpu
from fastconv.config import settings
from fastconv.problem import PoolProblem

_INDEX_OUT_OF_RANGE, _WINDOW_TOO_LARGE, _WINDOWS_OVERLAP = 1, 2, 3


class Taps(NamedTuple):
    """Which tap of its window each output of a max pool took, in an order of the backend's own."""

    problem: PoolProblem
    layout: tuple[int, int]
    array: Array


class PoolRun:
    """A forward pool, planned when it first runs, to be run many times on arrays of the same layouts.

    Parameters
    ----------
    op
        "max_pool" or "sum_pool", the rows of csrc/pool.h.
    indices
        Whether the positions of maxima are wanted.
    options
        power, volume and divisor of a sum.
    """

    __slots__ = ("_dtype", "_indices", "_op", "_options", "_plan", "problem")

    def __init__(self, problem: PoolProblem, op: str, *, indices: bool = False, **options: float) -> None:
        self.problem = problem
        self._dtype = np.dtype(problem.dtype)
        self._op, self._indices, self._options = op, indices, options
        self._plan: _cpu.PoolPlan | None = None

    def __call__(self, x: Array, out: Array | None = None) -> tuple[Array, Array | None]:
        """y, in `out` if given, and the positions of the maxima or None."""
        problem = self.problem
        y = empty(problem.y_shape, self._dtype, problem.order) if out is None else out
        positions = empty(problem.y_shape, np.int64, problem.order) if self._indices else None
        plan = self._plan
        if plan is None:
            plan = self._plan = _plan(self._op, problem, x, y, positions, None, None, **self._options)
        _check(plan.run(x, y, positions), self._op, problem, positions)
        return y, positions


def max_pool_run(problem: PoolProblem, indices: bool = True) -> PoolRun:
    """What `max_pool` runs."""
    return PoolRun(problem, "max_pool", indices=indices)


def avg_pool_run(problem: PoolProblem, divisor: int | None = None) -> PoolRun:
    """What `avg_pool` runs."""
    return PoolRun(problem, "sum_pool", divisor=divisor or 0)


def lp_pool_run(problem: PoolProblem, p: float) -> PoolRun:
    """What `lp_pool` runs."""
    return PoolRun(problem, "sum_pool", power=p, volume=math.prod(problem.kernel))


def max_pool(problem: PoolProblem, x: Array, indices: bool = True, *,
             out: Array | None = None) -> tuple[Array, Array | None]:
    """(y, positions): the maximum of each window and, with `indices`, its flat position in the unpadded plane."""
    return max_pool_run(problem, indices)(x, out)


def avg_pool(problem: PoolProblem, x: Array, divisor: int | None = None, *, out: Array | None = None) -> Array:
    """y: the sum of each window over its extent, or over `divisor`."""
    return avg_pool_run(problem, divisor)(x, out)[0]


def lp_pool(problem: PoolProblem, x: Array, p: float, *, out: Array | None = None) -> Array:
    """y: the p-norm of each window, without absolute values."""
    return lp_pool_run(problem, p)(x, out)[0]


def max_pool_grad(problem: PoolProblem, dy: Array, indices: Array, *, out: Array | None = None) -> Array:
    """dx: each dy added, in row-major order, where `indices` says."""
    dx = _x_like(problem, out)
    _run("max_pool_grad", problem, dx, dy, indices)
    return dx


def max_pool_input_grad(problem: PoolProblem, x: Array, y: Array, dy: Array, *, out: Array | None = None) -> Array:
    """dx of `max_pool`: each dy added to the input that is the maximum, found again in x.

    It is found by its value y where windows have no input in common.
    """
    dx = _x_like(problem, out)
    plan = _plan("max_pool_input_grad", problem, dx, dy, None, x, y)
    if plan.status != _WINDOWS_OVERLAP:
        _check(plan.run(dx, dy, None, x, y), "max_pool_input_grad", problem, None)
        return dx
    taps = max_pool_taps(problem, x)[1]
    if taps is not None:
        return max_pool_taps_grad(taps, dy, out=dx)
    positions = max_pool(problem, x)[1]
    assert positions is not None
    return max_pool_grad(problem, dy, positions, out=dx)


def max_pool_taps(problem: PoolProblem, x: Array, *, out: Array | None = None) -> tuple[Array, Taps | None]:
    """(y, taps) of `max_pool`; None where windows have more than 256 taps, or there are few planes."""
    y = _y_like(problem, out)
    plan = _plan("max_pool", problem, x, y, None, taps=True)
    array = empty((plan.taps_bytes,), np.uint8) if plan.taps_bytes else None
    _check(plan.run(x, y, taps=array), "max_pool", problem, None)
    return y, None if array is None else Taps(problem, plan.taps_layout, array)


def max_pool_taps_grad(taps: Taps, dy: Array, *, out: Array | None = None) -> Array:
    """dx of `max_pool_taps`: each dy added, in row-major order, to the input that was the maximum."""
    dx = _x_like(taps.problem, out)
    plan = _plan("max_pool_taps_grad", taps.problem, dx, dy, None, taps=taps.layout)
    _check(plan.run(dx, dy, taps=taps.array), "max_pool_taps_grad", taps.problem, None)
    return dx


def avg_pool_grad(problem: PoolProblem, dy: Array, divisor: int | None = None, *, out: Array | None = None) -> Array:
    """dx: each dy over its extent, or over `divisor`, added to every input of its window."""
    dx = _x_like(problem, out)
    _run("sum_pool_grad", problem, dx, dy, divisor=divisor or 0)
    return dx


def lp_pool_grad(problem: PoolProblem, x: Array, y: Array, dy: Array, p: float, *, out: Array | None = None) -> Array:
    """dx of `lp_pool`, zero where y is zero."""
    dx = _x_like(problem, out)
    _run("sum_pool_grad", problem, dx, dy, x=x, y=y, power=p, volume=math.prod(problem.kernel))
    return dx


def max_unpool(problem: PoolProblem, x: Array, indices: Array, *, out: Array | None = None) -> Array:
    """y: zeros, with each x written where `indices` says; of equal indices the last counts."""
    y = _x_like(problem, out)
    _run("max_unpool", problem, y, x, indices)
    return y


def max_unpool_grad(problem: PoolProblem, dy: Array, indices: Array, *, out: Array | None = None) -> Array:
    """dx: what lies in dy where `indices` says."""
    dx = _y_like(problem, out)
    _run("max_unpool_grad", problem, dy, dx, indices)
    return dx


def _x_like(problem: PoolProblem, out: Array | None) -> Array:
    return empty(problem.x_shape, problem.dtype, problem.order) if out is None else out


def _y_like(problem: PoolProblem, out: Array | None) -> Array:
    return empty(problem.y_shape, problem.dtype, problem.order) if out is None else out


def _run(op: str, problem: PoolProblem, wide: Array, narrow: Array, indices: Array | None = None, *,
         x: Array | None = None, y: Array | None = None, **options: float) -> None:
    plan = _plan(op, problem, wide, narrow, indices, x, y, **options)
    _check(plan.run(wide, narrow, indices, x, y), op, problem, indices)


def _plan(op: str, problem: PoolProblem, wide: Array, narrow: Array, indices: Array | None, x: Array | None = None,
          y: Array | None = None, **options: Any) -> _cpu.PoolPlan:
    current = settings()
    return _cpu.PoolPlan(op, problem, current.isa, current.threads, wide, narrow, indices, x, y,
                         batch_invariant=current.batch_invariant, **options)


def _check(status: int, op: str, problem: PoolProblem, indices: Array | None) -> None:
    if status == _INDEX_OUT_OF_RANGE:
        assert indices is not None
        plane = math.prod(problem.in_size)
        n, c, *at = np.argwhere((indices < 0) | (indices >= plane))[0].tolist()
        size = problem.in_size[3 - problem.ndim :]
        raise ValueError(
            f"{op}: indices[{n}, {c}, {', '.join(map(str, at))}] is {indices[n, c, *at]}, but positions "
            f"in a plane of size {size} run from 0 to {' * '.join(map(str, size))} - 1 = {plane - 1}. "
            "Hint: pass the indices and the input size of the max pool"
        )
    if status == _WINDOW_TOO_LARGE:
        raise ValueError(
            f"{op}: the windows, {problem.kernel[3 - problem.ndim :]} of an input of size "
            f"{problem.in_size[3 - problem.ndim :]}, span more than 2**31 positions. "
            "Hint: pool in two steps"
        )
