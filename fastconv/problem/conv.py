"""Convolutions: `ConvProblem` and its builders, one for each public function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from fastconv.arrays import Order, order_of
from fastconv.problem.common import (
    AXIS_NAMES,
    CACHE,
    MAX_PARAMETER,
    Axes,
    Shaped,
    Spec,
    Strides,
    check_bytes,
    check_dtypes,
    check_ndim,
    check_rank,
    elements,
    explicit_padding,
    frozen,
    integer,
    lead,
    per_axis,
    result_strides,
    size,
    spec,
)


@dataclass(frozen=True, eq=True)
class ConvProblem:
    """A convolution in any of its passes; see the table of words in docs/architecture.md.

    `x` is the input of the convolution, `w` its weight and `y` its output, whichever of them is computed:

        y[n, k, o] = sum over c, t of w[k, c, t] * x[n, c, o * stride + t * dilation - pad_lo]

    with zeros where the index leaves `x`. A transposed convolution is the input gradient of this problem, with its
    own input as `dy`.

    Attributes
    ----------
    ndim
        Number of spatial axes that the caller sees, 1 to 3.
    in_size, out_size, kernel, stride, dilation, pad_lo, pad_hi
        Three numbers each; leading ones (zeros for padding) below 3D. `out_size` is given, not derived: in a
        transposed convolution with output padding >= stride it is smaller than the formula allows.
    dtype
        "float32" or "float64".
    x_strides, w_strides, y_strides
        Strides in elements of (N, C, D, H, W), (K, C / groups, kD, kH, kW) and (N, K, D, H, W); 0 for the axes
        that the caller does not see. The result has them too: those of ``out=`` or of the array to be allocated.
    order
        Memory order of the result if fastconv allocates it: the order of the input.
    """

    ndim: int
    batch: int
    in_channels: int
    out_channels: int
    groups: int
    in_size: Axes
    kernel: Axes
    out_size: Axes
    stride: Axes
    dilation: Axes
    pad_lo: Axes
    pad_hi: Axes
    dtype: str
    x_strides: Strides
    w_strides: Strides
    y_strides: Strides
    order: Order

    @cached_property
    def _hash(self) -> int:
        return hash((self.batch, self.in_channels, self.out_channels, self.groups, self.in_size, self.kernel,
                     self.stride, self.dilation, self.pad_lo, self.dtype, self.x_strides, self.y_strides))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def x_shape(self) -> tuple[int, ...]:
        """(N, C, \\*in_size) as the caller sees it."""
        return (self.batch, self.in_channels, *self.in_size[3 - self.ndim:])

    @cached_property
    def w_shape(self) -> tuple[int, ...]:
        """(K, C / groups, \\*kernel) as the caller sees it."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel[3 - self.ndim:])

    @cached_property
    def y_shape(self) -> tuple[int, ...]:
        """(N, K, \\*out_size) as the caller sees it."""
        return (self.batch, self.out_channels, *self.out_size[3 - self.ndim:])

    @cached_property
    def taps(self) -> int:
        """Number of kernel positions."""
        return math.prod(self.kernel)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one pass, padded zeros included; the same for all three passes."""
        return (self.batch * self.out_channels * math.prod(self.out_size)
                * (self.in_channels // self.groups) * self.taps)


@dataclass(frozen=True)
class _Geometry:
    """Checked parameters of the spatial axes, at the caller's number of axes."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pad_lo: tuple[int, ...]
    pad_hi: tuple[int, ...]


