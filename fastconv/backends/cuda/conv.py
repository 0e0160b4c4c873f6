"""Convolutions on the GPU: the functions that run plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fastconv.arrays import empty
from fastconv.backends.cuda.device import provider
from fastconv.backends.cuda.launches import Copy, Pack, Plan, parts_of
from fastconv.backends.cuda.plan import plan_for
from fastconv.backends.cuda.tiles import ceil_div
from fastconv.config import settings
from fastconv.problem import ConvProblem
from fastconv.problem.common import five

Array = Any  # of the provider


def chosen(problem: ConvProblem, op: str, algorithm: str = "auto", relu: bool = False, aligned: bool = True) -> Plan:
    """The plan for the current GPU."""
    device = provider()
    if algorithm == "auto" and settings().tune and problem.batch and math.prod(problem.out_size):
        from fastconv.backends.cuda import tune  # which needs this module

        algorithm = tune.choose(problem, op)
    return plan_for(problem, op, algorithm, relu, device.multiprocessors(), device.capability(), aligned)


class Run:
    """A planned convolution, or input gradient, to be run many times; see `fastconv.backends.cpu.Run`."""

    __slots__ = ("_dtype", "_keep", "_packed", "_shape", "_unaligned", "_with_sum", "plan")

    def __init__(self, problem: ConvProblem, op: str, algorithm: str = "auto", *, relu: bool = False,
                 packed: Callable[[Any, Callable[[Array], Any]], Any] | None = None, aligned: bool = True) -> None:
        self.plan = chosen(problem, op, algorithm, relu, aligned)
        self._shape = problem.y_shape if op == "conv" else problem.x_shape
        self._dtype = np.dtype(problem.dtype)
        self._with_sum: dict[tuple[int, ...], list[Any]] = {}  # structures of the launches, by strides of the residual
        self._keep = packed
        self._packed = None if packed is None else [
            launch.pack and packed(launch.pack.layout, partial(_packed, launch.pack)) for launch in self.plan.launches]
        self._unaligned: Run | None = None

    def __call__(self, x: Array, w: Array, b: Array | None = None, out: Array | None = None,
                 add: Array | None = None) -> Array:
        """Write the result, plus `add` of its shape, to `out`, or return it in a new array; `b` is contiguous."""
        plan, launch = self.plan, provider().launch
        if plan.in_place and x.data.ptr % 16:
            return self._copying()(x, w, b, out, add)
        if out is None:
            out = empty(self._shape, self._dtype, plan.problem.order, like=x)
        if not plan.covers:
            self._fill(out, b, add)
        if plan.copies[0] is not None and plan.launches:
            x = _copied(plan.copies[0], x)
        structures = None if add is None else self._structures(add)
        for number, (kernel, grid, block, args, smem, pack, maps) in enumerate(plan.launches):
            if structures is not None:
                args = structures[number], *args[1:]
            weights = w if pack is None else _packed(pack, w) if self._packed is None else self._packed[number]
            operands = (x, weights) if maps is None else map(provider().tensor_map, (x, weights), maps)
            launch(kernel, grid, block, (*operands, b, add, out, *args), smem)
        return out

    def _copying(self) -> Run:
        """What runs where the first element of the input does not start a run of 16 bytes."""
        if self._unaligned is None:
            p = self.plan
            self._unaligned = Run(p.problem, p.op, p.algorithm, relu=p.relu, packed=self._keep, aligned=False)
        return self._unaligned

    def _structures(self, add: Array) -> list[Any]:
        structures = self._with_sum.get(add.strides)
        if structures is None:
            p, own = self.plan.problem, five(tuple(stride // add.itemsize for stride in add.strides))
            # The residual lies as the result would, if the result had its strides.
            alike = replace(p, y_strides=own) if self.plan.op == "conv" else replace(p, x_strides=own)
            structures = [launch.args[0].copy() for launch in self.plan.launches]
            for s, part in zip(structures, parts_of(alike, self.plan.op)[0], strict=True):
                s["add_strides"], s["add_offset"] = part.out_strides, part.out_offset
            self._with_sum = {add.strides: structures}
        return structures

    def _fill(self, out: Array, b: Array | None, add: Array | None) -> None:
        """Write what the result is where no tap is met."""
        out[...] = 0 if add is None else add
        if b is not None:
            out += b.reshape(-1, *[1] * self.plan.problem.ndim)
        if self.plan.relu:
            np.maximum(out, 0, out=out)


def _copied(copy: Copy, x: Array) -> Array:
    there = provider().empty((copy.elements,), x.dtype)
    provider().launch(copy.kernel, copy.grid, (256,), (x, there, copy.source), copy.smem)
    return there


def _packed(pack: Pack, w: Array) -> Array:
    packed = provider().empty((pack.elements,), w.dtype)
    provider().launch(pack.kernel, (ceil_div(pack.elements, 256),), (256,), (w, packed, *pack.args))
    return packed


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
    device = provider()
    plan = chosen(problem, "conv_weight_grad", algorithm)
    if plan.in_place and (x.data.ptr | dy.data.ptr) % 16:
        plan = chosen(problem, "conv_weight_grad", "mma", aligned=False)
    if out is None:
        out = empty(problem.w_shape, problem.dtype, problem.order, like=x)
    sums = device.empty((plan.sums,), np.float64 if problem.dtype == "float64" else np.float32)
    if problem.batch * math.prod(problem.out_size):
        x, dy = (image if copy is None else _copied(copy, image)
                 for copy, image in zip(plan.copies, (x, dy), strict=True))
    first, finish = plan.launches
    device.launch(first.kernel, first.grid, first.block, (x, dy, sums, *first.args), first.smem)
    device.launch(finish.kernel, finish.grid, finish.block, (sums, out, *finish.args), finish.smem)
    return out


def _contiguous(b: Array | None) -> Array | None:
    return b if b is None or b.flags.c_contiguous else b.copy()
