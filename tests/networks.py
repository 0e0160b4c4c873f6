"""What the tests of networks share: the numbers of the papers' tables, networks made ready for comparison."""

import contextlib

import numpy as np
import pytest

from fastconv import nn

LARGE_NIN = [(11, 4, 0, 96, 96, 96), (5, 1, 2, 256, 256, 256), (3, 1, 1, 384, 384, 384), (3, 1, 1, 1024, 1024, 1000)]
SMALL_NIN = [(5, 1, 2, 192, 160, 96), (5, 1, 2, 192, 192, 192), (3, 1, 1, 192, 192, 10)]
VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
RESNET = {18: ((2, 2, 2, 2), (3, 3)), 34: ((3, 4, 6, 3), (3, 3)), 50: ((3, 4, 6, 3), (1, 3, 1)),
          101: ((3, 4, 23, 3), (1, 3, 1)), 152: ((3, 8, 36, 3), (1, 3, 1))}
DENSENET = {121: ((6, 12, 24, 16), 32, 64), 161: ((6, 12, 36, 24), 48, 96), 169: ((6, 12, 32, 32), 32, 64),
            201: ((6, 12, 48, 32), 32, 64)}
SMALL_RESNET = (3, 3, 3), (3, 3), (16, 32, 64), "small"


@contextlib.contextmanager
def zeros():
    """Networks of zeros: 100 million random numbers take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("_uniform", "_normal"):
            patch.setattr(nn.init, draw, lambda shape, scale, rng, dtype: np.zeros(shape, dtype))
        yield


def no_dropout(net):
    for _, layer in net.named_layers():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return net


def outputs_of(y):
    return y if isinstance(y, tuple) else (y,)
