"""The networks of the course, in sizes that train on a CPU in seconds to minutes.

Structures are those of the papers; channels are fewer, and networks that were made for 224 pixels have the stem of
their authors' networks for small images. `NETWORKS` says what each is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv import models
from fastconv.models.googlenet import AUXILIARY_AFTER, INCEPTION, POOL_AFTER, WithHeads
from fastconv.nn import GlobalAvgPool, Layer, ReLU, Sequential, init
from fastconv.nn.basic import Flatten
from fastconv.nn.blocks import (
    DenseBlock,
    Kit,
    auxiliary_classifier,
    conv_relu,
    inception,
    naive_inception,
    scaled,
    transition,
)

__all__ = ["FAMILIES", "NETWORKS", "Network", "build", "densenet_small", "googlenet_small", "input_size_of"]

Size = tuple[int, ...]


def googlenet_small(in_channels: int, num_classes: int, *, reduced: bool = True, auxiliary: bool = False,
                    width: float = 0.25, ndim: int = 2, rng: np.random.Generator | int | None = None) -> WithHeads:
    """GoogLeNet's nine inception modules (Szegedy et al. 2015, table 1) behind one 3x3 convolution.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    reduced : bool
        False takes the naive modules of figure 2a, without the 1x1 convolutions that reduce the channels. Their pool
        branch hands on all channels of the input, so that a module has more outputs the later it comes.
    auxiliary : bool
        Whether ``forward`` also gives the logits of the two auxiliary classifiers, for `models.googlenet_loss`.
    width : float
        Factor for the channels of all layers.
    ndim, rng
        As in `fastconv.models`.
    """
    kit = Kit(ndim, np.float32, rng)
    channels = scaled(192, width)
    layers: dict[str, Layer] = {"conv1": conv_relu(in_channels, channels, 3, padding=1, **kit.kind),
                                "maxpool1": kit.max_pool(3, 2, ceil_mode=True)}
    heads: dict[str, tuple[str, Layer]] = {}
    for name, (full1, (less3, full3), (less5, full5), pool) in INCEPTION.items():
        c1, r3, c3, r5, c5, p = (scaled(c, width) for c in (full1, less3, full3, less5, full5, pool))
        if reduced:
            layers[f"inception{name}"] = inception(channels, c1, (r3, c3), (r5, c5), p, **kit.kind)
            channels = c1 + c3 + c5 + p
        else:
            layers[f"inception{name}"] = naive_inception(channels, c1, c3, c5, **kit.kind)
            channels = c1 + c3 + c5 + channels
        if auxiliary and name in AUXILIARY_AFTER:
            # torchvision's form: the paper's takes only maps of 14 to 16 pixels.
            heads[AUXILIARY_AFTER[name]] = (f"inception{name}", auxiliary_classifier(
                channels, num_classes, width=width, variant="torchvision", **kit.kind))
        if name in POOL_AFTER:
            layers[POOL_AFTER[name]] = kit.max_pool(3, 2, ceil_mode=True)
    layers |= {"avgpool": GlobalAvgPool(), "flatten": Flatten(), "dropout": kit.dropout(0.4),
               "fc": kit.linear(channels, num_classes)}
    net = WithHeads(layers, heads)
    init.initialize(net, init.he_normal, kit.rng)
    return net


def densenet_small(in_channels: int, num_classes: int, *, depth: int = 22, growth_rate: int = 8, ndim: int = 2,
                   rng: np.random.Generator | int | None = None) -> Sequential:
    """DenseNet-BC for images of 32 pixels (Huang et al. 2017, section 4.1): three dense blocks.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    depth : int
        ``6 n + 4`` layers, n dense layers of two convolutions in each block; 100 in the paper.
    growth_rate : int
        Channels that each dense layer adds; 12 in the paper.
    ndim, rng
        As in `fastconv.models`.
    """
    kit = Kit(ndim, np.float32, rng)
    channels = 2 * growth_rate
    layers: dict[str, Layer] = {"conv0": kit.conv(in_channels, channels, 3, padding=1, bias=False)}
    for number in (1, 2, 3):
        entry = None if number == 1 else kit.avg_pool(2, 2)
        block = DenseBlock(channels, (depth - 4) // 6, growth_rate, entry=entry, **kit.kind)
        layers[f"denseblock{number}"] = block
        channels = block.out_channels
        if number < 3:
            layers[f"transition{number}"] = transition(channels, channels // 2, **kit.kind)[:-1]
            channels //= 2
    net = Sequential(layers, norm=kit.batch_norm(channels), relu=ReLU(), avgpool=GlobalAvgPool(), flatten=Flatten(),
                     classifier=kit.linear(channels, num_classes))
    init.initialize(net, init.he_normal, kit.rng)
    return net


@dataclass(frozen=True)
class Network:
    """A row of the comparison.

    Attributes
    ----------
    label
        Name in pictures.
    family
        A key of `FAMILIES`, which decides the colour.
    source
        Paper.
    what
        What differs from the paper's network, or what there is to see.
    make
        ``make(in_channels, num_classes, input_size, rng)`` gives the network.
    lr
        Peak learning rate of AdamW; deep networks without normalisation take less.
    smallest
        Smaller images are enlarged to this size.
    """

    label: str
    family: str
    source: str
    what: str
    make: Callable[[int, int, Size, Any], Layer]
    lr: float = 2e-3
    smallest: int = 16


def _sized(function: Callable[..., Layer], **options: Any) -> Callable[[int, int, Size, Any], Layer]:
    """Networks whose weights depend on the size of the image."""
    return lambda channels, classes, size, rng: function(channels, classes, size, rng=rng, **options)


def _any_size(function: Callable[..., Layer], **options: Any) -> Callable[[int, int, Size, Any], Layer]:
    return lambda channels, classes, size, rng: function(
        in_channels=channels, num_classes=classes, ndim=len(size), rng=rng, **options)


FAMILIES = {
    "fully connected": "#8a919c", "LeNet": "#3b82d6", "stacked": "#e08a2c", "inception": "#3a9d5d",
    "residual": "#d2504b", "dense": "#8b5fc7",
}
"""Kinds of networks and their colours, which show on light and on dark."""

NETWORKS: dict[str, Network] = {
    "logistic_regression": Network(
        "Logistic regression", "fully connected", "Cox 1958", "one linear layer on the pixels",
        _sized(models.logistic_regression), smallest=1),
    "mlp": Network(
        "MLP", "fully connected", "Rumelhart et al. 1986", "one hidden layer of 128 units", _sized(models.mlp),
        smallest=1),
    "lenet5_1998": Network(
        "LeNet-5 (1998)", "LeNet", "LeCun et al. 1998",
        "scaled tanh, trained subsampling, sparse C3, distances to codes", _sized(models.lenet5, variant="paper"),
        smallest=28),
    "lenet5": Network(
        "LeNet-5 (modern)", "LeNet", "LeCun et al. 1998", "ReLU, max pools, a linear output", _sized(models.lenet5),
        smallest=28),
    "alexnet": Network(
        "AlexNet", "stacked", "Krizhevsky et al. 2012", "1/4 of the channels, images enlarged to 64 pixels",
        _any_size(models.alexnet, width=0.25, pool_size=1), lr=5e-4, smallest=64),
    "nin": Network(
        "NIN", "stacked", "Lin et al. 2014", "1/4 of the channels, of which dropout takes 20% instead of 50%",
        _any_size(models.nin, width=0.25, dropout=0.2)),
    "vgg11": Network(
        "VGG-11", "stacked", "Simonyan & Zisserman 2015", "1/4 of the channels, images enlarged to 32 pixels",
        _any_size(models.vgg11, width=0.25, pool_size=1), lr=5e-4, smallest=32),
    "googlenet_naive": Network(
        "GoogLeNet (naive)", "inception", "Szegedy et al. 2015",
        "1/8 of the channels, one 3x3 convolution before the modules, which are those of figure 2a",
        _any_size(googlenet_small, width=0.125, reduced=False), lr=5e-4),
    "googlenet": Network(
        "GoogLeNet", "inception", "Szegedy et al. 2015", "the same with 1x1 reductions (figure 2b)",
        _any_size(googlenet_small, width=0.125), lr=1e-3),
    "googlenet_aux": Network(
        "GoogLeNet + heads", "inception", "Szegedy et al. 2015", "the same with two auxiliary classifiers in training",
        _any_size(googlenet_small, width=0.125, auxiliary=True), lr=1e-3),
    "plain20": Network(
        "Plain-20", "residual", "He et al. 2016", "ResNet-20 without its shortcuts",
        _any_size(models.resnet_small, width=0.5, residual=False)),
    "resnet20": Network(
        "ResNet-20", "residual", "He et al. 2016", "1/2 of the channels", _any_size(models.resnet_small, width=0.5)),
    "densenet22": Network(
        "DenseNet-BC-22", "dense", "Huang et al. 2017", "growth rate 8", _any_size(densenet_small)),
}
"""Every network of the comparison by the name that the command line knows."""


def input_size_of(network: Network, size: Size) -> Size:
    """The size to which images of `size` are enlarged for the network: at least `network.smallest` per axis."""
    return tuple(max(n, network.smallest) for n in size)


def build(name: str, in_channels: int, num_classes: int, size: Size, rng: np.random.Generator | int) -> Layer:
    """Make a network for images of `size`, which are to be enlarged to `input_size_of`."""
    network = NETWORKS[name]
    return network.make(in_channels, num_classes, input_size_of(network, size), rng)
