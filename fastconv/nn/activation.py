"""Activation layers beyond those of `basic`, and what a convolution can end with."""

from __future__ import annotations

from collections.abc import Callable

from fastconv.arrays import Array, as_array
from fastconv.functional import activations
from fastconv.functional.activations import Spec
from fastconv.nn.basic import LeakyReLU, ReLU, Sigmoid, Tanh
from fastconv.nn.layer import Backward, Layer, Leaf


class _OfInput(Leaf):
    """An activation whose gradient is computed from the input."""

    @staticmethod
    def _function(x: Array, /) -> Array:
        raise NotImplementedError

    @staticmethod
    def _gradient(dy: Array, x: Array, /) -> Array:
        raise NotImplementedError

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape; see `Layer.forward`."""
        x = as_array(x, "input", type(self).__name__)
        return self._function(x), lambda dy: self._gradient(dy, x)


class ReLU6(_OfInput):
    """``min(max(x, 0), 6)``; see `fastconv.functional.relu6`."""

    _function = staticmethod(activations.relu6)
    _gradient = staticmethod(activations.relu6_grad)


class SiLU(_OfInput):
    """``x * sigmoid(x)``; see `fastconv.functional.silu`."""

    _function = staticmethod(activations.silu)
    _gradient = staticmethod(activations.silu_grad)


class Hardsigmoid(_OfInput):
    """``min(max(x + 3, 0), 6) / 6``; see `fastconv.functional.hardsigmoid`."""

    _function = staticmethod(activations.hardsigmoid)
    _gradient = staticmethod(activations.hardsigmoid_grad)


class Hardswish(_OfInput):
    """``x * hardsigmoid(x)``; see `fastconv.functional.hardswish`."""

    _function = staticmethod(activations.hardswish)
    _gradient = staticmethod(activations.hardswish_grad)


class ELU(Leaf):
    """``x if x > 0 else alpha * (exp(x) - 1)``; see `fastconv.functional.elu`.

    Parameters
    ----------
    alpha : float
        Minus the limit on the left.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape; see `Layer.forward`."""
        alpha = self.alpha
        return activations.elu(x, alpha), lambda dy: activations.elu_grad(dy, x, alpha)

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return f"alpha={self.alpha}"


class GELU(Leaf):
    """x times the normal distribution function; see `fastconv.functional.gelu`.

    Parameters
    ----------
    approximate : str
        ``"none"`` or ``"tanh"``.
    """

    def __init__(self, approximate: str = "none") -> None:
        self.approximate = approximate

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape; see `Layer.forward`."""
        kind = self.approximate
        return activations.gelu(x, kind), lambda dy: activations.gelu_grad(dy, x, kind)

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return f"approximate={self.approximate!r}"


_SPECS: dict[type[Layer], Callable[..., Spec]] = {
    ReLU: lambda layer: "relu",
    ReLU6: lambda layer: "relu6",
    LeakyReLU: lambda layer: ("leaky_relu", layer.negative_slope),
    ELU: lambda layer: ("elu", layer.alpha),
    Sigmoid: lambda layer: "sigmoid",
    Tanh: lambda layer: "tanh",
    SiLU: lambda layer: "silu",
    Hardsigmoid: lambda layer: "hardsigmoid",
    Hardswish: lambda layer: "hardswish",
    GELU: lambda layer: {"none": "gelu", "tanh": "gelu_tanh"}.get(layer.approximate),
}


def activation_spec(layer: Layer) -> Spec:
    """What `prepare_conv` calls the activation `layer`; None if it is none, or of a class of the user's own."""
    spec = _SPECS.get(type(layer))
    return None if spec is None else spec(layer)
