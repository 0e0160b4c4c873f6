"""Linear, activations, softmax, dropout, flatten and identity."""

from __future__ import annotations

import math
import operator
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array, as_array
from fastconv.backends import select
from fastconv.functional import pointwise
from fastconv.functional.activations import Spec
from fastconv.functional.conv import linear, linear_input_grad, linear_weight_grad
from fastconv.functional.prepared import PreparedLinear, prepare_linear
from fastconv.nn import init
from fastconv.nn.layer import Backward, Layer, Leaf, Parameter, allocator, float_dtype, inherit_doc
from fastconv.nn.prepared import PreparedLayer


class Linear(PreparedLayer):
    """``y = x @ weight.T + bias`` over the last axis; any leading axes.

    Parameters
    ----------
    in_features, out_features : int
        Length of the last axis of input and output.
    bias : bool
        Whether there is a bias.
    dtype
        float32 or float64.
    rng : Generator, int or None
        Source of the initial weights (`init.torch_default`).

    Attributes
    ----------
    weight : Parameter
        Shape (out_features, in_features).
    bias : Parameter or None
        Shape (out_features,).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, dtype: DTypeLike = np.float32,
                 rng: np.random.Generator | int | None = None) -> None:
        rng, dtype = init.generator(rng), float_dtype(dtype)
        self.in_features = operator.index(in_features)
        self.out_features = operator.index(out_features)
        if self.in_features < 1 or self.out_features < 1:
            raise ValueError(f"Linear: in_features is {in_features} and out_features is {out_features}, but both must "
                             "be at least 1. Hint: in_features is the length of the input's last axis")
        shape = (self.out_features, self.in_features)
        self.weight = Parameter(init.torch_default(shape, rng, dtype=dtype))
        self.bias = Parameter(init.torch_default(shape[:1], rng, fan_in=shape[1], dtype=dtype)) if bias else None

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of shape (..., in_features); see `Layer.forward`."""
        weight, bias, version = self.weight, self.bias, self.weight.version
        y = linear(x, weight.value, bias.value if bias else None)

        def backward(dy: Array) -> Array:
            weight.check_version(version, "weight")
            if weight.requires_grad:
                weight.add_grad(linear_weight_grad(x, dy))
            if bias is not None and bias.requires_grad:
                rows = dy.reshape(-1, dy.shape[-1])
                bias.add_grad(select.training("Linear", ("grad_output", dy)).channel_sums(rows))
            return linear_input_grad(dy, weight.value)

        return y, backward

    def __call__(self, x: Array) -> Array:
        """Run inference with packed weights, which are kept until a parameter is written."""
        return self.prepared()(x)

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        """`out_features`."""
        return self.out_features

    def _prepare(self, weight: Array, bias: Array | None, activation: Spec) -> PreparedLinear:
        return prepare_linear(weight, bias, activation=activation)

    def _scaled(self, scale: Array) -> Array:
        return self.weight.value * scale[:, None]

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, "
                f"bias={self.bias is not None}")


class ReLU(Leaf):
    """``max(x, 0)``; see `fastconv.functional.relu`."""

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape; see `Layer.forward`."""
        y = pointwise.relu(x)
        return y, lambda dy: pointwise.relu_grad(dy, y)


class LeakyReLU(Leaf):
    """``x if x > 0 else negative_slope * x``; see `fastconv.functional.leaky_relu`.

    Parameters
    ----------
    negative_slope : float
        Slope left of zero.
    """

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape; see `Layer.forward`."""
        slope = self.negative_slope
        return pointwise.leaky_relu(x, slope), lambda dy: pointwise.leaky_relu_grad(dy, x, slope)

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return f"negative_slope={self.negative_slope}"


class Sigmoid(Leaf):
    """``1 / (1 + exp(-x))``; see `fastconv.functional.sigmoid`."""

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape; see `Layer.forward`."""
        y = pointwise.sigmoid(x)
        return y, lambda dy: pointwise.sigmoid_grad(dy, y)


class Tanh(Leaf):
    """Hyperbolic tangent; see `fastconv.functional.tanh`."""

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape; see `Layer.forward`."""
        y = pointwise.tanh(x)
        return y, lambda dy: pointwise.tanh_grad(dy, y)


