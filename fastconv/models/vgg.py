"""VGG (Simonyan and Zisserman 2015) in 1D, 2D and 3D."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastconv.nn import init
from fastconv.nn.basic import Flatten, ReLU
from fastconv.nn.blocks import Kit, Rng, scaled
from fastconv.nn.combine import Sequential
from fastconv.nn.layer import Layer

CHANNELS = (64, 128, 256, 512, 512)

# Table 1 of the paper, columns A, B, D and E: the number of 3x3 convolutions of each size. A max pool ends each.
CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


def vgg(depth: int = 16, in_channels: int = 3, num_classes: int = 1000, *, batch_norm: bool = False,
        pool_size: int | None = None, width: float = 1.0, dropout: float = 0.5, ndim: int = 2,
        dtype: DTypeLike = np.float32, rng: Rng = None) -> Sequential:
    """VGG with 11, 13, 16 or 19 weight layers: 3x3 convolutions, max pools of 2, three linear layers.

    138,357,544 parameters with 16 layers, 143,667,240 with 19.

    Parameters
    ----------
    depth : int
        11, 13, 16 or 19: columns A, B, D, E of the paper's table 1.
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    batch_norm : bool
        Whether batch normalisation follows each convolution, as in torchvision's ``vgg16_bn``.
    pool_size : int, optional
        The last maps are averaged to this size, so that images of any size from 32 fit; 7, which leaves the maps of
        224 pixels as they are, or 2 for volumes, where 7 would make 719 million weights.
    width : float
        Factor for the channels of all layers.
    dropout : float
        Share of the units after each hidden linear layer.
    ndim : int
        Number of spatial axes.
    dtype, rng
        As in the layers of `fastconv.nn`.

    Returns
    -------
    Sequential
        From (N, in_channels, \\*spatial) to logits (N, num_classes).

    Raises
    ------
    ValueError
        For an unknown depth or `ndim`.
    """
    if depth not in CONVOLUTIONS:
        raise ValueError(f"vgg: depth is {depth}, but one of {tuple(CONVOLUTIONS)} is needed. Hint: vgg(16)")
    kit = Kit(ndim, dtype, rng)
    pool_size = pool_size or (7 if ndim < 3 else 2)
    units = scaled(4096, width)
    features: list[Layer] = []
    for channels, count in zip(CHANNELS, CONVOLUTIONS[depth], strict=True):
        channels = scaled(channels, width)
        for _ in range(count):
            norm = [kit.batch_norm(channels)] if batch_norm else []
            features += [kit.conv(in_channels, channels, 3, padding=1), *norm, ReLU()]
            in_channels = channels
        features.append(kit.max_pool(2, 2))
    net = Sequential(
        features=Sequential(*features), avgpool=kit.adaptive_avg_pool(pool_size), flatten=Flatten(),
        classifier=Sequential(
            kit.linear(in_channels * pool_size**ndim, units), ReLU(), kit.dropout(dropout),
            kit.linear(units, units), ReLU(), kit.dropout(dropout),
            kit.linear(units, num_classes)))
    init.initialize(net, init.he_normal, kit.rng)
    return net


def vgg11(**options: Any) -> Sequential:
    """`vgg` with 11 layers."""
    return vgg(11, **options)


def vgg13(**options: Any) -> Sequential:
    """`vgg` with 13 layers."""
    return vgg(13, **options)


def vgg16(**options: Any) -> Sequential:
    """`vgg` with 16 layers."""
    return vgg(16, **options)


def vgg19(**options: Any) -> Sequential:
    """`vgg` with 19 layers."""
    return vgg(19, **options)
