"""Convolution and its gradients, as NumPy formulas."""

from typing import Any

import numpy as np

from fastconv.arrays import Array
from fastconv.backends.reference._arrays import quiet, rank5, write_result
from fastconv.problem import ConvProblem


@quiet
def conv(
    problem: ConvProblem, x: Array, w: Array, b: Array | None = None, *, out: Array | None = None
) -> Array:
    """Return the convolution (cross-correlation, as in all deep-learning libraries) of x with w.

    ``y[n, g, k, o] = b[g, k] + sum over c, t of w[g, k, c, t] * x[n, g, c, o * s + t * d - p]``

    where x is zero outside its bounds, and those zeros take part in the products.

    Parameters
    ----------
    problem
        Sizes, stride, dilation, padding and groups.
    x : (N, C, *in_size)
    w : (K, C / groups, *kernel)
    b : (K,), optional
    out : (N, K, *out_size), optional
        Written and returned if given.

    Returns
    -------
    y : (N, K, *out_size), of x's dtype and memory order

    References
    ----------
    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016,
    https://arxiv.org/abs/1603.07285, sections 2 and 5.1 (dilation).
    """
    x_padded = _padded_input(problem, x)
    taps_of = _grouped(problem.groups, w, axis=0)
    y = np.zeros((problem.batch, *taps_of.shape[:2], *problem.out_size))
    for tap in np.ndindex(*problem.kernel):
        y += np.einsum("gkc,ngcDHW->ngkDHW", taps_of[(..., *tap)], x_padded[_read_by(problem, tap)])
    if b is not None:
        y += b.reshape(problem.groups, -1, 1, 1, 1)
    return write_result(_ungrouped(y, axis=1), like=x, out=out)


@quiet
def conv_input_grad(
    problem: ConvProblem, dy: Array, w: Array, *, out: Array | None = None
) -> Array:
    """Return the gradient of `conv` by its input; also a transposed convolution's forward pass.

    ``dx[n, g, c, i] = sum over k, t of w[g, k, c, t] * dy[n, g, k, (i + p - t * d) / s]``

    over the taps for which the division leaves no remainder; dy is zero outside its bounds, and
    those zeros take part in the products. With s = 2, d = 1, p = 0 and three taps::

        dx   0  1  2  3  4        even positions hear taps 0 and 2, odd ones tap 1:
        t=0  0  .  1  .  2        (the numbers are positions o in dy; -1 and 2 lie outside
        t=1  .  0  .  1  .         of a dy of two elements and count as zeros)
        t=2 -1  .  0  .  1

    Parameters
    ----------
    problem
        The problem of the forward pass.
    dy : (N, K, *out_size)
    w : (K, C / groups, *kernel)
    out : (N, C, *in_size), optional
        Written and returned if given.

    Returns
    -------
    dx : (N, C, *in_size), of dy's dtype and memory order

    References
    ----------
    Dumoulin and Visin, 2016, https://arxiv.org/abs/1603.07285, section 4.
    """
    axes = range(3)
    s, d, pad = problem.stride, problem.dilation, problem.pad_lo
    # The lowest o that a position asks for is >= -margin_lo, the highest < out_size + margin_hi.
    margin_lo = [(problem.kernel[a] - 1) * d[a] // s[a] for a in axes]
    margin_hi = [(problem.in_size[a] - 1 + pad[a]) // s[a] + 1 for a in axes]
    dy_padded = _zero_padded(_grouped(problem.groups, dy, axis=1), margin_lo, margin_hi)
    taps_of = _grouped(problem.groups, w, axis=0)
    dx = np.zeros((problem.batch, problem.groups, taps_of.shape[2], *problem.in_size))
    for tap in np.ndindex(*problem.kernel):
        # Positions i = first, first + s, first + 2 s, ... ask for o = first_o, first_o + 1, ...
        first = [(tap[a] * d[a] - pad[a]) % s[a] for a in axes]
        first_o = [(first[a] + pad[a] - tap[a] * d[a]) // s[a] + margin_lo[a] for a in axes]
        count = [len(range(first[a], problem.in_size[a], s[a])) for a in axes]
        asking: tuple[Any, ...] = (..., *[slice(first[a], None, s[a]) for a in axes])
        asked_for: tuple[Any, ...] = (
            ...,
            *[slice(first_o[a], first_o[a] + count[a]) for a in axes],
        )
        dx[asking] += np.einsum("gkc,ngkDHW->ngcDHW", taps_of[(..., *tap)], dy_padded[asked_for])
    return write_result(_ungrouped(dx, axis=1), like=dy, out=out)


@quiet
def conv_weight_grad(
    problem: ConvProblem, x: Array, dy: Array, *, out: Array | None = None
) -> Array:
    """Return the gradient of `conv` by its weight.

    ``dw[g, k, c, t] = sum over n, o of dy[n, g, k, o] * x[n, g, c, o * s + t * d - p]``

    where x is zero outside its bounds, and those zeros take part in the products.

    Parameters
    ----------
    problem
        The problem of the forward pass.
    x : (N, C, *in_size)
    dy : (N, K, *out_size)
    out : (K, C / groups, *kernel), optional
        Written and returned if given.

    Returns
    -------
    dw : (K, C / groups, *kernel), of x's dtype and memory order
    """
    x_padded = _padded_input(problem, x)
    dy_grouped = _grouped(problem.groups, dy, axis=1)
    dw = np.zeros((problem.groups, dy_grouped.shape[2], x_padded.shape[2], *problem.kernel))
    for tap in np.ndindex(*problem.kernel):
        dw[(..., *tap)] = np.einsum(
            "ngkDHW,ngcDHW->gkc", dy_grouped, x_padded[_read_by(problem, tap)]
        )
    return write_result(_ungrouped(dw, axis=0), like=x, out=out)


def _padded_input(problem: ConvProblem, x: Array) -> Array:
    """Return x as float64 (N, G, C / G, D, H, W) with the zeros of its padding around it."""
    return _zero_padded(_grouped(problem.groups, x, axis=1), problem.pad_lo, problem.pad_hi)


def _read_by(problem: ConvProblem, tap: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the index of what a tap reads of the padded input, one element for each output."""
    axes = zip(tap, problem.dilation, problem.stride, problem.out_size, strict=True)
    return (..., *[slice(t * d, t * d + (size - 1) * s + 1, s) for t, d, s, size in axes])


def _zero_padded(
    x: Array, lo: list[int] | tuple[int, ...], hi: list[int] | tuple[int, ...]
) -> Array:
    """Return x with lo zeros before and hi zeros after each of its last three axes."""
    return np.pad(x, [(0, 0)] * (x.ndim - 3) + list(zip(lo, hi, strict=True)))


def _grouped(groups: int, x: Array, *, axis: int) -> Array:
    """Return x at rank 5, in float64, with channel axis `axis` split into (groups, channels)."""
    x = rank5(x).astype(np.float64)
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def _ungrouped(x: Array, *, axis: int) -> Array:
    """Merge axes `axis` and `axis` + 1: the inverse of `_grouped`."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
