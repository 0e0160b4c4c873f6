"""Convolutions and transposed convolutions in 1D, 2D and 3D."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array, Order, as_array, empty, empty_like
from fastconv.functional.activations import Spec
from fastconv.functional.conv import (
    conv,
    conv_bias_grad,
    conv_input_grad,
    conv_relu,
    conv_transpose,
    conv_transpose_input_grad,
    conv_transpose_weight_grad,
    conv_weight_grad,
)
from fastconv.functional.pointwise import relu_grad
from fastconv.functional.prepared import PreparedConv, PreparedConvTranspose, prepare_conv, prepare_conv_transpose
from fastconv.nn import init
from fastconv.nn.layer import Backward, Parameter, float_dtype, inherit_doc
from fastconv.nn.prepared import PreparedLayer
from fastconv.problem import conv_problem
from fastconv.problem.common import explicit_padding, integer, per_axis

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _ConvBase(PreparedLayer):
    """What convolutions and transposed convolutions share: checked settings, parameters, packed weights."""

    ndim: ClassVar[int]
    transposed: ClassVar[bool]

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], stride: Any,
                 padding: Any, dilation: Any, groups: int, bias: bool, padding_mode: str, dtype: DTypeLike,
                 rng: np.random.Generator | int | None) -> None:
        op = type(self).__name__
        rng, dtype = init.generator(rng), float_dtype(dtype)
        self.in_channels = integer(op, "in_channels", in_channels, 1)
        self.out_channels = integer(op, "out_channels", out_channels, 1)
        self.groups = integer(op, "groups", groups, 1)
        for name, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if channels % self.groups:
                raise ValueError(f"{op}: groups is {self.groups}, which does not divide {name} = {channels}: "
                                 f"{channels} / {self.groups} is no integer. Hint: groups=1 connects all channels")
        modes = _PADDING_MODES[:1] if self.transposed else _PADDING_MODES
        if padding_mode not in modes:
            raise ValueError(f"{op}: padding_mode is {padding_mode!r}, but one of {modes} is needed. "
                             "Hint: padding_mode='zeros'")
        self.kernel_size = per_axis(op, "kernel_size", kernel_size, self.ndim, 1)
        self.stride = per_axis(op, "stride", stride, self.ndim, 1)
        self.dilation = per_axis(op, "dilation", dilation, self.ndim, 1)
        explicit_padding(padding, self.kernel_size, self.kernel_size, self.stride, self.dilation, op)
        self.padding = (padding,) * self.ndim if isinstance(padding, int) else padding
        self.padding_mode = padding_mode
        near, far = ((self.in_channels, self.out_channels) if self.transposed
                     else (self.out_channels, self.in_channels))
        shape = (near, far // self.groups, *self.kernel_size)
        fan_in, _ = init.fans(shape)
        self.weight = Parameter(init.torch_default(shape, rng, dtype=dtype))
        self.bias = (Parameter(init.torch_default((self.out_channels,), rng, fan_in=fan_in, dtype=dtype)) if bias
                     else None)

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        ones, zeros = (1,) * self.ndim, (0,) * self.ndim
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        settings = vars(self) | {"bias": self.bias is not None}
        for name, usual in (("padding", zeros), ("output_padding", zeros), ("dilation", ones), ("groups", 1),
                            ("bias", True), ("padding_mode", "zeros")):
            value = settings.get(name, usual)
            if value != usual:
                text += f", {name}={value}"
        return text


class _Conv(_ConvBase):
    """Convolution (cross-correlation, as everywhere in deep learning) with trained weights.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of input and output.
    kernel_size : int or tuple of int
        Per axis.
    stride, dilation : int or tuple of int
        Per axis.
    padding : int, tuple or str
        See `fastconv.functional.conv`: numbers, pairs (before, behind) per axis, ``"same"`` (for any stride),
        ``"same_lower"`` or ``"valid"``.
    groups : int
        Divides both numbers of channels.
    bias : bool
        Whether there is a bias.
    padding_mode : str
        ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
    dtype
        float32 or float64.
    rng : Generator, int or None
        Source of the initial weights (`init.torch_default`).

    Attributes
    ----------
    weight : Parameter
        Shape (out_channels, in_channels / groups, \\*kernel_size).
    bias : Parameter or None
        Shape (out_channels,).

    Raises
    ------
    ValueError, TypeError
        For settings that no input could satisfy.
    """

    transposed = False
    input_grad = True
    """Whether `backward` computes the gradient of the input; without it gives None, for a layer that sees the data."""
    order: Order | None = None
    """Memory order of the output of `forward`; None keeps that of the input."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], stride: Any = 1,
                 padding: Any = 0, dilation: Any = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
                 *, dtype: DTypeLike = np.float32, rng: np.random.Generator | int | None = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         dtype, rng)

    def forward(self, x: Array, out: Array | None = None, relu: bool = False) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, in_channels, \\*spatial) or (in_channels, \\*spatial); see `Layer.forward`.

        The output is written into `out` if given, which may be a slice of a larger array. With `relu` max(., 0) is
        applied to it, in the same pass.
        """
        weight, bias, version, mode = self.weight, self.bias, self.weight.version, self.padding_mode
        x = as_array(x, "input", type(self).__name__)
        batched = x.ndim == self.ndim + 2
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if out is None and batched and self.order is not None and mode == "zeros":
            out = empty(conv_problem(x, weight.value, *geometry, ndim=self.ndim).y_shape, x.dtype, self.order,
                        like=x)
        run = conv_relu if relu else conv
        y = run(x, weight.value, bias.value if bias else None, *geometry, padding_mode=mode, out=out)

        def backward(dy: Array) -> Array | None:
            weight.check_version(version, "weight")
            if relu:
                dy = relu_grad(dy, y)
            if weight.requires_grad:
                weight.add_grad(conv_weight_grad(x, weight.shape, dy, *geometry, padding_mode=mode,
                                                 out=empty(weight.shape, weight.dtype, like=x)))
            if bias is not None and bias.requires_grad:
                bias.add_grad(conv_bias_grad(dy, batched=batched))
            if not self.input_grad:
                return None
            return conv_input_grad(x.shape, weight.value, dy, *geometry, padding_mode=mode,
                                   out=empty_like(x))

        return y, backward

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run inference, into `out` if given, with packed weights, which are kept until a parameter is written."""
        return self.prepared()(x, out=out)

    def _prepare(self, weight: Array, bias: Array | None, activation: Spec) -> PreparedConv:
        return prepare_conv(weight, bias, self.stride, self.padding, self.dilation, self.groups,
                            padding_mode=self.padding_mode, activation=activation)

    def _scaled(self, scale: Array) -> Array:
        return self.weight.value * scale.reshape(-1, *[1] * (self.ndim + 1))


