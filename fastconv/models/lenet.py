"""LeNet-5 (LeCun, Bottou, Bengio and Haffner 1998, section II.B) in 1D, 2D and 3D."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array
from fastconv.functional import pointwise
from fastconv.functional.conv import conv, conv_bias_grad, conv_input_grad, conv_weight_grad
from fastconv.nn import init
from fastconv.nn.basic import Flatten, Linear, ReLU
from fastconv.nn.combine import Sequential
from fastconv.nn.conv import CONV
from fastconv.nn.layer import Backward, Buffer, Layer, Leaf, Parameter
from fastconv.nn.pool import AVG_POOL, MAX_POOL

# Table I of the paper: the maps of S2 that each map of C3 sees.
C3_INPUTS = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)

# The digits as 7x12 pictures, the targets of the output units; drawn in the manner of figure 3.
DIGITS = """
..###..  ...#...  .#####.  .#####.  ....##.  #######  ..####.  #######  .#####.  .#####.
.##.##.  ..##...  ##...##  ##...##  ...###.  ##.....  .##....  ##...##  ##...##  ##...##
##...##  .###...  .....##  .....##  ...###.  ##.....  ##.....  .....##  ##...##  ##...##
##...##  ...#...  .....##  .....##  ..#.##.  ##.....  ##.....  ....##.  ##...##  ##...##
##...##  ...#...  ....##.  .....##  ..#.##.  ######.  ##.###.  ....##.  .##.##.  ##...##
##...##  ...#...  ...##..  ..####.  .#..##.  .....##  ###..##  ...##..  ..###..  .##.###
##...##  ...#...  ..##...  .....##  .#..##.  .....##  ##...##  ...##..  .##.##.  ..##.##
##...##  ...#...  .##....  .....##  #######  .....##  ##...##  ..##...  ##...##  .....##
##...##  ...#...  ##.....  .....##  ....##.  .....##  ##...##  ..##...  ##...##  .....##
##...##  ...#...  ##.....  ##...##  ....##.  ##...##  ##...##  .##....  ##...##  ....##.
.##.##.  ...#...  ##.....  ##...##  ....##.  ##...##  .##.##.  .##....  ##...##  ...##..
..###..  .#####.  #######  .#####.  ....##.  .#####.  ..###..  .##....  .#####.  .###...
"""


class ScaledTanh(Leaf):
    """The squashing function of the paper's appendix A, ``1.7159 * tanh(2 / 3 * x)``; f(1) is 1."""

    amplitude = 1.7159
    slope = 2 / 3

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape; see `Layer.forward`."""
        y = pointwise.tanh(x * self.slope)
        return y * self.amplitude, lambda dy: pointwise.tanh_grad(dy, y) * (self.amplitude * self.slope)


class Subsampling(Layer):
    """Sum over windows of 2, times a trained coefficient, plus a trained bias, for each map: S2 and S4.

    Parameters
    ----------
    channels : int
        Number of maps.
    ndim : int
        Number of spatial axes.
    dtype, rng
        As in the layers of `fastconv.nn`.
    """

    def __init__(self, channels: int, ndim: int, *, dtype: DTypeLike, rng: np.random.Generator) -> None:
        taps = 2**ndim
        self.sum = AVG_POOL[ndim](2, divisor_override=1)
        self.weight = Parameter(_uniform((channels,), taps, rng, dtype))
        self.bias = Parameter(np.zeros(channels, dtype))

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, channels, \\*spatial); see `Layer.forward`."""
        total, sum_backward = self.sum.forward(x)
        weight, bias, version = self.weight, self.bias, self.weight.version
        broadcast = (-1, *[1] * (x.ndim - 2))

        def backward(dy: Array) -> Array:
            weight.check_version(version, "weight")
            weight.add_grad(conv_bias_grad(dy * total))
            bias.add_grad(conv_bias_grad(dy))
            dx: Array = sum_backward(dy * weight.value.reshape(broadcast))
            return dx

        return total * weight.value.reshape(broadcast) + bias.value.reshape(broadcast), backward

    def __call__(self, x: Array) -> Array:
        """Run inference."""
        return self.forward(x)[0]


