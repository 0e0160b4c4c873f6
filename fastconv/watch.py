"""Copies of networks to look into: they share the weights, so that they cost next to nothing, but nothing else."""

from __future__ import annotations

import copy
from typing import TypeVar

from fastconv.nn.basic import Dropout
from fastconv.nn.layer import Layer, Parameter
from fastconv.nn.norm import _BatchNorm

__all__ = ["inference_copy", "shared_copy"]

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
