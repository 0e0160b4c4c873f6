"""Initial weights, and the random generators of the layers.

Random layers and initialisers take ``rng``: a `numpy.random.Generator`, an int that seeds a new one, or None for the
generator of the process, `default_rng`, which `seed` seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array
from fastconv.nn.layer import Layer, Parameter

default_rng: np.random.Generator = np.random.default_rng()
"""The generator of the process, used wherever ``rng`` is None."""


def seed(value: int) -> None:
    """Seed the generator of the process: initial weights and dropout repeat from here on."""
    default_rng.bit_generator.state = type(default_rng.bit_generator)(value).state


def generator(rng: np.random.Generator | int | None) -> np.random.Generator:
    """Return the generator that `rng` stands for: itself, a new one seeded by an int, or that of the process."""
    if rng is None:
        return default_rng
    return np.random.default_rng(rng)


def fans(shape: tuple[int, ...], groups: int = 1, transposed: bool = False) -> tuple[int, int]:
    """Number of inputs that one output sums over, and of outputs that one input reaches.

    Parameters
    ----------
    shape : tuple of int
        Of the weight: (out, in / groups, \\*kernel), or (in, out / groups, \\*kernel) if `transposed`; (out, in) for a
        linear layer.
    groups : int
        Groups of the convolution.
    transposed : bool
        Whether the weight is that of a transposed convolution.

    Returns
    -------
    fan_in, fan_out : int

    Raises
    ------
    ValueError
        For fewer than 2 axes.
    """
    if len(shape) < 2:
        raise ValueError(f"fans: shape is {shape}, but (out, in, *kernel) is needed: at least 2 axes. "
                         "Hint: biases have no fan; use zeros")
    taps = math.prod(shape[2:])
    near, far = shape[1] * taps, shape[0] // groups * taps
    return (far, near) if transposed else (near, far)


def _uniform(shape: tuple[int, ...], bound: float, rng: np.random.Generator | int | None, dtype: DTypeLike) -> Array:
    return generator(rng).uniform(-bound, bound, shape).astype(dtype)


def _normal(shape: tuple[int, ...], std: float, rng: np.random.Generator | int | None, dtype: DTypeLike) -> Array:
    return generator(rng).normal(0, std, shape).astype(dtype)


def he_normal(shape: tuple[int, ...], rng: np.random.Generator | int | None = None, *, negative_slope: float = 0.0,
              groups: int = 1, transposed: bool = False, dtype: DTypeLike = np.float32) -> Array:
    """Normal with variance ``2 / ((1 + negative_slope**2) * fan_in)`` (He et al. 2015, equations 10 and 15).

    Keeps the variance of activations through (leaky) ReLU layers. See `fans` for the other parameters.

    Returns
    -------
    ndarray
        Of `shape` and `dtype`.
    """
    fan_in, _ = fans(shape, groups, transposed)
    return _normal(shape, math.sqrt(2 / ((1 + negative_slope**2) * max(fan_in, 1))), rng, dtype)


def he_uniform(shape: tuple[int, ...], rng: np.random.Generator | int | None = None, *, negative_slope: float = 0.0,
               groups: int = 1, transposed: bool = False, dtype: DTypeLike = np.float32) -> Array:
    """Uniform with the variance of `he_normal`: bound ``sqrt(6 / ((1 + negative_slope**2) * fan_in))``."""
    fan_in, _ = fans(shape, groups, transposed)
    return _uniform(shape, math.sqrt(6 / ((1 + negative_slope**2) * max(fan_in, 1))), rng, dtype)


def glorot_normal(shape: tuple[int, ...], rng: np.random.Generator | int | None = None, *, groups: int = 1,
                  transposed: bool = False, dtype: DTypeLike = np.float32) -> Array:
    """Normal with variance ``2 / (fan_in + fan_out)`` (Glorot and Bengio 2010, equation 12).

    Keeps the variance of activations and gradients through linear and tanh layers. See `fans` for the parameters.
    """
    return _normal(shape, math.sqrt(2 / max(sum(fans(shape, groups, transposed)), 1)), rng, dtype)


def glorot_uniform(shape: tuple[int, ...], rng: np.random.Generator | int | None = None, *, groups: int = 1,
                   transposed: bool = False, dtype: DTypeLike = np.float32) -> Array:
    """Uniform with bound ``sqrt(6 / (fan_in + fan_out))`` (Glorot and Bengio 2010, equation 16)."""
    return _uniform(shape, math.sqrt(6 / max(sum(fans(shape, groups, transposed)), 1)), rng, dtype)


def torch_default(shape: tuple[int, ...], rng: np.random.Generator | int | None = None, *, fan_in: int | None = None,
                  dtype: DTypeLike = np.float32) -> Array:
    """Uniform with bound ``1 / sqrt(fan_in)``: what PyTorch's convolutions and linear layers start from.

    PyTorch takes ``fan_in = shape[1] * taps`` for the weights of transposed convolutions too. The default of fastconv's
    layers, so that both train alike.

    Parameters
    ----------
    shape : tuple of int
        Of the weight or, with `fan_in` given, of the bias.
    rng : Generator, int or None
        Source of the numbers.
    fan_in : int, optional
        That of the weight, for the bias.
    dtype
        float32 or float64.

    Returns
    -------
    ndarray
        Of `shape` and `dtype`.
    """
    return _uniform(shape, 1 / math.sqrt(max(fans(shape)[0] if fan_in is None else fan_in, 1)), rng, dtype)


def initialize(layer: Layer, initializer: Callable[..., Array], rng: np.random.Generator | int | None = None) -> Layer:
    """Set the weights of all convolutions and linear layers in `layer` by `initializer`, their biases to zero.

    Parameters
    ----------
    layer : Layer
        Any layer or network; normalisation layers are left as they are.
    initializer : callable
        `he_normal`, `he_uniform`, `glorot_normal`, `glorot_uniform`, or another function of the same arguments.
    rng : Generator, int or None
        Source of the numbers.

    Returns
    -------
    Layer
        `layer` itself.

    Examples
    --------
    >>> net = initialize(Sequential(Conv2d(3, 8, 3), ReLU()), he_normal, rng=0)
    """
    rng = generator(rng)
    for _, child in layer.named_layers():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Parameter) and len(weight.shape) >= 2:
            weight.assign(initializer(weight.shape, rng, groups=getattr(child, "groups", 1),
                                      transposed=getattr(child, "transposed", False), dtype=weight.dtype))
            bias = getattr(child, "bias", None)
            if isinstance(bias, Parameter):
                bias.assign(np.zeros(bias.shape, bias.dtype))
    return layer