def _weight_parts(op: str, w_shape: tuple[int, ...], ndim: int | None, groups: Any, *, transposed: bool = False,
                  name: str = "weight") -> tuple[int, int]:
    """Check the weight's shape and the groups; return the number of spatial axes and of groups."""
    if ndim is None:
        ndim = check_ndim(len(w_shape) - 2, op, name)
    wanted = "C, K/groups" if transposed else "K, C/groups"
    if len(w_shape) != ndim + 2:
        raise ValueError(f"{op}: {name} has shape {w_shape} with {len(w_shape)} axes, but {ndim + 2} are needed: "
                         f"({wanted}, {AXIS_NAMES[ndim]}). Hint: add a missing axis with {name}[None]")
    groups = integer(op, "groups", groups, 1)
    if min(w_shape) < 1:
        raise ValueError(f"{op}: {name} has shape {w_shape}, but every axis must be at least 1: ({wanted}, "
                         f"{AXIS_NAMES[ndim]}). Hint: a kernel of size 1 is the smallest")
    if max(w_shape[2:]) > MAX_PARAMETER:
        raise ValueError(f"{op}: {name} has shape {w_shape}, but a kernel of at most {MAX_PARAMETER} (2**31 - 1) "
                         "is supported. Hint: split the kernel")
    if w_shape[0] % groups:
        what = "input channels" if transposed else "filters"
        raise ValueError(f"{op}: groups is {groups}, which does not divide the {w_shape[0]} {what} of {name} with "
                         f"shape {w_shape}: {w_shape[0]} / {groups} is no integer. "
                         f"Hint: {w_shape[0]} = {what} per group * groups")
    return ndim, groups


def _geometry(op: str, in_size: tuple[int, ...], kernel: tuple[int, ...], stride: Any, padding: Any,
              dilation: Any) -> _Geometry:
    ndim = len(kernel)
    stride = per_axis(op, "stride", stride, ndim, 1)
    dilation = per_axis(op, "dilation", dilation, ndim, 1)
    pad_lo, pad_hi = explicit_padding(padding, in_size, kernel, stride, dilation, op)
    return _Geometry(kernel, stride, dilation, pad_lo, pad_hi)


def _out_size(op: str, in_size: tuple[int, ...], g: _Geometry) -> tuple[int, ...]:
    """floor((in + pad_lo + pad_hi - dilation * (kernel - 1) - 1) / stride) + 1 per axis, all at least 1."""
    if min(in_size) < 1:
        raise ValueError(f"{op}: input has spatial size {in_size}, but at least 1 is needed along every axis. "
                         "Hint: only the batch may be empty")
    out = []
    for n, k, s, d, lo, hi in zip(in_size, g.kernel, g.stride, g.dilation, g.pad_lo, g.pad_hi, strict=True):
        extent, padded = d * (k - 1) + 1, n + lo + hi
        if extent > padded:
            raise ValueError(f"{op}: the kernel covers dilation * (kernel - 1) + 1 = {d} * ({k} - 1) + 1 = {extent} "
                             f"elements, but the padded input has only {n} + {lo} + {hi} = {padded}. "
                             f"Hint: pad by {extent - padded} more, or use a smaller kernel")
        out.append((padded - extent) // s + 1)
    return tuple(out)


def _check_channels(op: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...], groups: int) -> None:
    channels, per_group = x_shape[1], w_shape[1]
    if per_group * groups == channels and channels > 0:
        return
    ratio = f"{channels} / {groups} = {channels / groups:g}"
    if x_shape[-1] == per_group * groups:
        hint = "input looks like (N, ..., C): use np.moveaxis(input, -1, 1), which is a free view"
    elif channels % groups:
        hint = f"groups must divide the input channels, and {channels} / {groups} is no integer"
    else:
        hint = f"give weight the shape {(w_shape[0], channels // groups, *w_shape[2:])}, or check groups"
    raise ValueError(f"{op}: weight has {per_group} input channels per group, but input has {channels} channels and "
                     f"groups={groups}: {ratio} is needed. Hint: {hint}")


def _conv(op: str, g: _Geometry, groups: int, dtype: str, order: Order, x_shape: tuple[int, ...],
          w_shape: tuple[int, ...], y_shape: tuple[int, ...], x_strides: Strides, w_strides: Strides,
          y_strides: Strides) -> ConvProblem:
    for name, shape in (("input", x_shape), ("weight", w_shape), ("output", y_shape)):
        check_bytes(op, name, shape, dtype)
    return ConvProblem(
        ndim=len(g.kernel), batch=x_shape[0], in_channels=x_shape[1], out_channels=w_shape[0], groups=groups,
        in_size=lead(x_shape[2:], 1), kernel=lead(g.kernel, 1), out_size=lead(y_shape[2:], 1),
        stride=lead(g.stride, 1), dilation=lead(g.dilation, 1), pad_lo=lead(g.pad_lo, 0),
        pad_hi=lead(g.pad_hi, 0), dtype=dtype, x_strides=x_strides, w_strides=w_strides, y_strides=y_strides,
        order=order)