@inherit_doc
class Conv1d(_Conv):
    """Convolution of (N, C, L)."""

    ndim = 1


@inherit_doc
class Conv2d(_Conv):
    """Convolution of (N, C, H, W)."""

    ndim = 2


@inherit_doc
class Conv3d(_Conv):
    """Convolution of (N, C, D, H, W)."""

    ndim = 3


class _ConvTranspose(_ConvBase):
    """Transposed convolution: the input gradient of a convolution as a layer, for upsampling (Zeiler et al. 2010).

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, groups, bias, dilation, dtype, rng
        As in the convolution of the same number of axes; `padding` crops the result.
    output_padding : int or tuple of int
        Elements added behind each axis of the result; less than stride or dilation.
    padding_mode : str
        ``"zeros"``, as in PyTorch.

    Attributes
    ----------
    weight : Parameter
        Shape (in_channels, out_channels / groups, \\*kernel_size).
    bias : Parameter or None
        Shape (out_channels,).

    Raises
    ------
    ValueError, TypeError
        For settings that no input could satisfy.
    """

    transposed = True

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...], stride: Any = 1,
                 padding: Any = 0, output_padding: Any = 0, groups: int = 1, bias: bool = True, dilation: Any = 1,
                 padding_mode: str = "zeros", *, dtype: DTypeLike = np.float32,
                 rng: np.random.Generator | int | None = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
                         dtype, rng)
        self.output_padding = per_axis(type(self).__name__, "output_padding", output_padding, self.ndim, 0)

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, in_channels, \\*spatial) or (in_channels, \\*spatial); see `Layer.forward`."""
        weight, bias, version = self.weight, self.bias, self.weight.version
        x = as_array(x, "input", type(self).__name__)
        batched = x.ndim == self.ndim + 2
        geometry = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        y = conv_transpose(x, weight.value, bias.value if bias else None, *geometry)

        def backward(dy: Array) -> Array:
            weight.check_version(version, "weight")
            if weight.requires_grad:
                weight.add_grad(conv_transpose_weight_grad(x, weight.shape, dy, *geometry,
                                                           out=empty(weight.shape, weight.dtype, like=x)))
            if bias is not None and bias.requires_grad:
                bias.add_grad(conv_bias_grad(dy, batched=batched))
            return conv_transpose_input_grad(dy, weight.value, *geometry, out=empty_like(x))

        return y, backward

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run inference, into `out` if given, with packed weights, which are kept until a parameter is written."""
        return self.prepared()(x, out=out)

    def _prepare(self, weight: Array, bias: Array | None, activation: Spec) -> PreparedConvTranspose:
        return prepare_conv_transpose(weight, bias, self.stride, self.padding, self.output_padding, self.groups,
                                      self.dilation, activation=activation)

    def _scaled(self, scale: Array) -> Array:
        weight = self.weight.value.reshape(self.groups, -1, *self.weight.shape[1:])
        scaled: Array = weight * scale.reshape(self.groups, 1, -1, *[1] * self.ndim)
        return scaled.reshape(self.weight.shape)


@inherit_doc
class ConvTranspose1d(_ConvTranspose):
    """Transposed convolution of (N, C, L)."""

    ndim = 1


@inherit_doc
class ConvTranspose2d(_ConvTranspose):
    """Transposed convolution of (N, C, H, W)."""

    ndim = 2


@inherit_doc
class ConvTranspose3d(_ConvTranspose):
    """Transposed convolution of (N, C, D, H, W)."""

    ndim = 3


CONV: dict[int, type[_Conv]] = {1: Conv1d, 2: Conv2d, 3: Conv3d}
"""The convolution for each number of spatial axes, for networks that work in any."""

CONV_TRANSPOSE: dict[int, type[_ConvTranspose]] = {1: ConvTranspose1d, 2: ConvTranspose2d, 3: ConvTranspose3d}
"""The transposed convolution for each number of spatial axes."""
