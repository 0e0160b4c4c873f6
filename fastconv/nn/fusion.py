"""Inference through several layers at once: convolution, batch normalisation, residual sum and activation as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fastconv.arrays import Array
from fastconv.functional.activations import Spec, find_activation
from fastconv.nn.activation import activation_spec
from fastconv.nn.basic import Linear, ReLU
from fastconv.nn.conv import CONV, CONV_TRANSPOSE
from fastconv.nn.layer import Layer
from fastconv.nn.norm import BATCH_NORM, _BatchNorm
from fastconv.nn.prepared import PreparedLayer

# Layers of the user's own classes may do anything, so they run as they are.
_STARTS = frozenset({*CONV.values(), *CONV_TRANSPOSE.values(), Linear})


_TAKES_RELU = frozenset({*CONV.values(), *BATCH_NORM.values()})


def takes_relu(layer: Layer) -> bool:
    """Whether the training path of a layer can end in a ReLU."""
    return type(layer) in _TAKES_RELU and "forward" not in vars(layer)


def is_plain_relu(layer: Layer | None) -> bool:
    """Whether a layer is a ReLU that nobody has changed, so that another layer may do its work."""
    return type(layer) is ReLU and "forward" not in vars(layer)


class Stage(NamedTuple):
    """A layer alone, or one with weights and what is fused into it."""

    layer: Layer
    norm: _BatchNorm | None = None
    activation: Spec = None

    def __call__(self, x: Any) -> Any:
        """Run inference."""
        layer, norm, activation = self
        if norm is None and activation is None:
            return layer(x)
        assert isinstance(layer, PreparedLayer)
        if norm is not None and np.ndim(x) != len(layer.weight.shape):  # the norm's channels are another axis, or none
            y = norm(layer(x))
            find = find_activation("", activation)
            return y if find is None else find(y)
        return layer.prepared(norm, activation)(x)

    def add(self, x: Any, shortcut: Callable[[], Array], activation: Spec) -> Array | None:
        """``activation(stage(x) + shortcut())`` if that can be one, else None."""
        layer, norm, own = self
        if type(layer) not in _STARTS or own is not None:
            return None
        assert isinstance(layer, PreparedLayer)
        if norm is not None and np.ndim(x) != len(layer.weight.shape):
            return None
        try:
            return layer.prepared(norm, activation)(x, residual=shortcut())
        except (TypeError, ValueError):
            return None  # the unfused way says what is wrong


def stages(layers: Iterable[Layer]) -> Iterator[Stage]:
    """Layers that run one after the other, those that can be fused as one stage."""
    stage: Stage | None = None
    for layer in layers:
        if stage is not None:
            start, norm, _ = stage
            assert isinstance(start, PreparedLayer)
            if norm is None and start.folds(layer):
                assert isinstance(layer, _BatchNorm)
                stage = Stage(start, layer)
                continue
            activation = activation_spec(layer)
            if activation is not None:
                yield Stage(start, norm, activation)
                stage = None
                continue
            yield stage
        stage = Stage(layer) if type(layer) in _STARTS else None
        if stage is None:
            yield Stage(layer)
    if stage is not None:
        yield stage
