"""Convolutions with fixed weights, packed once, and what follows them: a residual sum and an activation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from fastconv.arrays import Array, as_array, check_out
from fastconv.backends import select
from fastconv.backends.select import call_key
from fastconv.config import token
from fastconv.functional.activations import Activation, Spec, find_activation, finish
from fastconv.functional.conv import (
    Ints,
    Padding,
    as_pixels,
    as_rows,
    check_linear,
    check_linear_weight,
    checked_bias,
    remember,
    spatial_axes,
)
from fastconv.functional.padding import check_padding_mode, pad
from fastconv.problem import ConvProblem, batched, conv_problem, conv_transpose_problem
from fastconv.problem.common import integer


class _Repeat:
    """A call that was checked before, with the weights that it ran with."""

    __slots__ = ("_activation", "_adds", "_alone", "_b", "_run", "_w")

    def __init__(self, run: Any, w: Array, b: Array | None, activation: Activation | None, alone: bool,
                 adds: bool) -> None:
        self._run, self._w, self._b = run, w, b
        self._activation, self._alone, self._adds = activation, alone, adds

    def __call__(self, x: Array, residual: Array | None, out: Array | None) -> Array:
        if self._alone:
            x, out = x[None], out if out is None else out[None]
        if self._adds:
            assert residual is not None
            y = self._run(x, self._w, self._b, out, residual[None] if self._alone else residual)
            residual = None
        else:
            y = self._run(x, self._w, self._b, out)
        if self._alone:
            y = y[0]
        if residual is not None or self._activation is not None:
            finish(y, self._activation, residual)
        return y


class Prepared:
    """What prepared convolutions of both directions share.

    It keeps a copy of the weights and, for each layout that inputs have asked for so far, the packed form. One
    object may be called from many threads.
    """

    _op: str  # of the plan
    _name: str  # of the function that errors name

    def __init__(self, weight: Array, bias: Array | None, options: dict[str, Any], algorithm: str,
                 activation: Activation | None) -> None:
        self._weight, self._bias = weight, bias
        self._options, self._algorithm = options, algorithm
        self._activation = activation
        self._packed: dict[Any, Any] = {}
        self._repeats: dict[Any, _Repeat] = {}
        self._lock = threading.Lock()

    def __call__(self, input: Any, *, residual: Any = None, out: Any = None) -> Array:
        """Run on `input`.

        Parameters
        ----------
        input
            Shapes as in the function that has no prepared weights.
        residual : optional
            Added to the result before the activation, of the same shape: ``activation(f(input) + residual)``.
        out : optional
            Written and returned if given.

        Raises
        ------
        TypeError, ValueError
            See `conv`.
        """
        now = token()
        key = call_key((now,), input, residual, out=out)
        repeat = self._repeats.get(key)
        if repeat is not None:
            return repeat(input, residual, out)
        op = self._name
        x, alone = batched(as_array(input, "input", op), self._weight.ndim - 2, op)
        target = None if out is None else batched(as_array(out, "out", op), self._weight.ndim - 2, op, "out")[0]
        problem, x, repeats = self._problem(x, target)
        shape = problem.y_shape if self._op == "conv" else problem.x_shape
        added = self._checked_residual(residual, shape[1:] if alone else shape, x.dtype)
        if target is not None:
            check_out(target, shape, x.dtype, "out", op,
                      [a for a in (x, self._weight, self._bias, added) if a is not None])
        added = added[None] if alone and added is not None else added
        backend = select.backend(op, ("input", x), ("weight", self._weight), ("residual", added))
        adds = added is not None and backend is not select.cpu  # whose kernels know no sums
        fused = self._activation if added is None or adds else None
        run = backend.Run(problem, self._op, self._algorithm, relu=fused is not None and fused.name == "relu",
                          packed=self._pack)
        y = run(x, self._weight, self._bias, target, *((added,) if adds else ()))
        rest = None if run.plan.relu else self._activation
        finish(y, rest, None if adds else added)
        if repeats:
            remember(self._repeats, key, _Repeat(run, self._weight, self._bias, rest, alone, adds), now)
        return y[0] if alone else y

    def _problem(self, x: Array, out: Array | None) -> tuple[ConvProblem, Array, bool]:
        """The problem of `x`, what is read in its place, and whether that is `x` itself."""
        raise NotImplementedError

    def _checked_residual(self, residual: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        if residual is None:
            return None
        array = as_array(residual, "residual", self._name)
        if array.shape != shape:
            raise ValueError(f"{self._name}: residual has shape {array.shape}, but the result has shape {shape}; they "
                             "are added and must agree. Hint: nothing is broadcast; np.broadcast_to makes such a view")
        if array.dtype != dtype:
            raise TypeError(f"{self._name}: residual has dtype {array.dtype}, but input has dtype {dtype}. "
                            f"Hint: residual.astype(np.{dtype})")
        return array

    def _pack(self, layout: Any, pack: Callable[[Array], Any]) -> Any:
        """The weights in a layout of the backend, made by `pack` if they were not yet."""
        packed = self._packed.get(layout)
        if packed is None:
            with self._lock:
                packed = self._packed.setdefault(layout, pack(self._weight))
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights that are kept."""
        return sum(p.nbytes for p in self._packed.values())


class PreparedConv(Prepared):
    """A convolution with fixed weights, made by `prepare_conv`."""

    _op, _name = "conv", "conv"

    def _problem(self, x: Array, out: Array | None) -> tuple[ConvProblem, Array, bool]:
        options = dict(self._options)
        mode, repeats = options.pop("padding_mode"), True
        if mode != "zeros":
            lo, hi = check_padding_mode("conv", x.shape[2:], self._weight.shape[2:], options["stride"],
                                        options["padding"], options["dilation"], mode)
            x, options["padding"], repeats = pad(x, lo, hi, mode), 0, False
        return conv_problem(x, self._weight, **options, out=out), x, repeats


