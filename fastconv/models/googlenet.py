"""GoogLeNet (Szegedy et al. 2015) in 1D, 2D and 3D."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array
from fastconv.nn import init
from fastconv.nn.basic import Flatten
from fastconv.nn.blocks import Kit, Rng, auxiliary_classifier, check_variant, conv_relu, inception, scaled, stem_window
from fastconv.nn.combine import Sequential
from fastconv.nn.layer import Backward, Layer
from fastconv.nn.losses import cross_entropy, heads_loss
from fastconv.nn.norm import LocalResponseNorm
from fastconv.nn.pool import GlobalAvgPool

AUXILIARY_WEIGHT = 0.3
"""Weight of the loss of each auxiliary classifier (section 5 of the paper)."""

# Table 1 of the paper: 1x1, (3x3 reduce, 3x3), (5x5 reduce, 5x5), pool projection.
INCEPTION: dict[str, tuple[int, tuple[int, int], tuple[int, int], int]] = {
    "3a": (64, (96, 128), (16, 32), 32),
    "3b": (128, (128, 192), (32, 96), 64),
    "4a": (192, (96, 208), (16, 48), 64),
    "4b": (160, (112, 224), (24, 64), 64),
    "4c": (128, (128, 256), (24, 64), 64),
    "4d": (112, (144, 288), (32, 64), 64),
    "4e": (256, (160, 320), (32, 128), 128),
    "5a": (256, (160, 320), (32, 128), 128),
    "5b": (384, (192, 384), (48, 128), 128),
}
# After these modules there is a max pool, an auxiliary classifier.
POOL_AFTER = {"3b": "maxpool3", "4e": "maxpool4"}
AUXILIARY_AFTER = {"4a": "aux1", "4d": "aux2"}


class WithHeads(Sequential):
    """A `Sequential` with further outputs in training: heads on hidden layers (Lee et al. 2015, Szegedy et al. 2015).

    ``forward`` gives ``(y, head1, head2, ...)``, and its `backward` takes a gradient, or None, for each. Called, it
    gives y alone. Without heads it is a `Sequential`.

    Parameters
    ----------
    layers : mapping of str to Layer
        The trunk.
    heads : mapping of str to (str, Layer)
        For each head its name, the name of the trunk's layer whose output it takes, and the layer.

    Raises
    ------
    ValueError
        If a head is on a layer that is not there, or has the name of one.
    """

    def __init__(self, layers: Mapping[str, Layer], heads: Mapping[str, tuple[str, Layer]]) -> None:
        super().__init__(layers)
        for name, (after, _) in heads.items():
            if after not in layers or name in layers:
                raise ValueError(f"WithHeads: head {name!r} is on the layer {after!r}, but the layers are "
                                 f"{', '.join(layers)}; a head needs one of them and another name. "
                                 "Hint: heads={'aux1': ('layer1', head)}")
        self.heads = dict(heads)

    def children(self) -> Iterator[tuple[str, Layer]]:
        """See `Layer.children`."""
        yield from super().children()
        yield from ((name, head) for name, (_, head) in self.heads.items())

    def forward(self, x: Any) -> tuple[Any, Backward]:
        """Run the trunk and the heads; see `Layer.forward` and the class."""
        if not self.heads:
            return super().forward(x)
        steps: list[tuple[str, Backward]] = []
        outputs: dict[str, Array] = {}
        for name, layer in self._layers.items():
            x, step = layer.forward(x)
            steps.append((name, step))
            for head, (after, head_layer) in self.heads.items():
                if after == name:
                    outputs[head], step = head_layer.forward(x)
                    steps.append((head, step))

        def backward(dys: tuple[Array | None, ...]) -> Array | None:
            dy, gradients = dys[0], dict(zip(self.heads, dys[1:], strict=True))
            for name, step in reversed(steps):
                if name not in gradients:
                    dy = None if dy is None else step(dy)
                elif gradients[name] is not None:
                    gradient = step(gradients[name])
                    dy = gradient if dy is None else dy + gradient
            return dy

        return (x, *(outputs[name] for name in self.heads)), backward


def googlenet(in_channels: int = 3, num_classes: int = 1000, *, variant: str = "paper", stem: str = "large",
              auxiliary: bool = False, width: float = 1.0, dropout: float = 0.4, ndim: int = 2,
              dtype: DTypeLike = np.float32, rng: Rng = None) -> WithHeads:
    """GoogLeNet: nine inception modules.

    ==================  ===================================================  ===========
    layer               what (table 1 of the paper)                          size of 224
    ==================  ===================================================  ===========
    conv1               7x7/2, 64; max pool 3/2; LRN                         112, 56
    conv2, conv3        1x1, 64; 3x3, 192; LRN; max pool 3/2                 56, 28
    inception3a, 3b     256, 480 channels; max pool 3/2                      28, 14
    inception4a to 4e   512, 512, 512, 528, 832 channels; max pool 3/2       14, 7
    inception5a, 5b     832, 1024 channels                                   7
    avgpool, fc         global average pool, dropout, linear                 1
    aux1, aux2          auxiliary classifiers after 4a and 4d
    ==================  ===================================================  ===========

    6,998,552 parameters, 13,378,280 with both auxiliary classifiers; torchvision's 6,624,904 and 13,004,888.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    variant : str
        ``"paper"`` has biases and LRN; ``"torchvision"`` batch normalisation instead, 3x3 for 5x5, and a last max
        pool of 2.
    stem : str
        ``"large"`` as in the table; ``"small"`` is a 3x3 convolution with stride 1, without the pool and the LRN behind
        it, for images of about 32 pixels.
    auxiliary : bool
        Whether ``forward`` also gives the logits of the two auxiliary classifiers, for `googlenet_loss`. The paper's
        need images of 223 to 270 pixels, 56 to 67 behind a small stem.
    width : float
        Factor for the channels of all layers.
    dropout : float
        Share of the units before the last layer.
    ndim : int
        Number of spatial axes.
    dtype, rng
        As in the layers of `fastconv.nn`.

    Returns
    -------
    WithHeads
        From (N, in_channels, \\*spatial) to logits (N, num_classes); with `auxiliary` ``forward`` gives
        (logits, aux1, aux2).

    Raises
    ------
    ValueError
        For an unknown variant, stem or `ndim`.
    """
    first_window = stem_window("googlenet", stem)
    kit = Kit(ndim, dtype, rng)
    torchvision = check_variant("googlenet", variant) == "torchvision"
    unit: Any = {"batch_norm": torchvision, **kit.kind}
    first, reduced, channels = (scaled(c, width) for c in (64, 64, 192))

    def norm(name: str) -> dict[str, Layer]:
        # The paper says where, not with which constants; these are those of Caffe's published GoogLeNet.
        return {} if torchvision else {name: LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)}

    layers: dict[str, Layer] = {
        "conv1": conv_relu(in_channels, first, **first_window, **unit),
        **({"maxpool1": kit.max_pool(3, 2, ceil_mode=True), **norm("norm1")} if stem == "large" else {}),
        "conv2": conv_relu(first, reduced, 1, **unit),
        "conv3": conv_relu(reduced, channels, 3, padding=1, **unit), **norm("norm2"),
        "maxpool2": kit.max_pool(3, 2, ceil_mode=True)}
    heads: dict[str, tuple[str, Layer]] = {}
    for name, (c1, c3, c5, pool) in INCEPTION.items():
        c1, pool = scaled(c1, width), scaled(pool, width)
        c3, c5 = ((scaled(reduced, width), scaled(full, width)) for reduced, full in (c3, c5))
        layers[f"inception{name}"] = inception(channels, c1, c3, c5, pool, variant=variant, **kit.kind)
        channels = c1 + c3[1] + c5[1] + pool
        if auxiliary and name in AUXILIARY_AFTER:
            heads[AUXILIARY_AFTER[name]] = (f"inception{name}", auxiliary_classifier(
                channels, num_classes, width=width, variant=variant, **kit.kind))
        if name in POOL_AFTER:
            window = 2 if torchvision and POOL_AFTER[name] == "maxpool4" else 3
            layers[POOL_AFTER[name]] = kit.max_pool(window, 2, ceil_mode=True)
    layers |= {"avgpool": GlobalAvgPool(), "flatten": Flatten(), "dropout": kit.dropout(dropout),
               "fc": kit.linear(channels, num_classes)}
    net = WithHeads(layers, heads)
    init.initialize(net, init.he_normal, kit.rng)
    return net


def googlenet_loss(outputs: Array | tuple[Array, ...], target: Array, *, weight: float = AUXILIARY_WEIGHT,
                   **options: Any) -> tuple[Any, Any]:
    """Cross-entropy of the logits plus `weight` times that of each auxiliary classifier (section 5 of the paper).

    Parameters
    ----------
    outputs : ndarray or tuple of ndarray
        What the network's ``forward`` gives: logits, or (logits, aux1, aux2), each (N, num_classes).
    target, **options
        See `cross_entropy`.
    weight : float
        Of each auxiliary loss.

    Returns
    -------
    loss : float
    gradients
        As `outputs`, for the network's `backward`.
    """
    return heads_loss(outputs, target, weight, partial(cross_entropy, **options))
