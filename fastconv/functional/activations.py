"""Activations of newer networks and their gradients, and the table of all that a convolution may end with.

As in `pointwise`, every function keeps shape, dtype and memory order and propagates NaN without warnings; a gradient
takes `grad_output` and the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from fastconv.arrays import FLOAT32, Array, as_array, on_device
from fastconv.functional import pointwise
from fastconv.functional.pointwise import check_grad, quiet

# The gradient of gelu's approximation by tanh: sqrt(2 / pi) * (x + CUBIC * x**3).
_CUBIC = 0.044715


@quiet
def clip(input: Array, low: float, high: float) -> Array:
    """``min(max(x, low), high)``, the hard tanh of Collobert (2004).

    Parameters
    ----------
    input : ndarray
        Any shape.
    low, high : float
        Bounds, low <= high.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order; NaN stays NaN.

    Raises
    ------
    ValueError
        Unless low <= high.
    """
    x = as_array(input, "input", "clip")
    if not low <= high:
        raise ValueError(f"clip: low is {low} and high is {high}, but low <= high is needed. "
                         "Hint: -inf and inf leave a side open")
    # Bounds of the array's dtype: a Python float would be one, a NumPy float64 would make the result float64.
    return np.clip(x, float(low), float(high), out=np.empty_like(x))


@quiet
def clip_grad(grad_output: Array, input: Array, low: float, high: float) -> Array:
    """Gradient of `clip`: `grad_output` where ``low < input < high``, else zero (as in PyTorch)."""
    x = as_array(input, "input", "clip_grad")
    dy = check_grad(grad_output, x, "clip_grad")
    return pointwise.zero_where((x <= low) | (x >= high), dy, np.empty_like(x))


def relu6(input: Array) -> Array:
    """``min(max(x, 0), 6)`` (Krizhevsky 2010); see `clip`."""
    return clip(input, 0, 6)


def relu6_grad(grad_output: Array, input: Array) -> Array:
    """Gradient of `relu6`; see `clip_grad`."""
    return clip_grad(grad_output, input, 0, 6)


@quiet
def elu(input: Array, alpha: float = 1.0) -> Array:
    """Exponential linear unit, ``x if x > 0 else alpha * (exp(x) - 1)`` (Clevert et al. 2016).

    Parameters
    ----------
    input : ndarray
        Any shape.
    alpha : float
        Minus the limit on the left.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order.
    """
    x = as_array(input, "input", "elu")
    y = np.minimum(x, 0, out=np.empty_like(x))
    np.expm1(y, out=y)
    y *= alpha
    y += np.maximum(x, 0)
    return y


@quiet
def elu_grad(grad_output: Array, input: Array, alpha: float = 1.0) -> Array:
    """Gradient of `elu`: `grad_output` where ``input > 0``, else ``alpha * exp(input) * grad_output``."""
    x = as_array(input, "input", "elu_grad")
    dx = np.exp(np.minimum(x, 0), out=np.empty_like(x))
    dx *= alpha
    np.copyto(dx, 1, where=x > 0)
    dx *= check_grad(grad_output, x, "elu_grad")
    return dx


@quiet
def silu(input: Array) -> Array:
    """Sigmoid linear unit or swish, ``x * sigmoid(x)`` (Elfwing et al. 2018; Ramachandran et al. 2017)."""
    x = as_array(input, "input", "silu")
    y = pointwise.sigmoid(x)
    y *= x
    return y


@quiet
def silu_grad(grad_output: Array, input: Array) -> Array:
    """Gradient of `silu`: ``dy * s * (1 + x * (1 - s))`` with ``s = sigmoid(x)``."""
    x = as_array(input, "input", "silu_grad")
    s = pointwise.sigmoid(x)
    dx = np.subtract(1, s, out=np.empty_like(x))
    dx *= x
    dx += 1
    dx *= s
    dx *= check_grad(grad_output, x, "silu_grad")
    return dx


@quiet
def hardsigmoid(input: Array) -> Array:
    """``min(max(x + 3, 0), 6) / 6`` (Howard et al. 2019)."""
    x = as_array(input, "input", "hardsigmoid")
    y = np.add(x, 3, out=np.empty_like(x))
    np.clip(y, 0, 6, out=y)
    y /= 6
    return y


@quiet
def hardsigmoid_grad(grad_output: Array, input: Array) -> Array:
    """Gradient of `hardsigmoid`: a sixth of `grad_output` where ``-3 < input < 3``, else zero."""
    dx = clip_grad(grad_output, input, -3, 3)
    dx /= 6
    return dx


@quiet
def hardswish(input: Array) -> Array:
    """``x * hardsigmoid(x)`` (Howard et al. 2019, section 5.2)."""
    x = as_array(input, "input", "hardswish")
    y = hardsigmoid(x)
    y *= x
    return y


@quiet
def hardswish_grad(grad_output: Array, input: Array) -> Array:
    """Gradient of `hardswish`: 0 below -3, 1 above 3, ``(2 * x + 3) / 6`` between, times `grad_output`."""
    x = as_array(input, "input", "hardswish_grad")
    dx = np.multiply(x, 1 / 3, out=np.empty_like(x))
    dx += 0.5
    np.copyto(dx, 0, where=x <= -3)
    np.copyto(dx, 1, where=x >= 3)
    dx *= check_grad(grad_output, x, "hardswish_grad")
    return dx


@quiet
def gelu(input: Array, approximate: str = "none") -> Array:
    """Gaussian error linear unit, x times the normal distribution function (Hendrycks and Gimpel 2016).

    Parameters
    ----------
    input : ndarray
        Any shape.
    approximate : str
        ``"none"``, or ``"tanh"`` for ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))``.

    Returns
    -------
    ndarray
        Same shape, dtype and memory order.

    Raises
    ------
    ValueError
        For another `approximate`.
    """
    x = as_array(input, "input", "gelu")
    y = _gaussian(x, approximate, "gelu")
    y *= x
    return y


@quiet
def gelu_grad(grad_output: Array, input: Array, approximate: str = "none") -> Array:
    """Gradient of `gelu`: ``dy * (P(x) + x * P'(x))``, P being the distribution function or its approximation."""
    x = as_array(input, "input", "gelu_grad")
    p = _gaussian(x, approximate, "gelu_grad")
    if approximate == "tanh":
        density = 2 * math.sqrt(2 / math.pi) * p * (1 - p) * (1 + 3 * _CUBIC * x * x)
    else:
        density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    dx = np.multiply(x, density, out=np.empty_like(x))
    dx += p
    dx *= check_grad(grad_output, x, "gelu_grad")
    return dx


def _gaussian(x: Array, approximate: str, op: str) -> Array:
    """The normal distribution function of `x`, in an array of its own."""
    if x.itemsize == 2:  # too coarse for the steps between
        return _gaussian(x.astype(np.float32), approximate, op).astype(x.dtype)
    if approximate == "tanh":
        z = np.multiply(x, x, out=np.empty_like(x))
        z *= _CUBIC
        z += 1
        z *= x
        z *= 2 * math.sqrt(2 / math.pi)
        return pointwise.sigmoid(z)  # (1 + tanh(z / 2)) / 2
    if approximate != "none":
        raise ValueError(f"{op}: approximate is {approximate!r}, but 'none' or 'tanh' is needed. "
                         "Hint: 'none' is the function itself")
    z = np.abs(x, out=np.empty_like(x))
    z *= math.sqrt(0.5)
    half = _scaled_erfc(z)
    z *= z
    np.negative(z, out=z)
    half *= np.exp(z, out=z)
    half *= 0.5
    np.copyto(half, 1 - half, where=x > 0)
    return half


# erfc(z) * exp(z**2) as a polynomial in t = 1 / (1 + z / 2), for z up to _FAR; beyond it erfc(z) < 1e-17.
_FAR = 6.0
_NEAREST = 1 / (1 + _FAR / 2)
_DEGREE = {"f": 11, "d": 24}


@cache
def _erfc_series(kind: str) -> tuple[float, ...]:
    """Chebyshev coefficients, from math.erfc at the nodes of the interpolation."""
    u = chebyshev.chebpts1(_DEGREE[kind] + 1)
    z = [2 / t - 2 for t in _NEAREST + (u + 1) * (1 - _NEAREST) / 2]
    return tuple(map(float, chebyshev.chebfit(u, [math.erfc(v) * math.exp(v * v) for v in z], _DEGREE[kind])))


def _scaled_erfc(z: Array) -> Array:
    """erfc(z) * exp(z**2) for z >= 0, constant from `_FAR` on, by Clenshaw's recurrence."""
    t = np.multiply(z, 0.5, out=np.empty_like(z))
    t += 1
    np.divide(4 / (1 - _NEAREST), t, out=t)  # twice the variable of the series, which runs from -1 to 1
    t -= 2 * (1 + _NEAREST) / (1 - _NEAREST)
    np.maximum(t, -2, out=t)
    first, *middle, last = _erfc_series(z.dtype.char)
    b, before, spare = np.full_like(z, last), np.zeros_like(z), np.empty_like(z)
    for c in reversed(middle):
        np.multiply(t, b, out=spare)
        spare -= before
        spare += c
        b, before, spare = spare, b, before
    t *= 0.5
    t *= b
    t -= before
    t += first
    return t


# ---- What a convolution may end with ---------------------------------------------------------------------------------

Spec = str | tuple[Any, ...] | None


class Activation(NamedTuple):
    """An activation with its parameters."""

    name: str
    function: Callable[..., Array]
    parameters: tuple[float, ...] = ()

    def __call__(self, x: Array) -> Array:
        """Apply it to a new array."""
        return self.function(x, *self.parameters)


class _Kind(NamedTuple):
    function: Callable[..., Array]
    defaults: tuple[float | None, ...] = ()  # of the parameters; None where one has to be given


ACTIVATIONS: dict[str, _Kind] = {
    "relu": _Kind(pointwise.relu),
    "relu6": _Kind(relu6),
    "clip": _Kind(clip, (None, None)),
    "leaky_relu": _Kind(pointwise.leaky_relu, (0.01,)),
    "elu": _Kind(elu, (1.0,)),
    "sigmoid": _Kind(pointwise.sigmoid),
    "tanh": _Kind(pointwise.tanh),
    "silu": _Kind(silu),
    "hardsigmoid": _Kind(hardsigmoid),
    "hardswish": _Kind(hardswish),
    "gelu": _Kind(gelu),
    "gelu_tanh": _Kind(lambda x: gelu(x, "tanh")),
}


def find_activation(op: str, spec: Spec) -> Activation | None:
    """The activation that a name, or a tuple of a name and parameters, stands for.

    Raises
    ------
    ValueError, TypeError
        If there is none of this name or it takes other parameters.
    """
    if spec is None:
        return None
    name, given = (spec[0], spec[1:]) if isinstance(spec, tuple) and spec else (spec, ())
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {spec!r}, but None, {', '.join(map(repr, ACTIVATIONS))} is needed, or a "
                         "tuple of a name and its parameters. Hint: apply others to the result")
    function, defaults = ACTIVATIONS[name]
    least = sum(value is None for value in defaults)
    if not least <= len(given) <= len(defaults):
        raise ValueError(f"{op}: activation is {spec!r} with {len(given)} parameters, but {name} takes "
                         f"{_between(least, len(defaults))}. Hint: ('clip', 0, 6), ('leaky_relu', 0.2)")
    if not all(isinstance(value, (int, float, np.floating, np.integer)) for value in given):
        raise TypeError(f"{op}: activation is {spec!r}, but parameters must be numbers. Hint: ('leaky_relu', 0.2)")
    parameters = (*map(float, given), *(float(v) for v in defaults[len(given):] if v is not None))
    activation = Activation(name, function, parameters)
    activation(np.zeros(0, FLOAT32))  # checks the parameters
    return activation


def _between(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


# Bytes of a block that `finish` takes at a time: it and what an activation allocates stay in a core's cache.
_BLOCK = 64 * 1024


@quiet
def finish(y: Array, activation: Activation | None, residual: Array | None) -> None:
    """Make ``activation(y + residual)`` of `y`, block by block where both lie dense in memory alike."""
    for block, added in _blocks(y, residual):
        if added is not None:
            block += added
        if activation is not None and activation.function is pointwise.relu:  # the usual one, without a copy
            np.maximum(block, 0, out=block)
        elif activation is not None:
            block[...] = activation(block)


def _blocks(y: Array, residual: Array | None) -> Iterator[tuple[Array, Array | None]]:
    if on_device(y):  # there are no blocks to keep in a cache
        yield y, residual
        return
    axes = sorted(range(y.ndim), key=lambda axis: -y.strides[axis])
    dense = [a.transpose(axes) for a in (y, residual) if a is not None]
    if not all(a.flags.c_contiguous for a in dense):
        yield y, residual
        return
    flat, step = [a.reshape(-1) for a in dense], _BLOCK // y.itemsize
    for start in range(0, y.size, step):
        block = slice(start, start + step)
        yield flat[0][block], None if residual is None else flat[1][block]
