"""The compiled passes of training: normalisation, elementwise operations, steps of optimisers (csrc/passes.h).

Arrays of other strides than dense ones are brought into the order of the first argument, which outputs have.
Sums over the batch are made of float32 sums over 64 elements, added in float64 in an order that depends on shape and
strides alone.
"""

from __future__ import annotations

import numpy as np

from fastconv.arrays import Array, empty, empty_like, memory_order
from fastconv.backends import _cpu
from fastconv.config import settings

__all__ = ["add", "batch_moments", "batch_norm", "batch_norm_grad", "channel_sums", "relu", "relu_grad", "same_run"]


def same_run(*arrays: Array) -> bool:
    """Whether all arrays are dense and lay the same elements side by side, so that they are one run each."""
    first = arrays[0]
    strides = first.strides
    if any(a.shape != first.shape or a.strides != strides for a in arrays[1:]):
        return False
    span = first.itemsize
    for step, size in sorted(zip(strides, first.shape, strict=True)):
        if size == 1:
            continue
        if step != span:
            return False
        span *= size
    return True


def _dense(x: Array) -> Array:
    """A copy in the order that `x` has."""
    copy = empty(x.shape, x.dtype, memory_order(x)) if x.ndim > 2 else np.empty(x.shape, x.dtype)
    copy[...] = x
    return copy


def _values(array: Array | None, dtype: np.dtype) -> Array | None:
    return None if array is None else np.ascontiguousarray(array, dtype)


def batch_moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, float64; x is not empty."""
    mean, var = np.empty(x.shape[1]), np.empty(x.shape[1])
    current = settings()
    if not _cpu.batch_norm(x, None, None, None, mean, var, 1.0, True, False, current.isa, current.threads):
        return batch_moments(_dense(x))
    return mean, var


def batch_norm(x: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
               training: bool = False, relu: bool = False) -> Array:
    """y; `training` writes mean and var, contiguous float64 arrays, first."""
    y = empty_like(x)
    current = settings()
    if not _cpu.batch_norm(x, y, _values(weight, x.dtype), _values(bias, x.dtype), mean, var, eps, training, relu,
                           current.isa, current.threads):
        return batch_norm(_dense(x), mean, var, weight, bias, eps, training, relu)
    return y


def batch_norm_grad(x: Array, dy: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
                    training: bool, relu: bool = False) -> tuple[Array, Array, Array]:
    """dx, dw and db."""
    dx = empty_like(x)
    dw, db = np.empty(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
    current = settings()
    for gradient in (dy, None):
        if gradient is None:  # the strides of x and dy do not go together
            gradient = empty_like(dx)
            gradient[...] = dy
        if _cpu.batch_norm_grad(x, gradient, dx, _values(weight, x.dtype), _values(bias, x.dtype), mean, var, eps,
                                training, relu, dw, db, current.isa, current.threads):
            return dx, dw, db
    return batch_norm_grad(_dense(x), dy, mean, var, weight, bias, eps, training, relu)


def channel_sums(dy: Array) -> Array:
    """Sums over all axes but axis 1, in the dtype of dy."""
    out = np.empty(dy.shape[1], dy.dtype)
    current = settings()
    if not _cpu.channel_sums(dy, out, current.isa, current.threads):
        return channel_sums(_dense(dy))
    return out


def relu(x: Array) -> Array:
    """max(x, 0)."""
    y = empty_like(x)
    if not same_run(x, y):
        return np.maximum(x, 0, out=y)
    current = settings()
    _cpu.relu_pass(x, y, current.isa, current.threads)
    return y


def relu_grad(dy: Array, y: Array) -> Array:
    """dy, but 0 where y <= 0."""
    dx = empty_like(y)
    if not same_run(y, dx):
        y = dx = _dense(y)
    if not same_run(y, dy):
        dy, given = empty_like(y), dy
        dy[...] = given
    current = settings()
    _cpu.relu_grad_pass(dy, y, dx, current.isa, current.threads)
    return dx


def add(a: Array, b: Array, relu: bool = False) -> Array:
    """a + b of one shape and dtype, with `relu` max(., 0) of it."""
    y = empty_like(a)
    if not same_run(a, b, y):
        np.add(a, b, out=y)
        return np.maximum(y, 0, out=y) if relu else y
    current = settings()
    _cpu.add_pass(a, b, y, relu, current.isa, current.threads)
    return y
