"""What plans of convolutions are made of: launches of kernels, and the structures that kernels take."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastconv.arrays import Order, dense_strides
from fastconv.backends import lattice
from fastconv.backends.cuda.device import Kernel, TensorMap
from fastconv.backends.lattice import Lattice
from fastconv.problem import ConvProblem

# FC_DTYPE of prim.cuh, and the bytes of what sums are taken in.
DTYPES = {"float32": (0, 4), "float64": (1, 8), "float16": (2, 4), "bfloat16": (3, 4)}

# The structures of lattice.cuh.
LATTICE = np.dtype([
    ("in_strides", np.int64, 5), ("out_strides", np.int64, 5), ("add_strides", np.int64, 5), ("w_strides", np.int64, 6),
    ("in_offset", np.int64), ("out_offset", np.int64), ("w_offset", np.int64), ("add_offset", np.int64),
    ("in_size", np.int32, 3), ("out_size", np.int32, 3), ("step", np.int32, 3), ("taps", np.int32, 3),
    ("tap_at", np.int32, 3), ("tap_step", np.int32, 3),
    ("batch", np.int32), ("groups", np.int32), ("in_channels", np.int32), ("out_channels", np.int32)], align=True)
DIGITS = np.dtype([("v", np.int32, 4)])


class Launch(NamedTuple):
    """One kernel of a plan; what changes from call to call comes before and behind `args`."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    args: tuple[Any, ...]
    smem: int
    pack: Pack | None = None
    maps: tuple[TensorMap, TensorMap] | None = None  # of the image and of the weights


class Pack(NamedTuple):
    """A kernel that brings the weights into another layout first, and how many elements that has.

    `layout` tells layouts apart, so that packed weights can be kept.
    """

    kernel: Kernel
    args: tuple[Any, ...]
    elements: int
    layout: Any


class Copy(NamedTuple):
    """A kernel that brings an image into the layout that tensor cores read first, and how many elements that has."""

    kernel: Kernel
    grid: tuple[int, ...]
    source: Any
    smem: int
    elements: int


class Plan(NamedTuple):
    """How a pass runs.

    Attributes
    ----------
    algorithm
        With the tile, where the call forced one.
    launches
        Empty where there is nothing to compute.
    covers
        False if parts of dx meet no tap, so that they must be filled in beforehand.
    relu
        Whether max(., 0) is applied to the result.
    sums
        Elements of the workspace of a weight gradient.
    copies
        For each image that is read, what brings it into another layout first; None where it is read in place.
    in_place
        Whether any is read in place in runs of 16 bytes, so that it must start with one.
    """

    problem: ConvProblem
    op: str
    algorithm: str
    launches: tuple[Launch, ...]
    covers: bool = True
    relu: bool = False
    sums: int = 0
    copies: tuple[Copy | None, ...] = (None, None)
    in_place: bool = False


class _Axis(NamedTuple):
    """The taps of one axis: how many, where the first reads, and how far apart they read and lie in w."""

    taps: int
    at: int
    step: int
    w_step: int


def _axes(l: Lattice) -> tuple[list[_Axis], int]:  # noqa: E741
    """The taps of each axis, which are evenly spaced in every pass, and the offset of the first tap in w."""
    positions = [sorted(set(at)) for at in zip(*l.tap_at, strict=True)]
    offsets = dict(zip(l.tap_at, l.tap_w, strict=True))
    first = tuple(p[0] for p in positions)
    axes = []
    for axis, p in enumerate(positions):
        step = p[1] - p[0] if len(p) > 1 else 0
        second = (*first[:axis], first[axis] + step, *first[axis + 1:])
        axes.append(_Axis(len(p), p[0], step, offsets[second] - offsets[first]))
    assert math.prod(len(p) for p in positions) == len(l.tap_at)
    return axes, offsets[first]


def structure(l: Lattice) -> Any:  # noqa: E741
    """The lattice as kernels take it."""
    axes, w_offset = _axes(l)
    s = np.zeros((), LATTICE)
    s["in_strides"], s["out_strides"] = l.in_strides, l.out_strides
    s["w_strides"] = (*l.w_strides, *(a.w_step for a in axes))
    s["in_offset"], s["out_offset"], s["w_offset"] = l.in_offset, l.out_offset, w_offset
    s["in_size"], s["out_size"], s["step"] = l.in_size, l.out_size, l.step
    s["taps"], s["tap_at"] = [a.taps for a in axes], [a.at for a in axes]
    s["tap_step"] = [a.step for a in axes]
    s["batch"], s["groups"], s["in_channels"], s["out_channels"] = l.batch, l.groups, l.in_channels, l.out_channels
    return s


def digits(n: int, *radices: int) -> Any:
    """`n` in a mixed radix, lowest digit first."""
    values = []
    for radix in radices:
        n, digit = divmod(n, radix)
        values.append(digit)
    d = np.zeros((), DIGITS)
    d["v"] = (*values, n)
    return d


def tap_digits(n: int, s: Any) -> Any:
    """`n` as channel, and position in the kernel, fastest first."""
    _, height, width = s["taps"].tolist()
    return digits(n, int(s["in_channels"]), width, height)


@lru_cache(1024)
def byte_strides(shape: tuple[int, ...], order: Order, itemsize: int) -> tuple[int, ...] | None:
    """Strides of a new array in `order`; None for C order, and where there are no elements."""
    if order == "contiguous" or 0 in shape:
        return None
    return tuple(itemsize * stride for stride in dense_strides(shape, order))


def parts_of(problem: ConvProblem, op: str) -> tuple[tuple[Lattice, ...], bool]:
    """The lattices of a pass that are not empty, and whether they cover all of its result."""
    parts, covers = ((lattice.forward(problem),), True) if op == "conv" else lattice.input_grad(problem)
    return tuple(part for part in parts if part.batch and math.prod(part.out_size)), covers


def pixels_fast(strides: tuple[int, ...], channels: int) -> bool:
    """Whether neighbouring pixels lie closer together than neighbouring channels."""
    return channels == 1 or abs(strides[1]) > abs(strides[4])