def conv_problem(x: Shaped, w: Shaped, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: Any = 1, *,
                 out: Shaped | None = None, ndim: int | None = None, op: str = "conv") -> ConvProblem:
    """Describe ``y = conv(x, w)``.

    Parameters
    ----------
    x, w
        Batched input (N, C, \\*spatial) and weight (K, C / groups, \\*kernel). Only ``shape``, ``strides`` and
        ``dtype`` are read.
    stride, dilation
        An integer or one per spatial axis, >= 1.
    padding
        See `explicit_padding`.
    groups
        Divides C and K.
    out
        The array for the result, if the caller has one; `arrays.check_out` checks its shape.
    ndim
        Number of spatial axes; that of `w` if None.
    op
        Name of the public function, for errors.

    Raises
    ------
    TypeError, ValueError
        With the argument, its value, the rule and a hint.
    """
    return _forward(op, ndim, spec(x), spec(w), None if out is None else out.strides, frozen(stride),
                    frozen(padding), frozen(dilation), frozen(groups))


@lru_cache(CACHE)
def _forward(op: str, ndim: int | None, x: Spec, w: Spec, out: tuple[int, ...] | None, stride: Any, padding: Any,
             dilation: Any, groups: Any) -> ConvProblem:
    (x_shape, x_strides, dtype), w_shape = x, w[0]
    ndim, groups = _weight_parts(op, w_shape, ndim, groups)
    check_rank(op, "input", x_shape, ndim)
    check_dtypes(op, "input", x, "weight", w)
    _check_channels(op, x_shape, w_shape, groups)
    g = _geometry(op, x_shape[2:], w_shape[2:], stride, padding, dilation)
    y_shape = (x_shape[0], w_shape[0], *_out_size(op, x_shape[2:], g))
    order = order_of(x_shape, x_strides)
    return _conv(op, g, groups, dtype, order, x_shape, w_shape, y_shape, elements(op, "input", x),
                 elements(op, "weight", w), result_strides(op, y_shape, dtype, order, out))


def conv_input_grad_problem(input_size: Sequence[int], w: Shaped, dy: Shaped, stride: Any = 1, padding: Any = 0,
                            dilation: Any = 1, groups: Any = 1, *, out: Shaped | None = None,
                            ndim: int | None = None, op: str = "conv_input_grad") -> ConvProblem:
    """Describe the gradient dx of shape `input_size` (N, C, \\*spatial) of ``y = conv(x, w)``, from `dy`.

    Other parameters and errors as in `conv_problem`; `dy` must have the shape of y.
    """
    return _input_grad(op, ndim, frozen(input_size), spec(w), spec(dy), None if out is None else out.strides,
                       frozen(stride), frozen(padding), frozen(dilation), frozen(groups))


@lru_cache(CACHE)
def _input_grad(op: str, ndim: int | None, input_size: Any, w: Spec, dy: Spec, out: tuple[int, ...] | None,
                stride: Any, padding: Any, dilation: Any, groups: Any) -> ConvProblem:
    w_shape, (dy_shape, dy_strides, dtype) = w[0], dy
    ndim, groups = _weight_parts(op, w_shape, ndim, groups)
    x_shape = size(op, "input_size", input_size)
    check_rank(op, "input_size", x_shape, ndim)
    check_rank(op, "grad_output", dy_shape, ndim)
    check_dtypes(op, "weight", w, "grad_output", dy)
    _check_channels(op, x_shape, w_shape, groups)
    g = _geometry(op, x_shape[2:], w_shape[2:], stride, padding, dilation)
    _check_grad_shape(op, dy_shape, (x_shape[0], w_shape[0], *_out_size(op, x_shape[2:], g)))
    order = order_of(dy_shape, dy_strides)
    return _conv(op, g, groups, dtype, order, x_shape, w_shape, dy_shape,
                 result_strides(op, x_shape, dtype, order, out), elements(op, "weight", w),
                 elements(op, "grad_output", dy))