class SparseConv(Leaf):
    """A convolution whose maps see only some input maps: C3.

    Parameters
    ----------
    inputs : tuple of tuples of int
        For each output map the input maps that it sees.
    kernel_size : tuple of int
        Per axis.
    dtype, rng
        As in the layers of `fastconv.nn`.

    Attributes
    ----------
    weight : Parameter
        Shape (number of connections, \\*kernel_size), in the order of `inputs`.
    bias : Parameter
        Shape (number of output maps,).
    """

    def __init__(self, inputs: tuple[tuple[int, ...], ...], kernel_size: tuple[int, ...], *, dtype: DTypeLike,
                 rng: np.random.Generator) -> None:
        pairs = [(out, source) for out, sources in enumerate(inputs) for source in sources]
        self.connections = tuple(np.array(pairs).T)
        self.shape = (len(inputs), 1 + max(source for _, source in pairs), *kernel_size)
        taps = math.prod(kernel_size)
        self.weight = Parameter(np.concatenate(
            [_uniform((len(sources), *kernel_size), len(sources) * taps, rng, dtype) for sources in inputs]))
        self.bias = Parameter(np.zeros(len(inputs), dtype))

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, C, \\*spatial); see `Layer.forward`."""
        weight, bias = self.weight, self.bias
        dense = np.zeros(self.shape, weight.dtype, like=weight.value)
        dense[self.connections] = weight.value

        def backward(dy: Array) -> Array:
            weight.add_grad(conv_weight_grad(x, self.shape, dy)[self.connections])
            bias.add_grad(conv_bias_grad(dy))
            return conv_input_grad(x.shape, dense, dy)

        return conv(x, dense, bias.value), backward


class RBFOutput(Leaf):
    """Minus the squared distance to a fixed code for each class: the output layer, with nothing to train.

    Parameters
    ----------
    codes : ndarray
        Shape (classes, features), of +1 and -1.
    """

    def __init__(self, codes: Array) -> None:
        self.codes = Buffer(codes)

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, features); see `Layer.forward`."""
        difference = x[:, None, :] - self.codes.value
        y = -np.sum(difference * difference, -1)
        return y, lambda dy: -2 * np.sum(dy[:, :, None] * difference, 1)


def _uniform(shape: tuple[int, ...], fan_in: int, rng: np.random.Generator, dtype: DTypeLike) -> Array:
    """The paper's initial weights: uniform within 2.4 / fan_in (appendix A)."""
    return rng.uniform(-2.4 / fan_in, 2.4 / fan_in, shape).astype(dtype)


def digit_codes(num_classes: int, rng: np.random.Generator) -> Array:
    """Targets of the output units, (num_classes, 84): pictures of the ten digits, else random signs."""
    if num_classes != 10:
        return rng.choice([-1.0, 1.0], (num_classes, 84))
    rows = [line.split() for line in DIGITS.split("\n") if line]
    return np.array([[1.0 if pixel == "#" else -1.0 for row in rows for pixel in row[digit]] for digit in range(10)])


