"""The compiled backend: the functions of `reference`, run by the plan that fits the problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastconv.arrays import Array, empty
from fastconv.backends import lattice, reference
from fastconv.backends.cpu_pool import (
    avg_pool,
    avg_pool_grad,
    lp_pool,
    lp_pool_grad,
    max_pool,
    max_pool_grad,
    max_pool_input_grad,
    max_unpool,
    max_unpool_grad,
)
from fastconv.plan import plan_for
from fastconv.problem import ConvProblem

__all__ = [
    "avg_pool", "avg_pool_grad", "conv", "conv_input_grad", "conv_weight_grad", "lp_pool", "lp_pool_grad", "max_pool",
    "max_pool_grad", "max_pool_input_grad", "max_unpool", "max_unpool_grad",
]


# Runs again what Winograd refuses: NaN and infinity must reach the outputs that the formula says, and no others.
FINITE_OR_NOT = "im2col"


class Run:
    """A planned convolution, or input gradient (as a transposed convolution, with bias), to be run many times.

    Parameters
    ----------
    op
        "conv" or "conv_input_grad".
    relu
        Whether max(., 0) is applied to the result.
    packed
        Keeps packed weights: given a layout and the function that packs, returns them. Without it they are packed
        at every run.
    """

    __slots__ = ("_dtype", "_engine", "_packed", "_shape", "_spread", "_threads", "plan")

    def __init__(self, problem: ConvProblem, op: str, algorithm: str = "auto", *, relu: bool = False,
                 packed: Callable[[Any, Callable[[Array], Any]], Any] | None = None) -> None:
        self.plan = plan = plan_for(problem, op, algorithm, relu=relu, packed=packed is not None)
        self._shape = problem.y_shape if op == "conv" else problem.x_shape
        self._dtype = np.dtype(problem.dtype)
        self._threads = plan.threads
        # Channels of a transposed convolution that the plan takes as so many channels each have one bias.
        self._spread = 1
        if op == "conv_input_grad" and plan.algorithm == "direct":
            if lattice.linear_input_grad(problem) is not None:
                self._spread = problem.taps
            elif lattice.interleaved_input_grad(problem):
                self._spread = problem.stride[2]
        self._engine = engine = plan.engine
        self._packed = None if packed is None or engine is None else packed(
            engine.layout, lambda w: engine.pack(w, plan.threads))

    def __call__(self, x: Array, w: Array, b: Array | None = None, out: Array | None = None) -> Array:
        """Write the result to `out`, or return it in a new array; `b` is contiguous."""
        if self._engine is None:
            return self._reference(x, w, b, out)
        plan = self.plan
        if out is None:
            out = empty(self._shape, self._dtype, plan.problem.order)
        if not plan.covers:
            out[...] = 0 if b is None else self._relu(_along_channels(b, plan.problem))
        if b is not None and self._spread > 1:
            b = np.repeat(b, self._spread)
        if not self._engine.run(x, w if self._packed is None else self._packed, b, out, self._threads):
            again = plan_for(plan.problem, plan.op, FINITE_OR_NOT, relu=plan.relu)
            again.engine.run(x, w, b, out, self._threads)
        return out

    def _reference(self, x: Array, w: Array, b: Array | None, out: Array | None) -> Array:
        problem = self.plan.problem
        if self.plan.op == "conv":
            return self._relu(reference.conv(problem, x, w, b, out=out))
        y = reference.conv_input_grad(problem, x, w, out=out)
        if b is not None:
            y += _along_channels(b, problem)
        return self._relu(y)

    def _relu(self, y: Array) -> Array:
        return np.maximum(y, 0, out=y) if self.plan.relu else y


class WeightGradRun:
    """A planned weight gradient, to be run many times."""

    __slots__ = ("plan",)

    def __init__(self, problem: ConvProblem, algorithm: str = "auto") -> None:
        self.plan = plan_for(problem, "conv_weight_grad", algorithm)

    def __call__(self, x: Array, dy: Array, *, out: Array | None = None) -> Array:
        """Write dw to `out`, or return it in a new array."""
        plan, problem = self.plan, self.plan.problem
        if plan.engine is None:
            return reference.conv_weight_grad(problem, x, dy, out=out)
        if out is None:
            out = empty(problem.w_shape, problem.dtype, problem.order)
        if not plan.engine.run(x, dy, out, plan.threads):
            plan_for(problem, "conv_weight_grad", FINITE_OR_NOT).engine.run(x, dy, out, plan.threads)
        return out


def conv(problem: ConvProblem, x: Array, w: Array, b: Array | None = None, *, out: Array | None = None,
         algorithm: str = "auto") -> Array:
    """y = conv(x, w) + b."""
    return Run(problem, "conv", algorithm)(x, w, _contiguous(b), out)


def conv_input_grad(problem: ConvProblem, dy: Array, w: Array, *, out: Array | None = None,
                    bias: Array | None = None, algorithm: str = "auto") -> Array:
    """dx from dy; as a transposed convolution it adds `bias` to the result."""
    return Run(problem, "conv_input_grad", algorithm)(dy, w, _contiguous(bias), out)


def conv_weight_grad(problem: ConvProblem, x: Array, dy: Array, *, out: Array | None = None,
                     algorithm: str = "auto") -> Array:
    """dw from x and dy."""
    return WeightGradRun(problem, algorithm)(x, dy, out=out)


def _contiguous(b: Array | None) -> Array | None:
    return b if b is None or b.flags.c_contiguous else np.ascontiguousarray(b)


def _along_channels(b: Array, problem: ConvProblem) -> Array:
    """The bias as an array of its own that is broadcast over batch and space."""
    return b.reshape(-1, *[1] * problem.ndim).copy()