def conv_weight_grad_problem(x: Shaped, weight_size: Sequence[int], dy: Shaped, stride: Any = 1, padding: Any = 0,
                             dilation: Any = 1, groups: Any = 1, *, out: Shaped | None = None,
                             ndim: int | None = None, op: str = "conv_weight_grad") -> ConvProblem:
    """Describe the gradient dw of shape `weight_size` (K, C / groups, \\*kernel) of ``y = conv(x, w)``, from `dy`.

    Other parameters and errors as in `conv_problem`; `dy` must have the shape of y.
    """
    return _weight_grad(op, ndim, spec(x), frozen(weight_size), spec(dy), None if out is None else out.strides,
                        frozen(stride), frozen(padding), frozen(dilation), frozen(groups))


@lru_cache(CACHE)
def _weight_grad(op: str, ndim: int | None, x: Spec, weight_size: Any, dy: Spec, out: tuple[int, ...] | None,
                 stride: Any, padding: Any, dilation: Any, groups: Any) -> ConvProblem:
    (x_shape, x_strides, dtype), dy_shape = x, dy[0]
    w_shape = size(op, "weight_size", weight_size)
    ndim, groups = _weight_parts(op, w_shape, ndim, groups, name="weight_size")
    check_rank(op, "input", x_shape, ndim)
    check_rank(op, "grad_output", dy_shape, ndim)
    check_dtypes(op, "input", x, "grad_output", dy)
    _check_channels(op, x_shape, w_shape, groups)
    g = _geometry(op, x_shape[2:], w_shape[2:], stride, padding, dilation)
    _check_grad_shape(op, dy_shape, (x_shape[0], w_shape[0], *_out_size(op, x_shape[2:], g)))
    order = order_of(x_shape, x_strides)
    return _conv(op, g, groups, dtype, order, x_shape, w_shape, dy_shape, elements(op, "input", x),
                 result_strides(op, w_shape, dtype, order, out), elements(op, "grad_output", dy))


