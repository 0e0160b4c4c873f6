"""Convolutions on the GPU: the functions that run plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fastconv.backends.cuda.device import provider
from fastconv.backends.cuda.launches import Copy, Launch, Pack, Plan, byte_strides, parts_of
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

    __slots__ = ("_copied", "_dtype", "_empty", "_keep", "_launches", "_shape", "_strides", "_unaligned", "_weights",
                 "_with_sum", "plan")

    def __init__(self, problem: ConvProblem, op: str, algorithm: str = "auto", *, relu: bool = False,
                 packed: Callable[[Any, Callable[[Array], Any]], Any] | None = None, aligned: bool = True) -> None:
        self.plan = plan = chosen(problem, op, algorithm, relu, aligned)
        device = provider()
        self._empty = device.empty
        self._shape = problem.y_shape if op == "conv" else problem.x_shape
        self._dtype = np.dtype(problem.dtype)
        self._strides = byte_strides(self._shape, problem.order, self._dtype.itemsize)
        self._copied = _copier(plan.copies[0], self._dtype) if plan.launches else None
        self._keep = packed
        # For each launch what brings the weights, and the image, into the form that it takes.
        self._weights = [_weights(launch.pack, self._dtype, packed) for launch in plan.launches]
        self._launches = self._prepared([launch.args for launch in plan.launches])
        self._with_sum: dict[tuple[int, ...], list[_Prepared]] = {}  # by strides of the residual
        self._unaligned: Run | None = None

    def _prepared(self, args: list[tuple[Any, ...]]) -> list[_Prepared]:
        return [_prepared(launch, self.plan.problem.dtype, own)
                for launch, own in zip(self.plan.launches, args, strict=True)]

    def __call__(self, x: Array, w: Array, b: Array | None = None, out: Array | None = None,
                 add: Array | None = None) -> Array:
        """Write the result, plus `add` of its shape, to `out`, or return it in a new array; `b` is contiguous."""
        plan = self.plan
        if plan.in_place and x.data.ptr % 16:
            return self._copying()(x, w, b, out, add)
        if out is None:
            out = self._empty(self._shape, self._dtype, self._strides)
        if not plan.covers:
            self._fill(out, b, add)
        if self._copied is not None:
            x = self._copied(x)
        launches = self._launches if add is None else self._adding(add)
        for launch, weights in zip(launches, self._weights, strict=True):
            launch(x, w if weights is None else weights(w), b, add, out)
        return out

    def _copying(self) -> Run:
        """What runs where the first element of the input does not start a run of 16 bytes."""
        if self._unaligned is None:
            p = self.plan
            self._unaligned = Run(p.problem, p.op, p.algorithm, relu=p.relu, packed=self._keep, aligned=False)
        return self._unaligned

    def _adding(self, add: Array) -> list[_Prepared]:
        """The launches that read a residual of these strides."""
        launches = self._with_sum.get(add.strides)
        if launches is None:
            p, own = self.plan.problem, five(tuple(stride // add.itemsize for stride in add.strides))
            # The residual lies as the result would, if the result had its strides.
            alike = replace(p, y_strides=own) if self.plan.op == "conv" else replace(p, x_strides=own)
            args = []
            for launch, part in zip(self.plan.launches, parts_of(alike, self.plan.op)[0], strict=True):
                s = launch.args[0].copy()
                s["add_strides"], s["add_offset"] = part.out_strides, part.out_offset
                args.append((s, *launch.args[1:]))
            launches = self._prepared(args)
            self._with_sum = {add.strides: launches}
        return launches

    def _fill(self, out: Array, b: Array | None, add: Array | None) -> None:
        """Write what the result is where no tap is met."""
        out[...] = 0 if add is None else add
        if b is not None:
            out += b.reshape(-1, *[1] * self.plan.problem.ndim)
        if self.plan.relu:
            np.maximum(out, 0, out=out)


_Prepared = Callable[[Array, Array, Array | None, Array | None, Array], None]  # image, weights, bias, residual, result


def _prepared(launch: Launch, dtype: str, args: tuple[Any, ...]) -> _Prepared:
    device = provider()
    run = device.launcher(launch.kernel, launch.grid, launch.block, args, launch.smem)
    if launch.maps is None:
        return run
    image, weights = (device.mapper(dtype, layout) for layout in launch.maps)
    return lambda x, w, b, add, out: run(image(x), weights(w), b, add, out)


def _copier(copy: Copy | None, dtype: np.dtype[Any]) -> Callable[[Array], Array] | None:
    """What brings images into the layout that is read; None where they are read in place."""
    if copy is None:
        return None
    device, shape = provider(), (copy.elements,)
    launch = device.launcher(copy.kernel, copy.grid, (256,), (copy.source,), copy.smem)

    def copied(x: Array) -> Array:
        there = device.empty(shape, dtype)
        launch(x, there)
        return there

    return copied


def _packer(pack: Pack, dtype: np.dtype[Any]) -> Callable[[Array], Array]:
    device, shape = provider(), (pack.elements,)
    launch = device.launcher(pack.kernel, (ceil_div(pack.elements, 256),), (256,), pack.args)

    def packed(w: Array) -> Array:
        there = device.empty(shape, dtype)
        launch(w, there)
        return there

    return packed


def _weights(pack: Pack | None, dtype: np.dtype[Any],
             keep: Callable[[Any, Callable[[Array], Any]], Any] | None) -> Callable[[Array], Array] | None:
    """What packs weights, or finds those that are kept; None where they are read as they are."""
    if pack is None:
        return None
    packer = _packer(pack, dtype)
    if keep is None:
        return packer
    kept = keep(pack.layout, packer)
    return lambda w: kept


class WeightGradRun:
    """A planned weight gradient, to be run many times."""

    __slots__ = ("_copied", "_dtype", "_empty", "_finish", "_first", "_shape", "_strides", "_sums", "_unaligned",
                 "plan")

    def __init__(self, problem: ConvProblem, algorithm: str = "auto", *, aligned: bool = True) -> None:
        self.plan = plan = chosen(problem, "conv_weight_grad", algorithm, aligned=aligned)
        device = provider()
        self._empty = device.empty
        self._shape = problem.w_shape
        self._dtype = np.dtype(problem.dtype)
        self._strides = byte_strides(self._shape, problem.order, self._dtype.itemsize)
        self._sums = (plan.sums,), np.dtype(np.float64 if problem.dtype == "float64" else np.float32)
        pixels = problem.batch * math.prod(problem.out_size)
        self._copied = [_copier(copy, self._dtype) if pixels else None for copy in plan.copies]
        self._first, self._finish = (
            device.launcher(launch.kernel, launch.grid, launch.block, launch.args, launch.smem)
            for launch in plan.launches)
        self._unaligned: WeightGradRun | None = None

    def __call__(self, x: Array, dy: Array, *, out: Array | None = None) -> Array:
        """Write dw to `out`, or return it in a new array."""
        plan = self.plan
        if plan.in_place and (x.data.ptr | dy.data.ptr) % 16:
            if self._unaligned is None:
                self._unaligned = WeightGradRun(plan.problem, plan.algorithm, aligned=False)
            return self._unaligned(x, dy, out=out)
        if out is None:
            out = self._empty(self._shape, self._dtype, self._strides)
        sums = self._empty(*self._sums)
        x, dy = (image if copied is None else copied(image)
                 for copied, image in zip(self._copied, (x, dy), strict=True))
        self._first(x, dy, sums)
        self._finish(sums, out)
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
    return b if b is None or b.flags.c_contiguous else b.copy()
