"""Activations, softmax and dropout: elementwise operations and their gradients.

Every function keeps the shape, the dtype (float32 or float64) and the memory order of its first argument, and
propagates NaN and infinity without warnings. A gradient takes `grad_output` first and then what the formula
needs: the output where that is enough (ReLU, sigmoid, tanh, softmax), else the input.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from fastconv.arrays import Array, as_array, check_same_place
from fastconv.backends import select

# IEEE arithmetic is what these functions promise: exp may underflow, inf - inf is NaN, and neither is an event.
quiet = np.errstate(all="ignore")

_BITS: dict[int, np.dtype[Any]] = {size: np.dtype(f"i{size}") for size in (2, 4, 8)}  # by the bytes of a value


def check_grad(grad_output: object, like: Array, op: str) -> Array:
    """Return `grad_output` as an array after checking that it has the shape and dtype of `like`, the output."""
    dy = as_array(grad_output, "grad_output", op)
    check_same_place(op, ("grad_output", dy), ("the output", like))
    if dy.shape != like.shape:
        raise ValueError(f"{op}: grad_output has shape {dy.shape}, but the output has shape {like.shape}. "
                         "Hint: gradients are never broadcast; np.broadcast_to makes such a view")
    if dy.dtype != like.dtype:
        raise TypeError(f"{op}: grad_output has dtype {dy.dtype}, but the output has dtype {like.dtype}. "
                        f"Hint: grad_output.astype(np.{like.dtype})")
    return dy


def check_axis(dim: int, ndim: int, op: str) -> int:
    """Return the axis `dim` of an array of `ndim` axes, counted from the front."""
    axis = operator.index(dim)
    if not -ndim <= axis < ndim:
        raise ValueError(f"{op}: dim is {dim}, but the input has {ndim} axes: {-ndim} <= dim < {ndim} is needed. "
                         "Hint: the channels are dim=1")
    return axis % ndim


def zero_where(drop: Array, values: Array, out: Array) -> Array:
    """Write `values`, but zero where `drop` is true, to `out`.

    An AND of the bits: a product with the mask would make NaN of 0 * inf, and masked copies are ten times slower
    (the processor guesses every element's branch).
    """
    bits = _BITS[values.itemsize]
    mask = np.subtract(drop, 1, dtype=bits)  # False: all ones, True: all zeros
    np.bitwise_and(values.view(bits), mask, out=out.view(bits))
    return out


@quiet
def relu(input: Array) -> Array:
    """Rectified linear unit, ``max(x, 0)`` (Nair and Hinton 2010).

    Parameters
    ----------
    input : ndarray
        Any shape.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order; NaN stays NaN.
    """
    x = as_array(input, "input", "relu")
    return select.training("relu", ("input", x)).relu(x)


@quiet
def relu_grad(grad_output: Array, output: Array) -> Array:
    """Gradient of `relu`: `grad_output` where ``output > 0``, else zero (also at 0, as in PyTorch)."""
    y = as_array(output, "output", "relu_grad")
    # A NaN output lets the gradient pass, as in PyTorch.
    dy = check_grad(grad_output, y, "relu_grad")
    return select.training("relu_grad", ("output", y)).relu_grad(dy, y)


@quiet
def leaky_relu(input: Array, negative_slope: float = 0.01) -> Array:
    """Leaky ReLU, ``x if x > 0 else negative_slope * x`` (Maas, Hannun and Ng 2013).

    Parameters
    ----------
    input : ndarray
        Any shape.
    negative_slope : float
        Slope left of zero.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order.
    """
    x = as_array(input, "input", "leaky_relu")
    y = np.minimum(x, 0, out=np.empty_like(x))
    y *= negative_slope
    y += np.maximum(x, 0)
    return y


@quiet
def leaky_relu_grad(grad_output: Array, input: Array, negative_slope: float = 0.01) -> Array:
    """Gradient of `leaky_relu`: `grad_output` where ``input > 0``, else ``negative_slope * grad_output``."""
    x = as_array(input, "input", "leaky_relu_grad")
    dy = check_grad(grad_output, x, "leaky_relu_grad")
    positive = x > 0
    dx = zero_where(positive, dy, np.empty_like(x))
    dx *= negative_slope
    dx += zero_where(~positive, dy, np.empty_like(x))
    return dx


@quiet
def sigmoid(input: Array) -> Array:
    """Logistic function, ``1 / (1 + exp(-x))``, accurate to rounding on both sides.

    Parameters
    ----------
    input : ndarray
        Any shape.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order.
    """
    x = as_array(input, "input", "sigmoid")
    # 1 / (1 + exp(-x)) right of zero, exp(x) / (1 + exp(x)) left of it: nothing overflows.
    y = np.minimum(x, 0, out=np.empty_like(x))
    np.exp(y, out=y)
    denominator = np.abs(x, out=np.empty_like(x))
    np.negative(denominator, out=denominator)
    np.exp(denominator, out=denominator)
    denominator += 1
    y /= denominator
    return y


@quiet
def sigmoid_grad(grad_output: Array, output: Array) -> Array:
    """Gradient of `sigmoid`: ``dy * y * (1 - y)``."""
    y = as_array(output, "output", "sigmoid_grad")
    dx = np.subtract(1, y, out=np.empty_like(y))
    dx *= y
    dx *= check_grad(grad_output, y, "sigmoid_grad")
    return dx


@quiet
def tanh(input: Array) -> Array:
    """Hyperbolic tangent.

    Parameters
    ----------
    input : ndarray
        Any shape.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order.
    """
    x = as_array(input, "input", "tanh")
    return np.tanh(x, out=np.empty_like(x))


@quiet
def tanh_grad(grad_output: Array, output: Array) -> Array:
    """Gradient of `tanh`: ``dy * (1 - y**2)``."""
    y = as_array(output, "output", "tanh_grad")
    dx = np.multiply(y, y, out=np.empty_like(y))
    np.subtract(1, dx, out=dx)
    dx *= check_grad(grad_output, y, "tanh_grad")
    return dx


@quiet
def softmax(input: Array, dim: int = 1) -> Array:
    """``exp(x) / sum(exp(x))`` along the axis `dim`, shifted by the maximum so that nothing overflows.

    Parameters
    ----------
    input : ndarray
        Any shape with at least one axis.
    dim : int
        The axis along which the outputs add up to one; 1 is that of the channels.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order.

    Raises
    ------
    ValueError
        If the input has no axis `dim`.
    """
    x = as_array(input, "input", "softmax")
    axis = check_axis(dim, x.ndim, "softmax")
    if x.size == 0:
        return np.empty_like(x)
    y: Array = np.subtract(x, x.max(axis, keepdims=True), out=np.empty_like(x))
    np.exp(y, out=y)
    y /= y.sum(axis, keepdims=True)
    return y


@quiet
def softmax_grad(grad_output: Array, output: Array, dim: int = 1) -> Array:
    """Gradient of `softmax`: ``y * (dy - sum(dy * y))``, the sum along `dim`."""
    y = as_array(output, "output", "softmax_grad")
    axis = check_axis(dim, y.ndim, "softmax_grad")
    dy = check_grad(grad_output, y, "softmax_grad")
    dx = np.multiply(y, dy, out=np.empty_like(y))
    np.subtract(dy, dx.sum(axis, keepdims=True), out=dx)
    dx *= y
    return dx


@quiet
def log_softmax(input: Array, dim: int = 1) -> Array:
    """Logarithm of `softmax` without its cancellation: ``x - max - log(sum(exp(x - max)))`` along `dim`.

    Parameters
    ----------
    input : ndarray
        Any shape with at least one axis.
    dim : int
        The axis of the classes.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order.

    Raises
    ------
    ValueError
        If the input has no axis `dim`.
    """
    x = as_array(input, "input", "log_softmax")
    axis = check_axis(dim, x.ndim, "log_softmax")
    if x.size == 0:
        return np.empty_like(x)
    y: Array = np.subtract(x, x.max(axis, keepdims=True), out=np.empty_like(x))
    y -= np.log(np.exp(y).sum(axis, keepdims=True))
    return y


@quiet
def log_softmax_grad(grad_output: Array, output: Array, dim: int = 1) -> Array:
    """Gradient of `log_softmax`: ``dy - exp(y) * sum(dy)``, the sum along `dim`."""
    y = as_array(output, "output", "log_softmax_grad")
    axis = check_axis(dim, y.ndim, "log_softmax_grad")
    dy = check_grad(grad_output, y, "log_softmax_grad")
    dx = np.exp(y)
    dx *= dy.sum(axis, keepdims=True)
    return np.subtract(dy, dx, out=dx)


def dropout_mask(shape: tuple[int, ...], p: float, rng: np.random.Generator) -> Array:
    """Boolean array of `shape` that is False with probability `p`.

    Drawn in logical order, so that the same generator drops the same elements whatever the memory order.

    Raises
    ------
    ValueError
        If `p` is not a probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is {p}, but a probability is needed: 0 <= p <= 1. "
                         "Hint: p is the share of elements that are dropped")
    return rng.random(shape, dtype=np.float32) >= p


@quiet
def dropout(input: Array, p: float, mask: Array) -> Array:
    """Keep the elements where `mask` is true and scale them by ``1 / (1 - p)`` (Srivastava et al. 2014).

    Linear in `input`, hence its own gradient: ``dropout(grad_output, p, mask)``.

    Parameters
    ----------
    input : ndarray
        Any shape.
    p : float
        The probability with which `mask` was drawn.
    mask : ndarray of bool
        Broadcasts to the shape of `input`; see `dropout_mask`. A mask of shape (N, C, 1, ...) drops whole
        channels (Tompson et al. 2015).

    Returns
    -------
    ndarray
        Same shape, dtype and memory order; dropped elements are zero, also where the input is infinite.
    """
    x = as_array(input, "input", "dropout")
    y = np.multiply(x, 1 / (1 - p) if p < 1 else 0.0, out=np.empty_like(x))
    return zero_where(~mask, y, y)
