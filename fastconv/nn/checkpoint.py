"""Activations for time: a layer whose forward pass runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastconv.nn import init
from fastconv.nn.basic import Dropout
from fastconv.nn.layer import Backward, Layer


class Checkpoint(Layer):
    """A layer that keeps its input alone, and computes what its backward pass needs again (Chen et al. 2016).

    Training takes one more forward pass of the layer, and the memory of one such layer at a time instead of all: wrap
    the stages of a network, for example. Output and gradients are the same bits: dropout draws the same masks again,
    and running statistics move once. Names of parameters are those of the layer without `Checkpoint`.

    Generators of dropout are set back for the time of the second pass. A layer of your own that draws random numbers
    elsewhere draws new ones, and its gradient would be that of another function.

    Parameters
    ----------
    layer : Layer
        Any layer; its input is an array or a tuple of arrays.

    References
    ----------
    Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016, arXiv:1604.06174.

    Examples
    --------
    >>> net = nn.Sequential(nn.Checkpoint(stage1), nn.Checkpoint(stage2), head)
    """

    def __init__(self, layer: Layer) -> None:
        if not isinstance(layer, Layer):
            raise TypeError(f"Checkpoint: layer is a {type(layer).__qualname__}, but a Layer is needed. "
                            "Hint: nn.Checkpoint(nn.Sequential(...))")
        self.layer = layer

    def forward(self, x: Any) -> tuple[Any, Backward]:
        """Run the layer and forget what its backward pass needs; see `Layer.forward`.

        `backward` raises RuntimeError if a parameter was written since.
        """
        layer = self.layer
        states = [generator.bit_generator.state for generator in _generators(layer)]
        versions = [(name, parameter, parameter.version) for name, parameter in layer.named_parameters()]
        y, _ = layer.forward(x)

        def backward(dy: Any) -> Any:
            for name, parameter, version in versions:
                parameter.check_version(version, name)
            with _as_before(layer, states):
                _, step = layer.forward(x)
            return step(dy)

        return y, backward

    def __call__(self, x: Any) -> Any:
        """Run inference of the layer."""
        return self.layer(x)

    def named_layers(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """See `Layer.named_layers`; the layer inside has the name that it would have without this one."""
        yield prefix, self
        yield from self.layer.named_layers(prefix)


def _generators(layer: Layer) -> list[np.random.Generator]:
    """What the dropout inside draws from, each once."""
    found = {id(generator): generator for _, inner in layer.named_layers() if isinstance(inner, Dropout)
             for generator in [init.generator(inner.rng)]}
    return list(found.values())


@contextmanager
def _as_before(layer: Layer, states: list[Any]) -> Iterator[None]:
    """Context in which generators draw what they drew from `states` on; at its end all is as if nothing had run."""
    draws = _generators(layer)
    later = [generator.bit_generator.state for generator in draws]
    buffers = [(buffer, buffer.value.copy()) for _, buffer in layer.named_buffers()]
    for generator, state in zip(draws, states, strict=True):
        generator.bit_generator.state = state
    try:
        yield
    finally:
        for generator, state in zip(draws, later, strict=True):
            generator.bit_generator.state = state
        for buffer, value in buffers:
            buffer.assign(value)
