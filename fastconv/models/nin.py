"""Network in network (Lin, Chen and Yan 2014) in 1D, 2D and 3D."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from fastconv.nn import init
from fastconv.nn.basic import Flatten
from fastconv.nn.blocks import Kit, Rng, mlpconv, scaled
from fastconv.nn.combine import Sequential
from fastconv.nn.layer import Layer
from fastconv.nn.pool import GlobalAvgPool

# For each mlpconv: kernel, stride, padding, channels of the convolution and of its two 1x1 convolutions (None: one
# for each class). Pools with dropout lie between them.
_TABLES: dict[str, tuple[tuple[int, int, int, tuple[int | None, ...]], ...]] = {
    "small": ((5, 1, 2, (192, 160, 96)), (5, 1, 2, (192, 192, 192)), (3, 1, 1, (192, 192, None))),
    "large": ((11, 4, 0, (96, 96, 96)), (5, 1, 2, (256, 256, 256)), (3, 1, 1, (384, 384, 384)),
              (3, 1, 1, (1024, 1024, None))),
}


def nin(in_channels: int = 3, num_classes: int = 10, *, images: str = "small", width: float = 1.0,
        dropout: float = 0.5, ndim: int = 2, dtype: DTypeLike = np.float32, rng: Rng = None) -> Sequential:
    """Network in network: mlpconv layers, and the mean of each of the last maps as the score of a class.

    ========  ===========================  ================================
    layer     ``images="small"``, 32       ``images="large"``, 224
    ========  ===========================  ================================
    mlpconv1  5x5, 192, 160, 96, pool      11x11/4, 96, 96, 96, pool
    mlpconv2  5x5, 192, 192, 192, pool     5x5, 256, 256, 256, pool
    mlpconv3  3x3, 192, 192, classes       3x3, 384, 384, 384, pool
    mlpconv4                               3x3, 1024, 1024, classes
    score     global average pool          global average pool
    ========  ===========================  ================================

    Pools are 3x3 with stride 2; dropout follows all of them on small images and the last of them on large ones. The
    paper gives the structure (figure 2); the numbers are those of its authors' published settings for CIFAR-10 and
    ImageNet. 966,986 parameters with 10 classes, 7,595,176 with 1000.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    images : str
        ``"small"`` or ``"large"``, see the table.
    width : float
        Factor for the channels of all layers.
    dropout : float
        Share of the elements.
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
        For an unknown table or `ndim`.
    """
    if images not in _TABLES:
        raise ValueError(f"nin: images is {images!r}, but one of {tuple(_TABLES)} is needed. "
                         "Hint: 'small' is for sizes of about 32")
    kit = Kit(ndim, dtype, rng)
    table = _TABLES[images]
    last = len(table)
    layers: dict[str, Layer] = {}
    for number, (kernel, stride, padding, row) in enumerate(table, 1):
        channels = tuple(num_classes if c is None else scaled(c, width) for c in row)
        layers[f"mlpconv{number}"] = mlpconv(in_channels, channels, kernel, stride=stride, padding=padding, **kit.kind)
        in_channels = channels[-1]
        if number < last:
            layers[f"pool{number}"] = kit.max_pool(3, 2, ceil_mode=True)
        if number < last and (images == "small" or number == last - 1):
            layers[f"dropout{number}"] = kit.dropout(dropout)
    net = Sequential(layers, score=GlobalAvgPool(), flatten=Flatten())
    init.initialize(net, init.he_normal, kit.rng)
    return net