def _check_grad_shape(op: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if given != wanted:
        raise ValueError(f"{op}: grad_output has shape {given}, but the output has shape {wanted}; both must be the "
                         "same. Hint: pass the stride, padding and dilation of the forward pass")


def conv_transpose_problem(x: Shaped, w: Shaped, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
                           groups: Any = 1, dilation: Any = 1, *, out: Shaped | None = None,
                           ndim: int | None = None, op: str = "conv_transpose") -> ConvProblem:
    """Describe ``y = conv_transpose(x, w)`` as the input gradient of a convolution whose `dy` is x.

    Parameters
    ----------
    x, w
        Batched input (N, C, \\*spatial) and weight (C, K / groups, \\*kernel).
    padding
        Numbers or pairs: how much the result is cropped on each side.
    output_padding
        An integer or one per axis, less than stride or dilation: elements added behind each axis of the result.

    Returns
    -------
    ConvProblem
        With the result as its `x` and the caller's input as its `y`: the result's size is
        (in - 1) * stride - pad_lo - pad_hi + dilation * (kernel - 1) + output_padding + 1.

    Raises
    ------
    TypeError, ValueError
        With the argument, its value, the rule and a hint.
    """
    return _transpose(op, ndim, spec(x), spec(w), None if out is None else out.strides, frozen(stride),
                      frozen(padding), frozen(output_padding), frozen(groups), frozen(dilation))


@lru_cache(CACHE)
def _transpose(op: str, ndim: int | None, x: Spec, w: Spec, out: tuple[int, ...] | None, stride: Any, padding: Any,
               output_padding: Any, groups: Any, dilation: Any) -> ConvProblem:
    (x_shape, x_strides, dtype), w_shape = x, w[0]
    ndim, groups = _weight_parts(op, w_shape, ndim, groups, transposed=True)
    check_rank(op, "input", x_shape, ndim)
    check_dtypes(op, "input", x, "weight", w)
    _check_transposed_channels(op, x_shape, w_shape)
    g, extra = _transposed_geometry(op, w_shape[2:], stride, padding, output_padding, dilation)
    y_shape = (x_shape[0], w_shape[1] * groups, *_transposed_size(op, x_shape[2:], g, extra))
    order = order_of(x_shape, x_strides)
    return _conv(op, g, groups, dtype, order, y_shape, w_shape, x_shape,
                 result_strides(op, y_shape, dtype, order, out), elements(op, "weight", w), elements(op, "input", x))


def conv_transpose_input_grad_problem(dy: Shaped, w: Shaped, stride: Any = 1, padding: Any = 0,
                                      output_padding: Any = 0, groups: Any = 1, dilation: Any = 1, *,
                                      out: Shaped | None = None, ndim: int | None = None,
                                      op: str = "conv_transpose_input_grad") -> ConvProblem:
    """Describe the gradient of ``conv_transpose(x, w)`` for x: the convolution of `dy` (N, K, \\*spatial) with w.

    Parameters and errors as in `conv_transpose_problem`. In the result, `x` is dy and `y` the gradient.
    """
    return _transpose_input_grad(op, ndim, spec(dy), spec(w), None if out is None else out.strides, frozen(stride),
                                 frozen(padding), frozen(output_padding), frozen(groups), frozen(dilation))


@lru_cache(CACHE)
def _transpose_input_grad(op: str, ndim: int | None, dy: Spec, w: Spec, out: tuple[int, ...] | None, stride: Any,
                          padding: Any, output_padding: Any, groups: Any, dilation: Any) -> ConvProblem:
    (dy_shape, dy_strides, dtype), w_shape = dy, w[0]
    ndim, groups = _weight_parts(op, w_shape, ndim, groups, transposed=True)
    check_rank(op, "grad_output", dy_shape, ndim)
    check_dtypes(op, "weight", w, "grad_output", dy)
    g, extra = _transposed_geometry(op, w_shape[2:], stride, padding, output_padding, dilation)
    dx_shape = (dy_shape[0], w_shape[0], *_transposed_in_size(dy_shape[2:], g, extra))
    _check_grad_shape(op, dy_shape, (dy_shape[0], w_shape[1] * groups, *_transposed_size(op, dx_shape[2:], g, extra)))
    order = order_of(dy_shape, dy_strides)
    return _conv(op, g, groups, dtype, order, dy_shape, w_shape, dx_shape, elements(op, "grad_output", dy),
                 elements(op, "weight", w), result_strides(op, dx_shape, dtype, order, out))


def conv_transpose_weight_grad_problem(x: Shaped, weight_size: Sequence[int], dy: Shaped, stride: Any = 1,
                                       padding: Any = 0, output_padding: Any = 0, groups: Any = 1,
                                       dilation: Any = 1, *, out: Shaped | None = None, ndim: int | None = None,
                                       op: str = "conv_transpose_weight_grad") -> ConvProblem:
    """Describe the gradient of ``conv_transpose(x, w)`` for w of shape `weight_size` (C, K / groups, \\*kernel).

    Parameters and errors as in `conv_transpose_problem`. In the result, `x` is dy and `y` the caller's input.
    """
    return _transpose_weight_grad(op, ndim, spec(x), frozen(weight_size), spec(dy),
                                  None if out is None else out.strides, frozen(stride), frozen(padding),
                                  frozen(output_padding), frozen(groups), frozen(dilation))


@lru_cache(CACHE)
def _transpose_weight_grad(op: str, ndim: int | None, x: Spec, weight_size: Any, dy: Spec,
                           out: tuple[int, ...] | None, stride: Any, padding: Any, output_padding: Any, groups: Any,
                           dilation: Any) -> ConvProblem:
    (x_shape, x_strides, dtype), dy_shape = x, dy[0]
    w_shape = size(op, "weight_size", weight_size)
    ndim, groups = _weight_parts(op, w_shape, ndim, groups, transposed=True, name="weight_size")
    check_rank(op, "input", x_shape, ndim)
    check_rank(op, "grad_output", dy_shape, ndim)
    check_dtypes(op, "input", x, "grad_output", dy)
    _check_transposed_channels(op, x_shape, w_shape)
    g, extra = _transposed_geometry(op, w_shape[2:], stride, padding, output_padding, dilation)
    _check_grad_shape(op, dy_shape, (x_shape[0], w_shape[1] * groups, *_transposed_size(op, x_shape[2:], g, extra)))
    order = order_of(x_shape, x_strides)
    return _conv(op, g, groups, dtype, order, dy_shape, w_shape, x_shape, elements(op, "grad_output", dy),
                 result_strides(op, w_shape, dtype, order, out), elements(op, "input", x))


def _check_transposed_channels(op: str, x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> None:
    if x_shape[1] != w_shape[0]:
        hint = ("input looks like (N, ..., C): use np.moveaxis(input, -1, 1), which is a free view"
                if x_shape[-1] == w_shape[0] else "the weight of a transposed convolution is (C, K/groups, *kernel)")
        raise ValueError(f"{op}: weight has shape {w_shape} for {w_shape[0]} input channels, but input has "
                         f"{x_shape[1]}; both must be the same. Hint: {hint}")


def _transposed_geometry(op: str, kernel: tuple[int, ...], stride: Any, padding: Any, output_padding: Any,
                         dilation: Any) -> tuple[_Geometry, tuple[int, ...]]:
    if isinstance(padding, str) and padding != "valid":
        raise ValueError(f"{op}: padding is {padding!r}, but a transposed convolution needs numbers or 'valid', "
                         "because several output sizes fit. Hint: padding=(kernel - 1) // 2 with stride 1")
    g = _geometry(op, kernel, kernel, stride, padding, dilation)
    extra = per_axis(op, "output_padding", output_padding, len(kernel), 0)
    for e, s, d in zip(extra, g.stride, g.dilation, strict=True):
        if e >= max(s, d):
            raise ValueError(f"{op}: output_padding is {e}, but less than max(stride, dilation) = max({s}, {d}) = "
                             f"{max(s, d)} is needed. Hint: a larger result needs a smaller padding")
    return g, extra


def _transposed_size(op: str, in_size: tuple[int, ...], g: _Geometry, extra: tuple[int, ...]) -> tuple[int, ...]:
    if min(in_size) < 1:
        raise ValueError(f"{op}: input has spatial size {in_size}, but at least 1 is needed along every axis. "
                         "Hint: only the batch may be empty")
    out = []
    for n, k, s, d, lo, hi, e in zip(in_size, g.kernel, g.stride, g.dilation, g.pad_lo, g.pad_hi, extra, strict=True):
        total = (n - 1) * s - lo - hi + d * (k - 1) + e + 1
        if total < 1:
            raise ValueError(f"{op}: the output would have size (in - 1) * stride - pad_lo - pad_hi + dilation * "
                             f"(kernel - 1) + output_padding + 1 = ({n} - 1) * {s} - {lo} - {hi} + {d} * ({k} - 1) + "
                             f"{e} + 1 = {total}, but at least 1 is needed. Hint: reduce padding by {1 - total}")
        out.append(total)
    return tuple(out)


def _transposed_in_size(out_size: tuple[int, ...], g: _Geometry, extra: tuple[int, ...]) -> tuple[int, ...]:
    """Invert `_transposed_size`; rounded down where no input size fits, which the caller's shape check reports."""
    return tuple(max(1, (n + lo + hi - d * (k - 1) - e - 1) // s + 1) for n, k, s, d, lo, hi, e
                 in zip(out_size, g.kernel, g.stride, g.dilation, g.pad_lo, g.pad_hi, extra, strict=True))
