"""AlexNet (Krizhevsky, Sutskever and Hinton 2012) in 1D, 2D and 3D."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from fastconv.nn import init
from fastconv.nn.basic import Flatten, ReLU
from fastconv.nn.blocks import Kit, Rng, check_variant, scaled
from fastconv.nn.combine import Sequential
from fastconv.nn.layer import Layer
from fastconv.nn.norm import LocalResponseNorm


def alexnet(in_channels: int = 3, num_classes: int = 1000, *, variant: str = "torchvision",
            pool_size: int | None = None, width: float = 1.0, dropout: float = 0.5, ndim: int = 2,
            dtype: DTypeLike = np.float32, rng: Rng = None) -> Sequential:
    """AlexNet.

    ===============  =========================  ============================
    layer            ``variant="paper"``, 227   ``variant="torchvision"``, 224
    ===============  =========================  ============================
    conv1, 11x11/4   96, LRN, max pool 3/2      64, padding 2, max pool 3/2
    conv2, 5x5       256 in 2 groups, LRN,      192, max pool 3/2
                     max pool 3/2
    conv3, 3x3       384                        384
    conv4, 3x3       384 in 2 groups            256
    conv5, 3x3       256 in 2 groups,           256, max pool 3/2
                     max pool 3/2
    fc6, fc7         4096, dropout              4096, dropout
    fc8              1000                       1000
    ===============  =========================  ============================

    ReLU follows every layer but the last; windows of 3 with stride 2 are the paper's overlapping pools. The two
    groups are the paper's two GPUs. 60,965,224 and 61,100,840 parameters.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    variant : str
        ``"torchvision"`` is the one-tower network of Krizhevsky 2014 ("One weird trick"), whose weights
        torchvision publishes.
    pool_size : int, optional
        The last maps are averaged to this size, so that images of any size from about 63 fit; 6, which leaves the
        variants' own size as it is, or 2 for volumes, where 6**3 * 256 inputs of fc6 would be 226 million weights.
    width : float
        Factor for the channels of all layers.
    dropout : float
        Share of the units before each of the first two linear layers (torchvision) or after (paper).
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
        For an unknown variant or `ndim`.
    """
    kit = Kit(ndim, dtype, rng)
    paper = check_variant("alexnet", variant) == "paper"
    c1, c2, c3, c4, c5 = (scaled(c, width, 2) for c in ((96, 256, 384, 384, 256) if paper else
                                                        (64, 192, 384, 256, 256)))
    units = scaled(4096, width)
    pool_size = pool_size or (6 if ndim < 3 else 2)
    groups = 2 if paper else 1

    def after_conv(with_norm: bool) -> list[Layer]:
        # The paper's alpha is not divided by the 5 channels; ours, like PyTorch's, is.
        norm = [LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)] if paper and with_norm else []
        return [ReLU(), *norm, kit.max_pool(3, 2)]

    features = Sequential(
        kit.conv(in_channels, c1, 11, stride=4, padding=0 if paper else 2), *after_conv(True),
        kit.conv(c1, c2, 5, padding=2, groups=groups), *after_conv(True),
        kit.conv(c2, c3, 3, padding=1), ReLU(),
        kit.conv(c3, c4, 3, padding=1, groups=groups), ReLU(),
        kit.conv(c4, c5, 3, padding=1, groups=groups), *after_conv(False))
    fc6 = kit.linear(c5 * pool_size**ndim, units)
    fc7 = kit.linear(units, units)
    fc8 = kit.linear(units, num_classes)

    def drop() -> Layer:
        return kit.dropout(dropout)

    classifier = (Sequential(fc6, ReLU(), drop(), fc7, ReLU(), drop(), fc8) if paper else
                  Sequential(drop(), fc6, ReLU(), drop(), fc7, ReLU(), fc8))
    net = Sequential(features=features, avgpool=kit.adaptive_avg_pool(pool_size), flatten=Flatten(),
                     classifier=classifier)
    init.initialize(net, init.he_normal, kit.rng)
    return net
