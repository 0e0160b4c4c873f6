"""Layers with weights, which inference packs once and keeps until a parameter is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastconv.arrays import Array
from fastconv.functional.activations import Spec
from fastconv.functional.prepared import Prepared
from fastconv.nn.layer import Layer, Parameter
from fastconv.nn.norm import _BatchNorm


class PreparedLayer(Layer):
    """Base of the layers with weights: convolutions in both directions and linear layers.

    Attributes
    ----------
    weight : Parameter
    bias : Parameter or None
        One value for each output channel.
    """

    weight: Parameter
    bias: Parameter | None
    out_channels: int
    _kept: tuple[Any, Prepared] | None = None

    def _prepare(self, weight: Array, bias: Array | None, activation: Spec) -> Prepared:
        """Fix the weights."""
        raise NotImplementedError

    def _scaled(self, scale: Array) -> Array:
        """The weights with each output channel times its `scale`."""
        raise NotImplementedError

    def prepared(self, norm: _BatchNorm | None = None, activation: Spec = None) -> Prepared:
        """The layer for inference, followed by `norm`, folded into the weights, and by `activation`."""
        bias = self.bias
        key = (self.weight.version, 0 if bias is None else bias.version, activation,
               None if norm is None else (norm, norm.eps, *(part.version for part in _parts(norm))))
        kept = self._kept
        if kept is None or kept[0] != key:
            weights = (self.weight.value, None if bias is None else bias.value)
            if norm is not None:
                weights = self._folded(norm)
            # One assignment of a whole tuple: threads that come at once build the same thing twice at worst.
            self._kept = kept = (key, self._prepare(*weights, activation))
        return kept[1]

    def _folded(self, norm: _BatchNorm) -> tuple[Array, Array]:
        """Weight and bias of ``norm(layer(x))``, in inference, computed in float64.

        ``(w x + b - mean) * scale + shift`` with ``scale = gamma / sqrt(var + eps)`` is
        ``(scale * w) x + (b - mean) * scale + shift``.
        """
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = 1 / np.sqrt(norm.running_var.value.astype(np.float64) + norm.eps)
        if norm.weight is not None:
            scale *= norm.weight.value
        shift = (0 if self.bias is None else self.bias.value) - norm.running_mean.value.astype(np.float64)
        shift *= scale
        if norm.bias is not None:
            shift += norm.bias.value
        dtype = self.weight.dtype
        return self._scaled(scale).astype(dtype), shift.astype(dtype)

    def folds(self, norm: Layer) -> bool:
        """Whether `norm` is a batch normalisation that inference can fold into this layer.

        The input must then have as many axes as the weight: without a batch, or with more axes before those of a
        linear layer, the second axis is not that of the output channels.
        """
        return (isinstance(norm, _BatchNorm) and type(norm).__call__ is _BatchNorm.__call__
                and len(self.weight.shape) in norm.ndims and norm.running_mean is not None
                and norm.num_features == self.out_channels and norm.running_mean.dtype == self.weight.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": None}


def _parts(norm: _BatchNorm) -> list[Any]:
    return [part for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if part is not None]
