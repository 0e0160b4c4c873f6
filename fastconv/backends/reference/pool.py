"""Pooling and unpooling and their gradients, as NumPy formulas."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastconv.arrays import Array
from fastconv.backends.reference._arrays import quiet, rank5, write_result
from fastconv.problem.pool import PoolProblem


@quiet
def max_pool(problem: PoolProblem, x: Array, indices: bool = True, *,
             out: Array | None = None) -> tuple[Array, Array | None]:
    """Return the maximum of every window, and where it was found.

    Padding is not part of a window. Of equal maxima the first in row-major order counts. NaN is
    greater than everything, and of several NaNs the last counts, as in PyTorch.

    Parameters
    ----------
    problem
        Sizes and window tables.
    x : (N, C, *in_size)
    indices
        Whether positions are wanted.
    out : (N, C, *out_size), optional
        The maxima are written to it if given.

    Returns
    -------
    y : (N, C, *out_size), of x's dtype and memory order
    positions : (N, C, *out_size), int64, of x's memory order; None without `indices`
        Flat row-major positions in the plane or volume `in_size`, without padding.
    """
    x5 = rank5(x)
    shape = (*x5.shape[:2], *problem.out_size)
    y = np.full(shape, -np.inf, x.dtype)
    positions = np.full(shape, -1)
    for position, inside in _window_taps(problem):
        value = x5[position]
        better = inside & ((value > y) | np.isnan(value) | (positions < 0))
        y = np.where(better, value, y)
        positions = np.where(better, _flat(problem, position), positions)
    y = write_result(y, like=x, out=out)
    return y, write_result(positions, like=x, dtype=np.int64) if indices else None


@quiet
def max_pool_grad(
    problem: PoolProblem, dy: Array, indices: Array, *, out: Array | None = None
) -> Array:
    """Return the gradient of `max_pool`: each dy is added where its maximum was found.

    ``dx[n, c, i] = sum of dy[n, c, o] over the outputs o with indices[n, c, o] == i``

    Parameters
    ----------
    problem
        The problem of the forward pass.
    dy : (N, C, *out_size)
    indices : (N, C, *out_size), int64
    out : (N, C, *in_size), optional

    Returns
    -------
    dx : (N, C, *in_size), of dy's dtype and memory order
    """
    dx = np.zeros((*dy.shape[:2], math.prod(problem.in_size)))
    np.add.at(dx, _at(indices), rank5(dy))
    return write_result(dx.reshape(*dy.shape[:2], *problem.in_size), like=dy, out=out)


def max_pool_input_grad(
    problem: PoolProblem, x: Array, y: Array, dy: Array, *, out: Array | None = None
) -> Array:
    """Return the gradient of `max_pool` from its input and output instead of its positions.

    Parameters
    ----------
    problem
        The problem of the forward pass.
    x : (N, C, *in_size)
    y, dy : (N, C, *out_size)
        y is what the pool returned; its values are not needed here.
    out : (N, C, *in_size), optional

    Returns
    -------
    dx : (N, C, *in_size), of dy's dtype and memory order
    """
    _, positions = max_pool(problem, x)
    assert positions is not None
    return max_pool_grad(problem, dy, positions, out=out)


@quiet
def avg_pool(
    problem: PoolProblem, x: Array, divisor: int | None = None, *, out: Array | None = None
) -> Array:
    """Return the sum of every window over its divisor.

    ``y[n, c, o] = sum over the window of o of x[n, c, i] / (divisor or extent[o])``

    where extent[o], the product of the three per-axis extents, says how many elements the window
    is held to have: with or without those of the padding, as `problem` was built.

    Parameters
    ----------
    problem
        Sizes and window tables.
    x : (N, C, *in_size)
    divisor
        Takes the place of every extent if given.
    out : (N, C, *out_size), optional

    Returns
    -------
    y : (N, C, *out_size), of x's dtype and memory order
    """
    return write_result(
        _window_sum(problem, rank5(x)) / (divisor or _extent(problem)), like=x, out=out
    )


@quiet
def avg_pool_grad(
    problem: PoolProblem, dy: Array, divisor: int | None = None, *, out: Array | None = None
) -> Array:
    """Return the gradient of `avg_pool`.

    ``dx[n, c, i] = sum of dy[n, c, o] / (divisor or extent[o]) over the windows o that hold i``

    Parameters
    ----------
    problem
        The problem of the forward pass.
    dy : (N, C, *out_size)
    divisor
        As in the forward pass.
    out : (N, C, *in_size), optional

    Returns
    -------
    dx : (N, C, *in_size), of dy's dtype and memory order
    """
    dx = _window_sum_grad(problem, rank5(dy) / (divisor or _extent(problem)))
    return write_result(dx, like=dy, out=out)


def _window_sum(problem: PoolProblem, x: Array) -> Array:
    """Return, in float64, the sum of x over every window."""
    total = np.zeros((*x.shape[:2], *problem.out_size))
    for position, inside in _window_taps(problem):
        total += np.where(inside, x[position], 0)
    return total


def _window_sum_grad(problem: PoolProblem, dy: Array) -> Array:
    """Return, in float64, the sum for every input position of dy over the windows that hold it."""
    dx = np.zeros((*dy.shape[:2], *problem.in_size))
    for position, inside in _window_taps(problem):
        # add.at, since adaptive windows may share an input position at the same tap.
        np.add.at(dx, position, np.where(inside, dy, 0))
    return dx


@quiet
def lp_pool(problem: PoolProblem, x: Array, p: float, *, out: Array | None = None) -> Array:
    """Return the p-norm of every window, without absolute values, as PyTorch defines it.

    ``y[n, c, o] = u ** (1 / p),  u = scale[o] * sum over the window of o of x[n, c, i] ** p``

    where scale[o] = prod(kernel) / extent[o] is 1 except for windows that stick out of the input
    (ceil_mode), which are scaled up to the size of a whole one. For odd p a negative sum has no
    root, and for fractional p a negative x has no power: both give NaN, except p = 1, where y = u.

    Parameters
    ----------
    problem
        Sizes and window tables.
    x : (N, C, *in_size)
    p
        Exponent, finite and not zero.
    out : (N, C, *out_size), optional

    Returns
    -------
    y : (N, C, *out_size), of x's dtype and memory order

    References
    ----------
    Sermanet, Chintala and LeCun, "Convolutional neural networks applied to house numbers digit
    classification", ICPR 2012, https://arxiv.org/abs/1204.3968, section 2.2.
    """
    u = _window_sum(problem, rank5(x).astype(np.float64) ** p) * _lp_scale(problem)
    return write_result(u ** (1 / p), like=x, out=out)


@quiet
def lp_pool_grad(
    problem: PoolProblem, x: Array, y: Array, dy: Array, p: float, *, out: Array | None = None
) -> Array:
    """Return the gradient of `lp_pool`, which is zero where y is zero.

    ``dx[n, c, i] = sum of scale[o] * dy[n, c, o] * y[n, c, o] ** (1 - p) * x[n, c, i] ** (p - 1)
    over the windows o that hold i``

    since du / dx = scale * p * x ** (p - 1) and dy / du = u ** (1 / p - 1) / p = y ** (1 - p) / p.

    Parameters
    ----------
    problem
        The problem of the forward pass.
    x : (N, C, *in_size)
    y, dy : (N, C, *out_size)
    p
        As in the forward pass.
    out : (N, C, *in_size), optional

    Returns
    -------
    dx : (N, C, *in_size), of dy's dtype and memory order
    """
    x, y, dy5 = (rank5(array).astype(np.float64) for array in (x, y, dy))
    per_window = np.where(y == 0, 0, dy5 * y ** (1 - p)) * _lp_scale(problem)
    return write_result(_window_sum_grad(problem, per_window) * x ** (p - 1), like=dy, out=out)


@quiet
def max_unpool(
    problem: PoolProblem, x: Array, indices: Array, *, out: Array | None = None
) -> Array:
    """Return zeros with every x written where its index says; of equal indices the last counts.

    ``y[n, c, indices[n, c, o]] = x[n, c, o]``

    Parameters
    ----------
    problem
        Its in_size is the unpooled size, and its out_size that of x.
    x : (N, C, *out_size)
    indices : (N, C, *out_size), int64
        Flat row-major positions in `in_size`, as `max_pool` returns them.
    out : (N, C, *in_size), optional

    Returns
    -------
    y : (N, C, *in_size), of x's dtype and memory order

    References
    ----------
    Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014,
    https://arxiv.org/abs/1311.2901, section 2.1.
    """
    y = np.zeros((*x.shape[:2], math.prod(problem.in_size)), x.dtype)
    y[_at(indices)] = rank5(x)
    return write_result(y.reshape(*x.shape[:2], *problem.in_size), like=x, out=out)


@quiet
def max_unpool_grad(
    problem: PoolProblem, dy: Array, indices: Array, *, out: Array | None = None
) -> Array:
    """Return the gradient of `max_unpool`: every x receives what lies where it was written.

    ``dx[n, c, o] = dy[n, c, indices[n, c, o]]``

    Parameters
    ----------
    problem
        The problem of the forward pass.
    dy : (N, C, *in_size)
    indices : (N, C, *out_size), int64
    out : (N, C, *out_size), optional

    Returns
    -------
    dx : (N, C, *out_size), of dy's dtype and memory order
    """
    flat = dy.reshape(*dy.shape[:2], math.prod(problem.in_size))
    return write_result(flat[_at(indices)], like=dy, out=out)


def _window_taps(problem: PoolProblem) -> Iterator[tuple[tuple[Any, ...], Array]]:
    """Yield for every tap, row-major, the input position it has in each window, and if it has one.

    A position is an index, (..., depth, height, width), whose arrays broadcast to out_size; where a
    window has fewer taps than the largest, it points at position 0 and `inside` is False.
    """
    taps = [np.max(axis.count, initial=0) for axis in problem.windows]
    for tap in np.ndindex(*taps):
        inside = [t < axis.count for t, axis in zip(tap, problem.windows, strict=True)]
        position = [
            np.where(ok, axis.first + t * axis.step, 0)
            for ok, t, axis in zip(inside, tap, problem.windows, strict=True)
        ]
        deep, high, wide = _mesh(inside)
        yield (..., *_mesh(position)), deep & high & wide


def _mesh(per_axis: list[Array]) -> tuple[Array, Array, Array]:
    """View one array per axis so that the three broadcast to (D, H, W)."""
    depth, height, width = per_axis
    return depth[:, None, None], height[:, None], width


def _extent(problem: PoolProblem) -> Array:
    """Return the divisor of every window's average, an array that broadcasts to out_size."""
    depth, height, width = _mesh([axis.extent for axis in problem.windows])
    return depth * height * width


def _lp_scale(problem: PoolProblem) -> Array:
    """Return the factor by which a clipped window's sum of powers is scaled up."""
    return math.prod(problem.kernel) / _extent(problem)


def _flat(problem: PoolProblem, position: tuple[Any, ...]) -> Array:
    """Return flat row-major positions in in_size."""
    _, depth, height, width = position
    flat: Array = (depth * problem.in_size[1] + height) * problem.in_size[2] + width
    return flat


def _at(indices: Array) -> tuple[Array, Array, Array]:
    """Return the index of an (N, C, plane) array that means [n, c, indices[n, c, ...]]."""
    sample, channel, *_ = np.ogrid[: indices.shape[0], : indices.shape[1], :1, :1, :1]
    return sample, channel, rank5(indices)