class Softmax(Leaf):
    """Softmax along an axis. To train a classifier give logits to `cross_entropy` instead.

    Parameters
    ----------
    dim : int
        The axis along which outputs add up to one; 1 is that of the channels.
    """

    def __init__(self, dim: int = 1) -> None:
        self.dim = dim

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of any shape with an axis `dim`; see `Layer.forward`."""
        y, dim = pointwise.softmax(x, self.dim), self.dim
        return y, lambda dy: pointwise.softmax_grad(dy, y, dim)

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return f"dim={self.dim}"


class Dropout(Layer):
    """In training zero each element with probability `p` and scale the others by ``1 / (1 - p)``.

    Srivastava et al. 2014. Inference is the identity.

    Parameters
    ----------
    p : float
        Share of elements that are dropped.
    rng : Generator, int or None
        Source of the masks: an int seeds a generator of this layer; None is that of the process (`init.seed`).

    Raises
    ------
    ValueError
        If `p` is not a probability.
    """

    spatial_axes: ClassVar[int] = 0
    """Trailing axes that a mask does not see: whole channels are dropped."""

    def __init__(self, p: float = 0.5, *, rng: np.random.Generator | int | None = None) -> None:
        pointwise.dropout_mask((), p, np.random.default_rng(0))
        self.p = p
        self.rng = None if rng is None else init.generator(rng)

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run with a new mask; see `Layer.forward`."""
        x, p, axes = as_array(x, "input", type(self).__name__), self.p, self.spatial_axes
        if axes and x.ndim not in (axes + 1, axes + 2):
            raise ValueError(f"{type(self).__name__}: input has shape {x.shape}, but {axes + 2} axes (N, C, *spatial) "
                             f"or {axes + 1} without the batch are needed. Hint: Dropout takes any shape")
        shape = x.shape[:x.ndim - axes] + (1,) * axes
        mask = np.asarray(pointwise.dropout_mask(shape, p, init.generator(self.rng)), like=x)  # drawn on the CPU
        return pointwise.dropout(x, p, mask), lambda dy: pointwise.dropout(dy, p, mask)

    def __call__(self, x: Array) -> Array:
        """Return `x` itself."""
        return x

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return f"p={self.p}"


@inherit_doc
class Dropout1d(Dropout):
    """`Dropout` of whole channels of (N, C, L) (Tompson et al. 2015)."""

    spatial_axes = 1


@inherit_doc
class Dropout2d(Dropout):
    """`Dropout` of whole channels of (N, C, H, W) (Tompson et al. 2015)."""

    spatial_axes = 2


@inherit_doc
class Dropout3d(Dropout):
    """`Dropout` of whole channels of (N, C, D, H, W) (Tompson et al. 2015)."""

    spatial_axes = 3


DROPOUT: dict[int, type[Dropout]] = {1: Dropout1d, 2: Dropout2d, 3: Dropout3d}
"""Dropout of whole channels for each number of spatial axes."""


class Flatten(Leaf):
    """Merge the axes from `start_dim` to `end_dim` into one, in logical (N, C, \\*spatial) order.

    A view of contiguous input, a copy of channels_last input; the gradient has the memory order of the input.

    Parameters
    ----------
    start_dim, end_dim : int
        First and last axis to merge.
    """

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` with the axes `start_dim` and `end_dim`; see `Layer.forward`."""
        x = as_array(x, "input", "Flatten")
        start = pointwise.check_axis(self.start_dim, x.ndim, "Flatten")
        end = pointwise.check_axis(self.end_dim, x.ndim, "Flatten")
        if start > end:
            raise ValueError(f"Flatten: start_dim={self.start_dim} comes after end_dim={self.end_dim} for an input of "
                             f"shape {x.shape}. Hint: Flatten() keeps the batch and merges the rest")
        shape, new_input = x.shape, allocator(x)
        flat = (*shape[:start], math.prod(shape[start:end + 1]), *shape[end + 1:])

        def backward(dy: Array) -> Array:
            dx = new_input()
            dx[...] = dy.reshape(shape)
            return dx

        return x.reshape(flat), backward

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Identity(Leaf):
    """The input as it is."""

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on anything; see `Layer.forward`."""
        return x, lambda dy: dy
