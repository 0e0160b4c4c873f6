"""The compiled backend: the functions of `reference`, run by the plan that fits the problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastconv.arrays import Array, empty
from fastconv.backends import reference
from fastconv.backends.cpu_pool import (
    avg_pool,
    avg_pool_grad,
    lp_pool,
    lp_pool_grad,
    max_pool,
    max_pool_grad,
    max_unpool,
    max_unpool_grad,
)
from fastconv.plan import Plan, plan_for
from fastconv.problem import ConvProblem

__all__ = [
    "avg_pool", "avg_pool_grad", "conv", "conv_input_grad", "conv_weight_grad", "lp_pool", "lp_pool_grad", "max_pool",
    "max_pool_grad", "max_unpool", "max_unpool_grad",
]


# Runs again what Winograd refuses: NaN and infinity must reach the outputs that the formula says, and no others.
FINITE_OR_NOT = "im2col"


def conv(problem: ConvProblem, x: Array, w: Array, b: Array | None = None, *, out: Array | None = None,
         algorithm: str = "auto", relu: bool = False, packed: Callable[[Plan], Any] | None = None) -> Array:
    """y = conv(x, w) + b, then max(y, 0) if `relu`; `packed` keeps the weights in the layout of a plan."""
    plan = plan_for(problem, "conv", algorithm, relu=relu, packed=packed is not None)
    if plan.engine is None:
        y = reference.conv(problem, x, w, b, out=out)
        return np.maximum(y, 0, out=y) if relu else y
    if out is None:
        out = empty(problem.y_shape, problem.dtype, problem.order)
    b = _contiguous(b)
    if not plan.engine.run(x, w if packed is None else packed(plan), b, out, plan.threads):
        plan = plan_for(problem, "conv", FINITE_OR_NOT, relu=relu)
        plan.engine.run(x, w, b, out, plan.threads)
    return out


def conv_input_grad(problem: ConvProblem, dy: Array, w: Array, *, out: Array | None = None,
                    bias: Array | None = None, algorithm: str = "auto") -> Array:
    """dx from dy; as a transposed convolution it adds `bias` to the result."""
    plan = plan_for(problem, "conv_input_grad", algorithm)
    if plan.engine is None:
        dx = reference.conv_input_grad(problem, dy, w, out=out)
        if bias is not None:
            dx += bias.reshape(-1, *[1] * problem.ndim)
        return dx
    if out is None:
        out = empty(problem.x_shape, problem.dtype, problem.order)
    if not plan.covers:
        out[...] = 0 if bias is None else bias.reshape(-1, *[1] * problem.ndim)
    bias = _contiguous(bias)
    if not plan.engine.run(dy, w, bias, out, plan.threads):
        plan = plan_for(problem, "conv_input_grad", FINITE_OR_NOT)
        plan.engine.run(dy, w, bias, out, plan.threads)
    return out


def conv_weight_grad(problem: ConvProblem, x: Array, dy: Array, *, out: Array | None = None,
                     algorithm: str = "auto") -> Array:
    """dw from x and dy."""
    plan = plan_for(problem, "conv_weight_grad", algorithm)
    if plan.engine is None:
        return reference.conv_weight_grad(problem, x, dy, out=out)
    if out is None:
        out = empty(problem.w_shape, problem.dtype, problem.order)
    plan.engine.run(x, dy, out, plan.threads)
    return out


def _contiguous(b: Array | None) -> Array | None:
    return b if b is None or b.flags.c_contiguous else np.ascontiguousarray(b)
