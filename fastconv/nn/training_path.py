"""What the training path of a network need not do, or does better another way: settings of its first layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastconv.nn.checkpoint import Checkpoint
from fastconv.nn.combine import Branches, Sequential
from fastconv.nn.conv import _Conv
from fastconv.nn.layer import Layer


def first_layers(model: Layer) -> Iterator[Any]:
    """Yield the convolutions that see nothing but the input of `model`, each once."""
    names = [id(layer) for _, layer in model.named_layers()]
    yield from (layer for layer in _first(model) if names.count(id(layer)) == 1)  # not one that comes again later


def _first(model: Layer) -> Iterator[_Conv]:
    if isinstance(model, Sequential):
        if len(model):
            yield from _first(model[0])
    elif isinstance(model, Branches):
        for branch in model:
            yield from _first(branch)
    elif isinstance(model, Checkpoint):
        yield from _first(model.layer)
    elif isinstance(model, _Conv):
        yield model


def skip_input_gradients(model: Layer, skip: bool = True) -> None:
    """Spare the layers that see the data the gradient of their input: `backward` of the network then gives None.

    It can cost more than all the rest: a large kernel over few channels at the full size of the image. `fit` does this
    for the time of its steps.

    Parameters
    ----------
    model : Layer
        A network whose input is data.
    skip : bool
        False computes the gradient again, for example for maps of saliency.
    """
    for layer in first_layers(model):
        layer.input_grad = not skip


def use_channels_last(model: Layer, on: bool = True) -> None:
    """Let layers that see images of one channel give channels_last output, which most of the network is faster with.

    An image of one channel has no memory order that outputs could keep; images of several channels are converted by
    `fastconv.to_channels_last`, and everything behind keeps their order.

    Parameters
    ----------
    model : Layer
        A network whose input has one channel; others are left as they are.
    on : bool
        False takes it back.
    """
    for layer in first_layers(model):
        if layer.in_channels == 1:
            layer.order = "channels_last" if on else None