class PreparedConvTranspose(Prepared):
    """A transposed convolution with fixed weights, made by `prepare_conv_transpose`."""

    _op, _name = "conv_input_grad", "conv_transpose"

    def _problem(self, x: Array, out: Array | None) -> tuple[ConvProblem, Array, bool]:
        return conv_transpose_problem(x, self._weight, **self._options, out=out), x, True


class PreparedLinear(Prepared):
    """A linear map with fixed weights: a convolution whose pixels are the rows of the input."""

    _op, _name = "conv", "linear"

    def __call__(self, input: Any, *, residual: Any = None, out: Any = None) -> Array:
        """Run on `input` (..., C); `residual` (..., K) is added before the activation; see `Prepared`."""
        op = self._name
        x, w = as_array(input, "input", op), self._weight[:, :, 0]
        check_linear(op, "input", x, "weight", w, 1)
        shape = (*x.shape[:-1], len(w))
        added = self._checked_residual(residual, shape, x.dtype)
        y = as_rows(super().__call__(as_pixels(x), residual=None if added is None else as_pixels(added)), x.shape)
        if out is None:
            return y
        target = check_out(out, shape, x.dtype, "out", op)
        target[...] = y
        return target

    def _problem(self, x: Array, out: Array | None) -> tuple[ConvProblem, Array, bool]:
        return conv_problem(x, self._weight, op=self._name), x, True


def prepare_conv(weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0, dilation: Ints = 1,
                 groups: int = 1, *, padding_mode: str = "zeros", activation: Spec = None,
                 algorithm: str = "auto") -> PreparedConv:
    """Fix the weights of a convolution that will run many times; they are packed once instead of at every call.

    Parameters
    ----------
    weight, bias, stride, padding, dilation, groups, padding_mode, algorithm
        See `conv`. The weights are copied: later changes to the arrays have no effect.
    activation
        Applied to the result, or to its sum with ``residual``: None, a name, or a tuple of a name and parameters.

        ================  =================================================  ==========
        name              function                                           parameters
        ================  =================================================  ==========
        relu, relu6       ``max(x, 0)``, ``min(max(x, 0), 6)``
        clip              ``min(max(x, low), high)``                         low, high
        leaky_relu        ``x if x > 0 else slope * x``                      slope 0.01
        elu               ``x if x > 0 else alpha * (exp(x) - 1)``           alpha 1
        sigmoid, tanh
        silu              ``x * sigmoid(x)``
        gelu, gelu_tanh   x times the normal distribution function; by tanh
        hardsigmoid       ``min(max(x + 3, 0), 6) / 6``
        hardswish         ``x * hardsigmoid(x)``
        ================  =================================================  ==========

    Returns
    -------
    PreparedConv
        Call it as ``f(input)`` or ``f(input, residual=..., out=...)``.

    Raises
    ------
    TypeError, ValueError
        See `conv`.
    """
    op = "prepare_conv"
    final = find_activation(op, activation)
    w = as_array(weight, "weight", op).copy()
    spatial_axes(op, None, w)
    b = checked_bias(op, bias, w.shape[0], w.dtype.name)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
               "padding_mode": padding_mode}
    return PreparedConv(w, None if b is None else b.copy(), options, algorithm, final)


def prepare_conv_transpose(weight: Any, bias: Any = None, stride: Ints = 1, padding: Padding = 0,
                           output_padding: Ints = 0, groups: int = 1, dilation: Ints = 1, *,
                           activation: Spec = None, algorithm: str = "auto") -> PreparedConvTranspose:
    """Fix the weights of a transposed convolution that will run many times; see `prepare_conv`.

    Parameters
    ----------
    weight, bias, stride, padding, output_padding, groups, dilation, algorithm
        See `conv_transpose`. The weights are copied: later changes to the arrays have no effect.
    activation
        See `prepare_conv`.

    Returns
    -------
    PreparedConvTranspose
        Call it as ``f(input)`` or ``f(input, residual=..., out=...)``.

    Raises
    ------
    TypeError, ValueError
        See `conv_transpose`.
    """
    op = "prepare_conv_transpose"
    final = find_activation(op, activation)
    w = as_array(weight, "weight", op).copy()
    spatial_axes(op, None, w)
    b = checked_bias(op, bias, w.shape[1] * integer(op, "groups", groups, 1), w.dtype.name)
    options = {"stride": stride, "padding": padding, "output_padding": output_padding, "groups": groups,
               "dilation": dilation}
    return PreparedConvTranspose(w, None if b is None else b.copy(), options, algorithm, final)


def prepare_linear(weight: Any, bias: Any = None, *, activation: Spec = None) -> PreparedLinear:
    """Fix the weights (K, C) of a linear map that will run many times; see `linear` and `prepare_conv`.

    Returns
    -------
    PreparedLinear
        Call it as ``f(input)`` or ``f(input, residual=..., out=...)``.

    Raises
    ------
    TypeError, ValueError
        See `linear`.
    """
    op = "prepare_linear"
    final = find_activation(op, activation)
    w = as_array(weight, "weight", op)
    check_linear_weight(op, "weight", w)
    b = checked_bias(op, bias, w.shape[0], w.dtype.name)
    return PreparedLinear(w[:, :, None].copy(), None if b is None else b.copy(), {}, "auto", final)