def lenet5(in_channels: int = 1, num_classes: int = 10, input_size: tuple[int, ...] = (28, 28),
           variant: str = "modern", *, dtype: DTypeLike = np.float32,
           rng: np.random.Generator | int | None = None) -> Sequential:
    """LeNet-5.

    ========  ==================  ======================  ======================
    layer     for 32x32           ``variant="modern"``    ``variant="paper"``
    ========  ==================  ======================  ======================
    C1        6 maps of 28x28     5x5, 156 parameters     the same
    S2        6 maps of 14x14     max pool                trained, 12
    C3        16 maps of 10x10    5x5 of all maps, 2,416  sparse (table I), 1,516
    S4        16 maps of 5x5      max pool                trained, 32
    C5        120                 48,120                  the same
    F6        84                  10,164                  the same
    output    10                  linear, 850             distances to codes, 0
    ========  ==================  ======================  ======================

    The sums are 61,706 and 60,000. The modern form has ReLU after C1, C3, C5 and F6 and the initial weights of
    `init.he_uniform`; the paper's has the scaled tanh after every layer up to F6.

    Parameters
    ----------
    in_channels : int
        Channels of the input (the paper's variant too takes any number).
    num_classes : int
        Number of outputs.
    input_size : tuple of int
        Spatial size of the input; its length makes the network 1D, 2D or 3D. Sizes below 32 are padded by 2 on each
        side in C1, as the paper pads digits of 28x28 to 32x32.
    variant : str
        ``"modern"`` or ``"paper"``.
    dtype
        float32 or float64.
    rng : Generator, int or None
        Source of the initial weights.

    Returns
    -------
    Sequential
        From (N, in_channels, \\*input_size) to logits (N, num_classes), with the layers named as in the table. Give
        the logits to `cross_entropy`; with the paper's distances this is its equation 9 without the constant.

    Raises
    ------
    ValueError
        For an unknown variant, or an input too small for the two convolutions.
    """
    ndim = len(input_size)
    if ndim not in CONV:
        raise ValueError(f"lenet5: input_size is {input_size}, but 1 to 3 spatial sizes are needed. "
                         "Hint: input_size=(28, 28)")
    padding = 2 if min(input_size) < 32 else 0
    features = tuple(((n + 2 * padding - 4) // 2 - 4) // 2 for n in input_size)
    if min(features) < 1:
        raise ValueError(f"lenet5: input_size is {input_size}, but after C1, S2, C3 and S4 "
                         f"((n + {2 * padding} - 4) // 2 - 4) // 2 = {features} is left, and at least 1 is needed. "
                         "Hint: enlarge the images to 12 or more")
    if variant not in _VARIANTS:
        raise ValueError(f"lenet5: variant is {variant!r}, but one of {tuple(_VARIANTS)} is needed. "
                         "Hint: 'paper' is the network of 1998")
    return _VARIANTS[variant](in_channels, num_classes, padding, features, dtype, init.generator(rng))


def _modern(in_channels: int, num_classes: int, padding: int, features: tuple[int, ...], dtype: DTypeLike,
            rng: np.random.Generator) -> Sequential:
    ndim = len(features)
    convolution, pool = CONV[ndim], MAX_POOL[ndim]
    options: dict[str, Any] = {"dtype": dtype, "rng": rng}
    net = Sequential(
        c1=convolution(in_channels, 6, 5, padding=padding, **options), relu1=ReLU(), s2=pool(2),
        c3=convolution(6, 16, 5, **options), relu3=ReLU(), s4=pool(2),
        flatten=Flatten(),
        c5=Linear(16 * math.prod(features), 120, **options), relu5=ReLU(),
        f6=Linear(120, 84, **options), relu6=ReLU(),
        output=Linear(84, num_classes, **options))
    init.initialize(net, init.he_uniform, rng)
    return net


def _paper(in_channels: int, num_classes: int, padding: int, features: tuple[int, ...], dtype: DTypeLike,
           rng: np.random.Generator) -> Sequential:
    ndim = len(features)
    options: dict[str, Any] = {"dtype": dtype, "rng": rng}
    net = Sequential(
        c1=CONV[ndim](in_channels, 6, 5, padding=padding, **options), tanh1=ScaledTanh(),
        s2=Subsampling(6, ndim, **options), tanh2=ScaledTanh(),
        c3=SparseConv(C3_INPUTS, (5,) * ndim, **options), tanh3=ScaledTanh(),
        s4=Subsampling(16, ndim, **options), tanh4=ScaledTanh(),
        c5=CONV[ndim](16, 120, features, **options), tanh5=ScaledTanh(),
        flatten=Flatten(),
        f6=Linear(120, 84, **options), tanh6=ScaledTanh(),
        output=RBFOutput(digit_codes(num_classes, rng).astype(dtype)))
    for name in ("c1", "c5", "f6"):
        weight, bias = (parameter for _, parameter in net[name].named_parameters())
        weight.assign(_uniform(weight.shape, math.prod(weight.shape[1:]), rng, weight.dtype))
        bias.assign(np.zeros(bias.shape, bias.dtype))
    return net


_VARIANTS = {"modern": _modern, "paper": _paper}
