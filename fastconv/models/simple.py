"""Where a course begins: logistic regression and the multilayer perceptron."""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import DTypeLike

from fastconv.nn import init
from fastconv.nn.basic import Flatten, Linear, ReLU
from fastconv.nn.blocks import Rng
from fastconv.nn.combine import Sequential


def mlp(in_channels: int = 1, num_classes: int = 10, input_size: tuple[int, ...] = (28, 28),
        hidden: tuple[int, ...] = (128,), *, dtype: DTypeLike = np.float32, rng: Rng = None) -> Sequential:
    """Multilayer perceptron: linear layers with ReLU between them, on the pixels as one vector.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the input, number of outputs.
    input_size : tuple of int
        Spatial size of the input, which is fixed by the first weight.
    hidden : tuple of int
        Units of each hidden layer.
    dtype
        float32 or float64.
    rng : Generator, int or None
        Source of the initial weights (He et al. 2015).

    Returns
    -------
    Sequential
        From (N, in_channels, \\*input_size) to logits (N, num_classes).
    """
    rng = init.generator(rng)
    widths = (in_channels * math.prod(input_size), *hidden, num_classes)
    layers: dict[str, Linear | ReLU] = {}
    for number, (before, after) in enumerate(itertools.pairwise(widths), 1):
        if number > 1:
            layers[f"relu{number - 1}"] = ReLU()
        layers[f"fc{number}"] = Linear(before, after, dtype=dtype, rng=rng)
    net = Sequential({"flatten": Flatten()}, layers)
    init.initialize(net, init.he_normal, rng)
    return net


def logistic_regression(in_channels: int = 1, num_classes: int = 10, input_size: tuple[int, ...] = (28, 28), *,
                        dtype: DTypeLike = np.float32, rng: Rng = None) -> Sequential:
    """Multinomial logistic regression: one linear layer on the pixels, to be trained with `cross_entropy`.

    See `mlp`, of which it is the case without a hidden layer.
    """
    return mlp(in_channels, num_classes, input_size, (), dtype=dtype, rng=rng)
