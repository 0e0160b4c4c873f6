"""Convolution, transposed convolution and their gradients, under PyTorch's names and argument order.

Shapes are (N, C, \\*spatial), or (C, \\*spatial) without a batch; weights are (K, C / groups, \\*kernel), for
transposed convolutions (C, K / groups, \\*kernel). Arrays are float32 or float64, all of one call alike, with any
strides; results keep the memory order of the input. Errors are ValueError and TypeError that name the argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastconv.arrays import Array, as_array, check_out, empty, on_device
from fastconv.backends import select
from fastconv.backends.select import call_key
from fastconv.config import token
from fastconv.functional.padding import check_padding_mode, fold_padding, pad
from fastconv.plan import Plan, plan_for
from fastconv.problem import (
    batched,
    check_bias,
    check_ndim,
    conv_input_grad_problem,
    conv_problem,
    conv_transpose_input_grad_problem,
    conv_transpose_problem,
    conv_transpose_weight_grad_problem,
    conv_weight_grad_problem,
)

Ints = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]

def conv(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1,
         groups: int = 1, *, padding_mode: str = "zeros", algorithm: str = "auto", out: Any = None) -> Array:
    """Convolve (correlate) `input` with `weight` in as many dimensions as `weight` has spatial axes, 1 to 3.

        y[n, k, o] = bias[k] + sum over c, t of weight[k, c, t] * input[n, c, o * stride + t * dilation - padding]

    Parameters
    ----------
    input : (N, C, \\*spatial) or (C, \\*spatial)
    weight : (K, C / groups, \\*kernel)
    bias : (K,), optional
    stride, dilation
        An integer or one per spatial axis, >= 1.
    padding
        An integer or one per axis; a pair (lo, hi) per axis; "valid"; "same" (out = ceil(in / stride), the odd
        element behind) or "same_lower" (before).
    groups
        Divides C and K; group g of the filters sees group g of the channels.
    padding_mode
        What lies in the padding: "zeros", "reflect" (the edge is not repeated), "replicate" or "circular".
    algorithm
        "auto", "direct", "im2col" or "reference"; see `fastconv.explain`.
    out : (N, K, \\*out_size), optional
        Written and returned if given.

    Returns
    -------
    (N, K, \\*out_size)
        out_size = floor((in + pad_lo + pad_hi - dilation * (kernel - 1) - 1) / stride) + 1

    Raises
    ------
    TypeError, ValueError
        With the argument, its value, the rule and a hint; also if the forced algorithm cannot run the problem.

    References
    ----------
    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016, arXiv:1603.07285.
    """
    return _conv("conv", None, input, weight, bias, stride, padding, dilation, groups, padding_mode, algorithm, out)


def conv1d(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1,
           groups: int = 1, *, padding_mode: str = "zeros", algorithm: str = "auto", out: Any = None) -> Array:
    """`conv` over (N, C, L)."""
    return _conv("conv1d", 1, input, weight, bias, stride, padding, dilation, groups, padding_mode, algorithm, out)


def conv2d(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1,
           groups: int = 1, *, padding_mode: str = "zeros", algorithm: str = "auto", out: Any = None) -> Array:
    """`conv` over (N, C, H, W)."""
    return _conv("conv2d", 2, input, weight, bias, stride, padding, dilation, groups, padding_mode, algorithm, out)


def conv3d(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1,
           groups: int = 1, *, padding_mode: str = "zeros", algorithm: str = "auto", out: Any = None) -> Array:
    """`conv` over (N, C, D, H, W)."""
    return _conv("conv3d", 3, input, weight, bias, stride, padding, dilation, groups, padding_mode, algorithm, out)


def spatial_axes(op: str, ndim: int | None, weight: Array) -> int:
    """Spatial axes of the call."""
    return ndim if ndim is not None else check_ndim(weight.ndim - 2, op)


def conv_relu(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1,
              groups: int = 1, *, padding_mode: str = "zeros", out: Any = None) -> Array:
    """``relu(conv(...))``, in one pass; see `conv`."""
    return _conv("conv", None, input, weight, bias, stride, padding, dilation, groups, padding_mode, "auto", out, True)


def _conv(op: str, ndim: int | None, input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any,
          groups: Any, padding_mode: str, algorithm: str, out: Any, relu: bool = False) -> Array:
    options = (op, stride, padding, dilation, groups, padding_mode, algorithm, token(), int(relu))
    key = call_key(options, input, weight, bias, out)
    repeat = _repeats.get(key)
    if repeat is not None:
        return repeat(input, weight, bias, out)
    w = as_array(weight, "weight", op)
    n_axes = spatial_axes(op, ndim, w)
    x, alone = batched(as_array(input, "input", op), n_axes, op)
    if out is not None:
        out = batched(as_array(out, "out", op), n_axes, op, "out")[0]
    if padding_mode != "zeros":
        lo, hi = check_padding_mode(op, x.shape[2:], w.shape[2:], stride, padding, dilation, padding_mode)
        x, padding, key = pad(x, lo, hi, padding_mode), 0, None
    problem = conv_problem(x, w, stride, padding, dilation, groups, out=out, ndim=ndim, op=op)
    b = checked_bias(op, bias, problem.out_channels, problem.dtype)
    if out is not None:
        check_out(out, problem.y_shape, x.dtype, "out", op, (x, w) if b is None else (x, w, b))
    run = select.backend(op, ("input", x), ("weight", w), ("bias", b)).Run(problem, "conv", algorithm, relu=relu)
    y = run(x, w, b, out)
    if b is bias and not alone:
        remember(_repeats, key, run, options[7])
    return y[0] if alone else y


# What ran before, by call_key: a call with the same layouts and options needs no second check.
_repeats: dict[Any, Any] = {}
_REPEATS = 1024


def remember(repeats: dict[Any, Any], key: Any, repeat: Any, since: int) -> None:
    """Keep `repeat` under `key` (None: not at all), unless settings have changed since they were `since`."""
    if key is None or token() != since:
        return
    if len(repeats) >= _REPEATS:
        repeats.clear()  # at once, so that other threads see either all or nothing
    repeats[key] = repeat


def checked_bias(op: str, bias: Any, channels: int, dtype: str) -> Array | None:
    """The bias as a contiguous array of `channels` values, or None."""
    if bias is None:
        return None
    b = as_array(bias, "bias", op)
    check_bias(b, channels, dtype, op)
    return b if b.flags.c_contiguous else b.copy()


# ---- Gradients ---------------------------------------------------------------------------------------------------

def conv_input_grad(input_size: Sequence[int], weight: Any, grad_output: Any, stride: Ints = 1,
                    padding: Padding = 0, dilation: Ints = 1, groups: int = 1, *, padding_mode: str = "zeros",
                    algorithm: str = "auto", out: Any = None) -> Array:
    """Gradient of `conv` with respect to its input.

        dx[n, c, i] = sum over k, t of weight[k, c, t] * grad_output[n, k, (i + padding - t * dilation) / stride]

    over the taps for which the division leaves no remainder.

    Parameters
    ----------
    input_size
        Shape of the input, (N, C, \\*spatial) or (C, \\*spatial).
    weight, stride, padding, dilation, groups, padding_mode
        As in the forward pass.
    grad_output : (N, K, \\*out_size) or (K, \\*out_size)

    Returns
    -------
    array of shape `input_size`

    Raises
    ------
    TypeError, ValueError
        See `conv`.
    """
    op = "conv_input_grad"
    options = (op, input_size, stride, padding, dilation, groups, padding_mode, algorithm, token())
    key = call_key(options, weight, grad_output, out=out)
    repeat = _repeats.get(key)
    if repeat is not None:
        return repeat(grad_output, weight, None, out)
    w = as_array(weight, "weight", op)
    ndim = spatial_axes(op, None, w)
    dy, alone = batched(as_array(grad_output, "grad_output", op), ndim, op, "grad_output")
    size: Any = tuple(input_size) if isinstance(input_size, (tuple, list)) else input_size
    if alone and isinstance(size, tuple) and len(size) == ndim + 1:
        size = (1, *size)
    if out is not None:
        out = batched(as_array(out, "out", op), ndim, op, "out")[0]
    if padding_mode != "zeros":
        dx = _padded_input_grad(op, size, w, dy, stride, padding, dilation, groups, padding_mode, algorithm)
        if out is not None:
            check_out(out, dx.shape, dy.dtype, "out", op, (w, dy))[...] = dx
            dx = out
        return dx[0] if alone else dx
    problem = conv_input_grad_problem(size, w, dy, stride, padding, dilation, groups, out=out, op=op)
    if out is not None:
        check_out(out, problem.x_shape, dy.dtype, "out", op, (w, dy))
    run = select.backend(op, ("grad_output", dy), ("weight", w)).Run(problem, "conv_input_grad", algorithm)
    dx = run(dy, w, None, out)
    if not alone:
        remember(_repeats, key, run, options[-1])
    return dx[0] if alone else dx


def _padded_input_grad(op: str, size: tuple[int, ...], w: Array, dy: Array, stride: Any, padding: Any, dilation: Any,
                       groups: Any, padding_mode: str, algorithm: str) -> Array:
    lo, hi = check_padding_mode(op, size[2:], w.shape[2:], stride, padding, dilation, padding_mode)
    padded = (*size[:2], *(n + a + b for n, a, b in zip(size[2:], lo, hi, strict=True)))
    problem = conv_input_grad_problem(padded, w, dy, stride, 0, dilation, groups, op=op)
    backend = select.backend(op, ("grad_output", dy), ("weight", w))
    return fold_padding(backend.conv_input_grad(problem, dy, w, algorithm=algorithm), lo, hi, padding_mode)


def conv_weight_grad(input: Any, weight_size: Sequence[int], grad_output: Any, stride: Ints = 1,
                     padding: Padding = 0, dilation: Ints = 1, groups: int = 1, *, padding_mode: str = "zeros",
                     algorithm: str = "auto", out: Any = None) -> Array:
    """Gradient of `conv` with respect to its weight.

        dw[k, c, t] = sum over n, o of grad_output[n, k, o] * input[n, c, o * stride + t * dilation - padding]

    Parameters
    ----------
    input, stride, padding, dilation, groups, padding_mode
        As in the forward pass.
    weight_size
        Shape of the weight, (K, C / groups, \\*kernel).
    grad_output : (N, K, \\*out_size) or (K, \\*out_size)

    Returns
    -------
    array of shape `weight_size`

    Raises
    ------
    TypeError, ValueError
        See `conv`.
    """
    op = "conv_weight_grad"
    options = (op, weight_size, stride, padding, dilation, groups, padding_mode, algorithm, token())
    key = call_key(options, input, grad_output, out=out)
    repeat = _repeats.get(key)
    if repeat is not None:
        return repeat(input, grad_output, out=out)
    size: Any = tuple(weight_size) if isinstance(weight_size, (tuple, list)) else weight_size
    ndim = min(max(len(size) - 2, 1), 3) if isinstance(size, tuple) else 2
    x, alone = batched(as_array(input, "input", op), ndim, op)
    dy = batched(as_array(grad_output, "grad_output", op), ndim, op, "grad_output")[0]
    if padding_mode != "zeros":
        lo, hi = check_padding_mode(op, x.shape[2:], size[2:], stride, padding, dilation, padding_mode)
        x, padding, key = pad(x, lo, hi, padding_mode), 0, None
    if out is not None:
        out = as_array(out, "out", op)
    problem = conv_weight_grad_problem(x, size, dy, stride, padding, dilation, groups, out=out, op=op)
    if out is not None:
        check_out(out, problem.w_shape, x.dtype, "out", op, (x, dy))
    run = select.backend(op, ("input", x), ("grad_output", dy)).WeightGradRun(problem, algorithm)
    if not alone:
        remember(_repeats, key, run, options[-1])
    return run(x, dy, out=out)


def conv_bias_grad(grad_output: Any, *, batched: bool = True) -> Array:
    """Gradient of `conv` and `conv_transpose` with respect to their bias: the sum over batch and space.

    Parameters
    ----------
    grad_output : (N, K, \\*out_size), or (K, \\*out_size) if not `batched`

    Returns
    -------
    (K,), accumulated in float64 over sums of at most 64 elements
    """
    dy = as_array(grad_output, "grad_output", "conv_bias_grad")
    return select.training("conv_bias_grad", ("grad_output", dy)).channel_sums(dy if batched else dy[None])


# ---- Transposed convolution --------------------------------------------------------------------------------------

def conv_transpose(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0,
                   output_padding: Ints = 0, groups: int = 1, dilation: Ints = 1, *, algorithm: str = "auto",
                   out: Any = None) -> Array:
    """Transposed convolution: the input gradient of `conv`, as a layer that enlarges.

        y[n, k, i] = bias[k] + sum over c, t of weight[c, k, t] * input[n, c, (i + padding - t * dilation) / stride]

    Parameters
    ----------
    input : (N, C, \\*spatial) or (C, \\*spatial)
    weight : (C, K / groups, \\*kernel)
    bias : (K,), optional
    padding
        How much of the result is cropped: an integer, one per axis, or a pair (lo, hi) per axis.
    output_padding
        Elements added behind each axis of the result; less than stride or dilation.

    Returns
    -------
    (N, K, \\*out_size)
        out_size = (in - 1) * stride - pad_lo - pad_hi + dilation * (kernel - 1) + output_padding + 1

    Raises
    ------
    TypeError, ValueError
        See `conv`.

    References
    ----------
    Dumoulin and Visin, 2016, arXiv:1603.07285, section 4.
    """
    return _transpose("conv_transpose", None, input, weight, bias, stride, padding, output_padding, groups, dilation,
                      algorithm, out)


def conv_transpose1d(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0,
                     output_padding: Ints = 0, groups: int = 1, dilation: Ints = 1, *, algorithm: str = "auto",
                     out: Any = None) -> Array:
    """`conv_transpose` over (N, C, L)."""
    return _transpose("conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation,
                      algorithm, out)


def conv_transpose2d(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0,
                     output_padding: Ints = 0, groups: int = 1, dilation: Ints = 1, *, algorithm: str = "auto",
                     out: Any = None) -> Array:
    """`conv_transpose` over (N, C, H, W)."""
    return _transpose("conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation,
                      algorithm, out)


def conv_transpose3d(input: Any, weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0,
                     output_padding: Ints = 0, groups: int = 1, dilation: Ints = 1, *, algorithm: str = "auto",
                     out: Any = None) -> Array:
    """`conv_transpose` over (N, C, D, H, W)."""
    return _transpose("conv_transpose3d", 3, input, weight, bias, stride, padding, output_padding, groups, dilation,
                      algorithm, out)


def _transpose(op: str, ndim: int | None, input: Any, weight: Any, bias: Any, stride: Any, padding: Any,
               output_padding: Any, groups: Any, dilation: Any, algorithm: str, out: Any) -> Array:
    options = (op, stride, padding, output_padding, groups, dilation, algorithm, token())
    key = call_key(options, input, weight, bias, out)
    repeat = _repeats.get(key)
    if repeat is not None:
        return repeat(input, weight, bias, out)
    w = as_array(weight, "weight", op)
    n_axes = spatial_axes(op, ndim, w)
    x, alone = batched(as_array(input, "input", op), n_axes, op)
    if out is not None:
        out = batched(as_array(out, "out", op), n_axes, op, "out")[0]
    problem = conv_transpose_problem(x, w, stride, padding, output_padding, groups, dilation, out=out, ndim=ndim,
                                     op=op)
    b = checked_bias(op, bias, problem.in_channels, problem.dtype)
    if out is not None:
        check_out(out, problem.x_shape, x.dtype, "out", op, (x, w) if b is None else (x, w, b))
    run = select.backend(op, ("input", x), ("weight", w), ("bias", b)).Run(problem, "conv_input_grad", algorithm)
    y = run(x, w, b, out)
    if b is bias and not alone:
        remember(_repeats, key, run, options[-1])
    return y[0] if alone else y


def conv_transpose_input_grad(grad_output: Any, weight: Any, stride: Ints = 1, padding: Padding = 0,
                              output_padding: Ints = 0, groups: int = 1, dilation: Ints = 1, *,
                              algorithm: str = "auto", out: Any = None) -> Array:
    """Gradient of `conv_transpose` with respect to its input: the convolution of `grad_output` with `weight`.

    Parameters as in `conv_transpose`; errors as in `conv`.
    """
    op = "conv_transpose_input_grad"
    w = as_array(weight, "weight", op)
    ndim = spatial_axes(op, None, w)
    dy, alone = batched(as_array(grad_output, "grad_output", op), ndim, op, "grad_output")
    if out is not None:
        out = batched(as_array(out, "out", op), ndim, op, "out")[0]
    problem = conv_transpose_input_grad_problem(dy, w, stride, padding, output_padding, groups, dilation, out=out,
                                                op=op)
    if out is not None:
        check_out(out, problem.y_shape, dy.dtype, "out", op, (w, dy))
    dx = select.backend(op, ("grad_output", dy), ("weight", w)).conv(problem, dy, w, out=out, algorithm=algorithm)
    return dx[0] if alone else dx


def conv_transpose_weight_grad(input: Any, weight_size: Sequence[int], grad_output: Any, stride: Ints = 1,
                               padding: Padding = 0, output_padding: Ints = 0, groups: int = 1, dilation: Ints = 1, *,
                               algorithm: str = "auto", out: Any = None) -> Array:
    """Gradient of `conv_transpose` with respect to its weight, of shape `weight_size` (C, K / groups, \\*kernel).

    Parameters as in `conv_transpose`; errors as in `conv`.
    """
    op = "conv_transpose_weight_grad"
    size: Any = tuple(weight_size) if isinstance(weight_size, (tuple, list)) else weight_size
    ndim = min(max(len(size) - 2, 1), 3) if isinstance(size, tuple) else 2
    x = batched(as_array(input, "input", op), ndim, op)[0]
    dy = batched(as_array(grad_output, "grad_output", op), ndim, op, "grad_output")[0]
    if out is not None:
        out = as_array(out, "out", op)
    problem = conv_transpose_weight_grad_problem(x, size, dy, stride, padding, output_padding, groups, dilation,
                                                 out=out, op=op)
    if out is not None:
        check_out(out, problem.w_shape, x.dtype, "out", op, (x, dy))
    backend = select.backend(op, ("input", x), ("grad_output", dy))
    return backend.conv_weight_grad(problem, dy, x, out=out, algorithm=algorithm)


# ---- Explanations ------------------------------------------------------------------------------------------------

def explain(input: Any, weight: Any, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1, groups: int = 1, *,
            op: str = "conv", algorithm: str = "auto") -> Plan:
    """Say which algorithm runs a convolution, and why the others do not; ``print(explain(...))``.

    Parameters
    ----------
    input, weight, stride, padding, dilation, groups, algorithm
        See `conv`; nothing is computed.
    op
        The pass: "conv", "conv_input_grad" or "conv_weight_grad"; gradients are explained for a ``grad_output`` in
        the memory order of `input`.

    Returns
    -------
    Plan
        Its ``algorithm``, ``isa``, ``threads`` and ``refused`` (name, reason) may be read; ``str`` formats them.

    Raises
    ------
    TypeError, ValueError
        See `conv`.
    """
    if op not in ("conv", "conv_input_grad", "conv_weight_grad"):
        raise ValueError(f"explain: op is {op!r}, but 'conv', 'conv_input_grad' or 'conv_weight_grad' is needed. "
                         "Hint: a transposed convolution is the 'conv_input_grad' of its mirror image")
    w = as_array(weight, "weight", "explain")
    x = batched(as_array(input, "input", "explain"), spatial_axes("explain", None, w), "explain")[0]
    return plan_for(conv_problem(x, w, stride, padding, dilation, groups, op="explain"), op, algorithm)


# ---- Linear ------------------------------------------------------------------------------------------------------

def linear(input: Any, weight: Any, bias: Any = None) -> Array:
    """y = input @ weight.T + bias, by the kernels of the convolution.

    Parameters
    ----------
    input : (..., C)
    weight : (K, C)
    bias : (K,), optional

    Returns
    -------
    (..., K)

    Raises
    ------
    TypeError, ValueError
        See `conv`.
    """
    return _linear("linear", "input", input, weight, bias)


def linear_input_grad(grad_output: Any, weight: Any) -> Array:
    """Gradient of `linear` with respect to its input: grad_output (..., K) @ weight (K, C)."""
    return _linear("linear_input_grad", "grad_output", grad_output, weight, None)


def _linear(op: str, name: str, input: Any, weight: Any, bias: Any) -> Array:
    """Rows times a matrix, in the gradient the transposed one."""
    since = token()
    key = None if isinstance(input, np.ndarray) else call_key((op, since), input, weight, bias)
    repeat = _repeats.get(key)
    if repeat is not None:
        return repeat(input, weight, bias)
    x, w = as_array(input, name, op), as_array(weight, "weight", op)
    check_linear(op, name, x, "weight", w, 1 if op == "linear" else 0)
    w = w if op == "linear" else w.T
    if key is None or not on_device(x) or not x.size or not x.flags.c_contiguous:
        y = _conv(op, 1, as_pixels(x), w[:, :, None], bias, 1, 0, 1, 1, "zeros", "auto", None)
        return as_rows(y, x.shape)
    # Kernels of the GPU see memory, not axes: rows that lie one behind the other are an image as they are.
    shape = (*x.shape[:-1], len(w))
    problem = conv_problem(as_pixels(x), w[:, :, None], out=as_pixels(empty(shape, x.dtype, like=x)), ndim=1, op=op)
    b = checked_bias(op, bias, problem.out_channels, problem.dtype)
    run = select.backend(op, (name, x), ("weight", w), ("bias", b)).Run(problem, "conv")

    def again(x: Array, w: Array, b: Array | None) -> Array:
        return run(x, w, b, empty(shape, x.dtype, like=x))

    if b is bias:
        remember(_repeats, key, again, since)
    return again(x, w, b)


def linear_weight_grad(input: Any, grad_output: Any) -> Array:
    """Gradient of `linear` with respect to its weight: the sum over all rows of grad_output^T input, (K, C)."""
    op = "linear_weight_grad"
    x, dy = as_array(input, "input", op), as_array(grad_output, "grad_output", op)
    if x.ndim < 1 or x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"{op}: grad_output has shape {dy.shape}, but input has shape {x.shape}; all axes but the "
                         "last must be the same. Hint: pass the input of the forward pass")
    return conv_weight_grad(as_pixels(x), (dy.shape[-1], x.shape[-1], 1), as_pixels(dy))[:, :, 0]


def as_pixels(x: Array) -> Array:
    """(..., C) as one image of shape (1, C, rows) in channels_last order, or as none of shape (0, C, 1): a view where
    the strides allow it."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows.T[None] if len(rows) else rows[:, :, None]


def as_rows(y: Array, shape: tuple[int, ...]) -> Array:
    """The image that `as_pixels` made of an array of `shape`, as (..., K)."""
    return np.moveaxis(y, 1, -1).reshape(*shape[:-1], y.shape[1])


def check_linear_weight(op: str, name: str, w: Array) -> None:
    """Check that `w` is a matrix."""
    if w.ndim != 2:
        raise ValueError(f"{op}: {name} has shape {w.shape}, but (K, C) is needed. Hint: weight.reshape(K, -1)")


def check_linear(op: str, name: str, x: Array, weight_name: str, w: Array, axis: int) -> None:
    """Check that the last axis of `x` fits the axis `axis` of `w`."""
    check_linear_weight(op, weight_name, w)
    if x.ndim < 1 or x.shape[-1] != w.shape[axis]:
        raise ValueError(f"{op}: {name} has shape {x.shape} and {weight_name} {w.shape}, but the last axis of {name} "
                         f"must have {w.shape[axis]} elements. Hint: flatten images with x.reshape(len(x), -1)")
