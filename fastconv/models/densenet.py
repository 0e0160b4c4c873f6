"""DenseNet (Huang, Liu, van der Maaten and Weinberger 2017) in 1D, 2D and 3D."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastconv.nn import init
from fastconv.nn.basic import Flatten, ReLU
from fastconv.nn.blocks import DenseBlock, Kit, Rng, scaled, stem_window, transition
from fastconv.nn.combine import Sequential
from fastconv.nn.layer import Layer
from fastconv.nn.pool import GlobalAvgPool

# Table 1 of the paper: growth rate, channels of the first convolution, layers of the four dense blocks.
BLOCKS = {
    121: (32, 64, (6, 12, 24, 16)),
    161: (48, 96, (6, 12, 36, 24)),
    169: (32, 64, (6, 12, 32, 32)),
    201: (32, 64, (6, 12, 48, 32)),
}


def densenet(depth: int = 121, in_channels: int = 3, num_classes: int = 1000, *, stem: str = "large",
             dropout: float = 0.0, width: float = 1.0, ndim: int = 2, dtype: DTypeLike = np.float32,
             rng: Rng = None) -> Sequential:
    """DenseNet-BC with 121, 161, 169 or 201 weight layers.

    ============  ====================================================  ===========
    layer         what                                                  size of 224
    ============  ====================================================  ===========
    conv0         7x7/2, twice the growth rate, batch norm, ReLU        112
    denseblock1   3x3/2 max pool, dense layers                          56
    transition1   batch norm, ReLU, 1x1 to half the channels            56
    denseblock2   2x2 average pool, dense layers                        28
    transition2   ...                                                   28
    denseblock3   2x2 average pool, dense layers                        14
    transition3   ...                                                   14
    denseblock4   2x2 average pool, dense layers                        7
    norm5         batch norm, ReLU, global average pool                 1
    classifier    linear
    ============  ====================================================  ===========

    The pools belong to the blocks so that they write straight into the blocks' buffers, see `DenseBlock`.
    7,978,856, 28,681,000, 14,149,480 and 20,013,928 parameters.

    Parameters
    ----------
    depth : int
        121, 161, 169 or 201.
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    stem : str
        ``"large"`` as in the table; ``"small"`` is a 3x3 convolution with stride 1 and no pool, for images of
        about 32 pixels.
    dropout : float
        Share of the output of each dense layer that training drops.
    width : float
        Factor for the growth rate and the channels of the first convolution.
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
        For an unknown depth, stem or `ndim`.
    """
    if depth not in BLOCKS:
        raise ValueError(f"densenet: depth is {depth}, but one of {tuple(BLOCKS)} is needed. Hint: densenet(121)")
    window = stem_window("densenet", stem)
    kit = Kit(ndim, dtype, rng)
    growth_rate, channels, counts = BLOCKS[depth]
    growth_rate, channels = scaled(growth_rate, width), scaled(channels, width)
    layers: dict[str, Layer] = {
        "conv0": kit.conv(in_channels, channels, **window, bias=False),
        "norm0": kit.batch_norm(channels), "relu0": ReLU()}
    first_pool = kit.max_pool(3, 2, padding=1) if stem == "large" else None
    for number, count in enumerate(counts, 1):
        block = DenseBlock(channels, count, growth_rate, dropout=dropout,
                           entry=first_pool if number == 1 else kit.avg_pool(2, 2), **kit.kind)
        layers[f"denseblock{number}"] = block
        channels = block.out_channels
        if number < len(counts):
            layers[f"transition{number}"] = transition(channels, channels // 2, **kit.kind)[:-1]
            channels //= 2
    layers["norm5"] = kit.batch_norm(channels)
    net = Sequential(features=Sequential(layers), relu=ReLU(), avgpool=GlobalAvgPool(), flatten=Flatten(),
                     classifier=kit.linear(channels, num_classes))
    init.initialize(net, init.he_normal, kit.rng)
    return net


def densenet121(**options: Any) -> Sequential:
    """`densenet` with 121 layers."""
    return densenet(121, **options)


def densenet161(**options: Any) -> Sequential:
    """`densenet` with 161 layers."""
    return densenet(161, **options)


def densenet169(**options: Any) -> Sequential:
    """`densenet` with 169 layers."""
    return densenet(169, **options)


def densenet201(**options: Any) -> Sequential:
    """`densenet` with 201 layers."""
    return densenet(201, **options)
