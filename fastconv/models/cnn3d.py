"""A small network for volumes."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from fastconv.nn import (
    AdaptiveAvgPool3d,
    BatchNorm3d,
    Conv3d,
    Flatten,
    Layer,
    Linear,
    MaxPool3d,
    ReLU,
    Sequential,
    init,
)


def cnn3d(
    in_channels: int = 1,
    num_classes: int = 2,
    widths: tuple[int, ...] = (8, 16, 32),
    *,
    dtype: DTypeLike = np.float32,
    rng: np.random.Generator | int | None = None,
) -> Sequential:
    """Stages of 3x3x3 convolution, batch normalisation, ReLU and 2x2x2 max pooling, then a linear layer.

    It is VGG's recipe (Simonyan and Zisserman 2015: small kernels, channels double where the size halves)
    with batch normalisation (Ioffe and Szegedy 2015) and global average pooling (Lin et al. 2014) in
    place of the large linear layers, small enough to train on a CPU in minutes.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    widths : tuple of int
        Channels of each stage; the input must be at least 2**len(widths) long in every axis.
    dtype
        float32 or float64.
    rng : Generator, int or None
        Source of the initial weights (He et al. 2015).

    Returns
    -------
    Sequential
        From (N, in_channels, D, H, W) to logits (N, num_classes); 17,674 parameters by default.
    """
    rng = init.generator(rng)
    layers: list[Layer] = []
    for width in widths:
        layers += [
            Conv3d(in_channels, width, 3, padding=1, bias=False, dtype=dtype, rng=rng),
            BatchNorm3d(width, dtype=dtype),
            ReLU(),
            MaxPool3d(2),
        ]
        in_channels = width
    head = Linear(in_channels, num_classes, dtype=dtype, rng=rng)
    net = Sequential(*layers, AdaptiveAvgPool3d(1), Flatten(), head)
    init.initialize(net, init.he_normal, rng)
    return net
