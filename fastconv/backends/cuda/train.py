"""Passes of training on the GPU: the functions of `cpu_train`, by CuPy's own elementwise operations and sums.

Written in NumPy's names: given CuPy's arrays, they run there.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = Any  # of the provider

__all__ = ["adam_step", "add", "batch_moments", "batch_norm", "batch_norm_grad", "channel_sums", "relu", "relu_grad",
           "sgd_step"]


def _per_channel(values: Array, x: Array) -> Array:
    """Shape (C,) as (C, 1, ..., 1) in the dtype of `x`, ready to broadcast against it."""
    return values.astype(x.dtype, copy=False).reshape(-1, *[1] * (x.ndim - 2))


def _sums(x: Array) -> Array:
    """Sums over all axes but axis 1, in float64."""
    return x.sum((0, *range(2, x.ndim)), dtype=np.float64)


def batch_moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, float64; x is not empty."""
    count = x.shape[0] * math.prod(x.shape[2:])
    mean = _sums(x) / count
    # Two passes: E[x^2] - E[x]^2 cancels where the mean is large against the deviation. The mean is rounded to the
    # dtype of x before it is subtracted; the second term takes that rounding back out.
    centred = x - _per_channel(mean, x)
    var = _sums(centred * centred) / count - (_sums(centred) / count) ** 2
    return mean, np.maximum(var, 0)


def batch_norm(x: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
               training: bool = False, relu: bool = False) -> Array:
    """y; `training` writes mean and var, contiguous float64 arrays, first."""
    if training:
        mean[...], var[...] = batch_moments(x)
    y = np.subtract(x, _per_channel(mean, x), out=np.empty_like(x))
    y *= _per_channel(_scale(var, weight, eps), x)
    if bias is not None:
        y += _per_channel(bias, x)
    return np.maximum(y, 0, out=y) if relu else y


def _scale(var: Array, weight: Array | None, eps: float) -> Array:
    scale = 1 / np.sqrt(var + eps)
    return scale if weight is None else scale * weight


def batch_norm_grad(x: Array, dy: Array, mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float,
                    training: bool, relu: bool = False) -> tuple[Array, Array, Array]:
    """dx, dw and db."""
    dx = np.subtract(x, _per_channel(mean, x), out=np.empty_like(x))
    dx *= _per_channel(_scale(var, None, eps), x)
    if relu:  # of what the forward pass computed
        y = dx if weight is None else dx * _per_channel(weight, x)
        dy = relu_grad(dy, y if bias is None else y + _per_channel(bias, x))
    db, dw = _sums(dy), _sums(dy * dx)
    scale = _per_channel(_scale(var, weight, eps), x)
    if training:
        count = x.shape[0] * math.prod(x.shape[2:])
        dx *= _per_channel(dw / -count, x)
        dx += dy
        dx -= _per_channel(db / count, x)
        dx *= scale
    else:
        np.multiply(dy, scale, out=dx)
    return dx, dw.astype(x.dtype), db.astype(x.dtype)


def channel_sums(dy: Array) -> Array:
    """Sums over all axes but axis 1, in the dtype of dy."""
    return _sums(dy).astype(dy.dtype)


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, 0, out=np.empty_like(x))


def relu_grad(dy: Array, y: Array) -> Array:
    """dy, but 0 where y <= 0."""
    dx = np.empty_like(y)
    dx[...] = dy
    np.copyto(dx, 0, where=y <= 0)
    return dx


def add(a: Array, b: Array, relu: bool = False) -> Array:
    """a + b of one shape and dtype, with `relu` max(., 0) of it."""
    y = np.add(a, b, out=np.empty_like(a))
    return np.maximum(y, 0, out=y) if relu else y


def sgd_step(value: Array, grad: Array, velocity: Array | None, lr: float, momentum: float, share: float,
             weight_decay: float, first: bool, nesterov: bool) -> None:
    """A step of `SGD`; `share` is 1 - dampening, and the first step writes the velocity."""
    if weight_decay:
        grad = grad + weight_decay * value
    if velocity is not None:
        if first:
            velocity[...] = grad
        else:
            velocity *= momentum
            velocity += share * grad
        grad = grad + momentum * velocity if nesterov else velocity
    value -= lr * grad


def adam_step(value: Array, grad: Array, mean: Array, square: Array, constants: tuple[float, ...]) -> None:
    """A step of `Adam`, whose `_update` says what the constants are."""
    shrink, decay, share1, beta2, share2, rate, correction, eps = constants
    if shrink != 1:
        value *= shrink
    if decay:
        grad = grad + decay * value
    mean += share1 * (grad - mean)
    square *= beta2
    square += share2 * grad * grad
    denominator = np.sqrt(square)
    denominator *= correction
    denominator += eps
    value -= rate * mean / denominator
