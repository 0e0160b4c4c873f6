"""Residual networks (He, Zhang, Ren and Sun 2016) in 1D, 2D and 3D, and the plain networks without shortcuts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from fastconv.nn import init
from fastconv.nn.basic import Flatten, ReLU
from fastconv.nn.blocks import BOTTLENECK_EXPANSION, Kit, Rng, basic_block, bottleneck, scaled, stem_window
from fastconv.nn.combine import Sequential
from fastconv.nn.layer import Layer
from fastconv.nn.pool import GlobalAvgPool

CHANNELS = (64, 128, 256, 512)

# Table 1 of the paper: the block, its output channels for each of its own, and the number of blocks of each size.
BLOCKS: dict[int, tuple[Callable[..., Layer], int, tuple[int, ...]]] = {
    10: (basic_block, 1, (1, 1, 1, 1)),  # of Med3D (Chen et al. 2019), not of the paper
    18: (basic_block, 1, (2, 2, 2, 2)),
    34: (basic_block, 1, (3, 4, 6, 3)),
    50: (bottleneck, BOTTLENECK_EXPANSION, (3, 4, 6, 3)),
    101: (bottleneck, BOTTLENECK_EXPANSION, (3, 4, 23, 3)),
    152: (bottleneck, BOTTLENECK_EXPANSION, (3, 8, 36, 3)),
}


class Variant(NamedTuple):
    """Whose network it is. Strides leave no trace in names and shapes of weights."""

    stem_stride: int = 2
    """Of the large stem."""
    shortcut: str = "projection"
    """Where size or channels change, see `basic_block`."""
    shortcut_18_34: str = "projection"
    """The same with 18 and 34 layers."""
    bottleneck: str = "torchvision"
    """Where the stride is, see `bottleneck`."""


VARIANTS = {
    "paper": Variant(shortcut_18_34="padding", bottleneck="paper"),
    "torchvision": Variant(),
    "monai": Variant(stem_stride=1, shortcut="biased projection", shortcut_18_34="biased projection"),
    "medicalnet": Variant(shortcut_18_34="padding"),
}


def resnet(depth: int = 18, in_channels: int = 3, num_classes: int = 1000, *, stem: str = "large",
           residual: bool = True, variant: str = "torchvision", width: float = 1.0, ndim: int = 2,
           dtype: DTypeLike = np.float32, rng: Rng = None) -> Sequential:
    """ResNet with 10, 18, 34, 50, 101 or 152 weight layers.

    ========  ======================================================  ==========
    layer     what                                                    size of 224
    ========  ======================================================  ==========
    conv1     7x7/2, 64, batch norm, ReLU                             112
    maxpool   3x3/2                                                   56
    layer1    blocks with 64 channels                                 56
    layer2    blocks with 128 channels, the first with stride 2       28
    layer3    blocks with 256 channels, the first with stride 2       14
    layer4    blocks with 512 channels, the first with stride 2       7
    avgpool   global average pool                                     1
    fc        linear
    ========  ======================================================  ==========

    10, 18 and 34 have `basic_block`, the others `bottleneck`. From 18 layers on: 11,689,512, 21,797,672, 25,557,032,
    44,549,160 and 60,192,808 parameters.

    Parameters
    ----------
    depth : int
        10, 18, 34, 50, 101 or 152.
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    stem : str
        ``"large"`` as in the table; ``"small"`` is a 3x3 convolution with stride 1 and no pool, for images of
        about 32 pixels.
    residual : bool
        False leaves the shortcuts out: the paper's plain network.
    variant : str
        Whose weights fit. ``"torchvision"``: as in the table, with projections as shortcuts and the stride of
        bottlenecks in their 3x3 convolution. ``"paper"``: the stride in their first 1x1 convolution, and with 18 and 34
        layers shortcuts that pad with zeros (option A, table 2 of the paper). ``"monai"``: what MONAI's `resnet18` and
        the others are by default, with stride 1 in the large stem and a bias in the projections. ``"medicalnet"``: the
        3D networks of Med3D (Chen et al. 2019), where the shortcuts of 18 and 34 layers are padding too.
    width : float
        Factor for the channels of all layers.
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
        For an unknown depth, stem, variant or `ndim`.
    """
    if depth not in BLOCKS:
        raise ValueError(f"resnet: depth is {depth}, but one of {tuple(BLOCKS)} is needed. "
                         "Hint: resnet_small has 20, 32, 44, ... layers for small images")
    window = stem_window("resnet", stem)
    if variant not in VARIANTS:
        raise ValueError(f"resnet: variant is {variant!r}, but one of {', '.join(map(repr, VARIANTS))} is needed. "
                         "Hint: 'torchvision' unless you load weights of another library")
    form = VARIANTS[variant]
    shortcut = form.shortcut_18_34 if depth in (18, 34) else form.shortcut
    kit = Kit(ndim, dtype, rng)
    block, expansion, counts = BLOCKS[depth]
    if block is bottleneck:
        block = partial(bottleneck, variant=form.bottleneck)
    channels = tuple(scaled(c, width) for c in CHANNELS)
    pool: dict[str, Layer] = {}
    if stem == "large":
        window["stride"] = form.stem_stride
        pool["maxpool"] = kit.max_pool(3, 2, padding=1)
    conv1 = kit.conv(in_channels, channels[0], **window, bias=False)
    return _network(kit, conv1, pool, block, expansion, channels, counts, num_classes, residual, shortcut)


def resnet_small(depth: int = 20, in_channels: int = 3, num_classes: int = 10, *, residual: bool = True,
                 shortcut: str = "projection", width: float = 1.0, ndim: int = 2, dtype: DTypeLike = np.float32,
                 rng: Rng = None) -> Sequential:
    """The ResNet of section 4.2 for images of 32 pixels: ``depth = 6 n + 2``, n blocks each of 16, 32, 64 channels.

    With 20 layers and 3 channels 272,474 parameters, 269,722 with the paper's shortcuts.

    Parameters
    ----------
    depth : int
        20, 32, 44, 56, 110, ...
    shortcut : str
        Where the size halves: ``"projection"`` (option B), or ``"padding"`` (option A), which the paper has here.
    in_channels, num_classes, residual, width, ndim, dtype, rng
        See `resnet`.

    Returns
    -------
    Sequential
        From (N, in_channels, \\*spatial) to logits (N, num_classes).

    Raises
    ------
    ValueError
        For a depth that is not 6 n + 2, or an unknown `shortcut` or `ndim`.
    """
    blocks, rest = divmod(depth - 2, 6)
    if blocks < 1 or rest:
        raise ValueError(f"resnet_small: depth is {depth}, but 6 n + 2 with n >= 1 is needed: ({depth} - 2) / 6 is "
                         "not such an n. Hint: resnet_small(20)")
    kit = Kit(ndim, dtype, rng)
    channels = tuple(scaled(c, width) for c in (16, 32, 64))
    conv1 = kit.conv(in_channels, channels[0], **stem_window("resnet_small", "small"), bias=False)
    return _network(kit, conv1, {}, basic_block, 1, channels, (blocks,) * 3, num_classes, residual, shortcut)


def _network(kit: Kit, conv1: Layer, pool: dict[str, Layer], block: Callable[..., Layer], expansion: int,
             channels: tuple[int, ...], counts: tuple[int, ...], num_classes: int, residual: bool,
             shortcut: str) -> Sequential:
    layers: dict[str, Layer] = {"conv1": conv1, "bn1": kit.batch_norm(channels[0]), "relu": ReLU(), **pool}
    before = channels[0]
    for number, (inside, count) in enumerate(zip(channels, counts, strict=True), 1):
        blocks = []
        for position in range(count):
            stride = 2 if number > 1 and position == 0 else 1
            blocks.append(block(before, inside, stride, residual=residual, shortcut=shortcut, **kit.kind))
            before = inside * expansion
        layers[f"layer{number}"] = Sequential(*blocks)
    net = Sequential(layers, avgpool=GlobalAvgPool(), flatten=Flatten(), fc=kit.linear(before, num_classes))
    init.initialize(net, init.he_normal, kit.rng)
    return net


def resnet10(**options: Any) -> Sequential:
    """`resnet` with 10 layers."""
    return resnet(10, **options)


def resnet18(**options: Any) -> Sequential:
    """`resnet` with 18 layers."""
    return resnet(18, **options)


def resnet34(**options: Any) -> Sequential:
    """`resnet` with 34 layers."""
    return resnet(34, **options)


def resnet50(**options: Any) -> Sequential:
    """`resnet` with 50 layers."""
    return resnet(50, **options)


def resnet101(**options: Any) -> Sequential:
    """`resnet` with 101 layers."""
    return resnet(101, **options)


def resnet152(**options: Any) -> Sequential:
    """`resnet` with 152 layers."""
    return resnet(152, **options)
