"""The compiled backend: the functions of `reference`, run by the plan that fits the problem."""

from __future__ import annotations

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
from fastconv.plan import plan_for
from fastconv.problem import ConvProblem

__all__ = [
    "avg_pool", "avg_pool_grad", "conv", "conv_input_grad", "conv_weight_grad", "lp_pool", "lp_pool_grad", "max_pool",
    "max_pool_grad", "max_unpool", "max_unpool_grad",
]


def conv(problem: ConvProblem, x: Array, w: Any, b: Array | None = None, *, out: Array | None = None,
         algorithm: str = "auto", relu: bool = False) -> Array:
    """y = conv(x, w) + b, then max(y, 0) if `relu`; `w` may be what `pack` made of the weight."""
    plan = plan_for(problem, "conv", algorithm, relu=relu)
    if plan.engine is None:
        y = reference.conv(problem, x, w, b, out=out)
        return np.maximum(y, 0, out=y) if relu else y
    if out is None:
        out = empty(problem.y_shape, problem.dtype, problem.order)
    plan.engine.run(x, w, _contiguous(b), out, plan.threads)
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
    plan.engine.run(dy, w, _contiguous(bias), out, plan.threads)
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
