"""Looking into networks: copies that share the weights and nothing else, and what single layers give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastconv.arrays import Array
from fastconv.nn.basic import Dropout
from fastconv.nn.layer import Backward, Layer, Parameter
from fastconv.nn.norm import _BatchNorm

__all__ = ["inference_copy", "layer_outputs", "shared_copy", "watch"]

L = TypeVar("L", bound=Layer)


def shared_copy(model: L, requires_grad: bool = True) -> L:
    """Copy a network, but not the values of its parameters.

    Parameters
    ----------
    model : Layer
        Any network.
    requires_grad : bool
        False freezes the copy's parameters.

    Returns
    -------
    Layer
        Its parameters read the same memory, with gradients of their own; buffers, such as running statistics, and
        random generators are copies.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = shared = _share(parameter)
        shared.grad = None
        shared.requires_grad = requires_grad and parameter.requires_grad
    return copy.deepcopy(model, memo)


def inference_copy(model: L) -> L:
    """Copy a network so that ``forward`` computes what calling it does, and gives the gradient of that.

    Dropout drops nothing, batch normalisation takes its running statistics, parameters are frozen. Layers of your own
    that behave differently in training do so in the copy too.
    """
    result = shared_copy(model, requires_grad=False)
    for _, layer in result.named_layers():
        if isinstance(layer, Dropout):
            layer.p = 0.0
        elif isinstance(layer, _BatchNorm) and layer.track_running_stats:
            layer.frozen = True
    return result


def _share(parameter: Parameter) -> Parameter:
    return copy.copy(parameter)  # slots are copied one by one: the array is the same object


def layer_outputs(model: Layer, x: Any, names: Iterable[str]) -> dict[str, Array]:
    """Run a network as inference does, and return what some of its layers give: feature maps.

    Parameters
    ----------
    model : Layer
        Any network; it is not changed.
    x : ndarray
        Batch (N, C, \\*spatial), or what the network takes instead.
    names : iterable of str
        Names of layers, as in ``model.named_layers()``.

    Returns
    -------
    dict of str to ndarray
        Of each layer the output of its last call.

    Raises
    ------
    ValueError
        If the network has no such layer.

    Examples
    --------
    >>> maps = layer_outputs(net, images[:1], ["relu", "layer1", "layer2.0.conv1"])
    """
    copied = inference_copy(model)
    outputs: dict[str, Array] = {}

    def keep(name: str) -> Callable[[Any, Backward], Backward]:
        def seen(y: Any, backward: Backward) -> Backward:
            outputs[name] = y
            return backward

        return seen

    for name in names:
        watch(copied, name, keep(name), "layer_outputs")
    copied.forward(x)
    return outputs


def watch(model: Layer, name: str, seen: Callable[[Any, Backward], Backward], op: str) -> None:
    """Have ``seen(y, backward)`` called with what ``forward`` of one layer gives; it returns the backward to use.

    For a copy of a network, which stays changed. Raises ValueError if there is no such layer.
    """
    layers = dict(model.named_layers())
    if name not in layers:
        raise ValueError(f"{op}: layer is {name!r}, which the network does not have. Hint: its layers are "
                         f"{', '.join(list(layers)[1:8])}, ...; see model.named_layers()")
    forward = layers[name].forward

    def watched(*args: Any) -> tuple[Any, Backward]:
        y, backward = forward(*args)
        return y, seen(y, backward)

    vars(layers[name])["forward"] = watched  # found before the method of the class
