"""Convolutions on the GPU: plans, which are lists of launches, and the functions that run them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from fastconv.arrays import SHORT_FLOATS, empty
from fastconv.backends import lattice
from fastconv.backends.cuda import tiles
from fastconv.backends.cuda.device import Kernel, TensorMap, provider
from fastconv.backends.cuda.tiles import Tile, ceil_div
from fastconv.backends.lattice import Lattice
from fastconv.config import settings
from fastconv.problem import ConvProblem
from fastconv.problem.common import Strides, five

Array = Any  # of the provider

ALGORITHMS = ("auto", "direct", "simt", "mma", "wgmma")
"""What a call may ask for; "simt 64x64" forces a tile too. "auto" never takes "wgmma", which no GPU has confirmed."""

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
# Of channels_last.cu.
SOURCE = np.dtype([
    ("strides", np.int64, 5), ("size", np.int32, 3), ("batch", np.int32), ("groups", np.int32), ("channels", np.int32),
    ("padded", np.int32)], align=True)
COPY_TILE = 64, 32  # pixels and channels

# Groups of at most this many channels run without tiles.
NARROW_GROUP = 8
# Elements of 16 bytes, which copies to tensor cores move at once; the largest tile, and how many stages are in flight.
MMA_RUN = {"float32": 4, "float16": 8, "bfloat16": 8}
MMA_TILE = 128, 128
MMA_STAGES = 4
MMA_CAPABILITY = 8, 0
# The same of wgmma: pixels of a tile, and elements of 128 bytes. What maps of images hold, by spatial axes: corners of
# the box from -n to n - 1, and offsets of taps; and the widest stride.
WGMMA_CAPABILITY = 9, 0
WGMMA_TILE = 128, 64
MAP_LIMITS = {2: (128, 255), 3: (16, 31)}
MAP_STEPS = 8
# Taps that a thread of the direct weight gradient sums at once.
TAPS = (1, 3, 9)

# Positions are added in 32 bits, beside one that lies outside of everything (FC_OUTSIDE).
MOST_POSITIONS = 2**28
_MAX_GRID = 65535  # of the second and third axis


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
    launches
        None where there is nothing to compute.
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
    """The taps of one axis: how many, where the first reads, how far apart they read, and where they lie in w."""

    taps: int
    at: int
    step: int
    w: int
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
        axes.append(_Axis(len(p), p[0], step, 0, offsets[second] - offsets[first]))
    assert math.prod(len(p) for p in positions) == len(l.tap_at)
    return axes, offsets[first]


def _structure(l: Lattice) -> Any:  # noqa: E741
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


def _digits(n: int, *radices: int) -> Any:
    """`n` in a mixed radix, lowest digit first."""
    digits = []
    for radix in radices:
        n, digit = divmod(n, radix)
        digits.append(digit)
    d = np.zeros((), DIGITS)
    d["v"] = (*digits, n)
    return d


def _tap_digits(n: int, s: Any) -> Any:
    _, height, width = s["taps"].tolist()
    return _digits(n, int(s["in_channels"]), width, height)


def _check_sizes(problem: ConvProblem, op: str) -> None:
    span = max(*problem.in_size, *problem.out_size) + max(*problem.pad_lo, *problem.pad_hi)
    span += max((k - 1) * d for k, d in zip(problem.kernel, problem.dilation, strict=True))
    span += max(o * s for o, s in zip(problem.out_size, problem.stride, strict=True))
    if span >= MOST_POSITIONS:
        raise ValueError(f"{op}: an axis with its padding spans {span} positions, but on the GPU fewer than 2**28 are "
                         "supported. Hint: cut the array into parts")
    if problem.groups > _MAX_GRID:
        raise ValueError(f"{op}: groups is {problem.groups}, but on the GPU at most {_MAX_GRID} are supported. "
                         "Hint: cut the channels into parts")


@lru_cache(1024)
def plan_for(problem: ConvProblem, op: str, algorithm: str = "auto", relu: bool = False,
             multiprocessors: int = 132, capability: tuple[int, int] = (9, 0), aligned: bool = True) -> Plan:
    """Choose kernels for a pass and prepare their launches, for images that start with a multiple of 16 bytes or not.

    Raises
    ------
    ValueError
        If the GPU backend has no such algorithm, or it cannot run this problem.
    """
    name, _, tile = algorithm.partition(" ")
    if name not in ALGORITHMS or (tile and name == "simt" and tile not in [t.name for t in tiles.SIMT[problem.dtype]]):
        raise ValueError(f"{op}: algorithm is {algorithm!r}, but for arrays on the GPU one of "
                         f"{', '.join(map(repr, ALGORITHMS))} is needed. Hint: 'auto' lets fastconv choose")
    _check_sizes(problem, op)
    refused = _wgmma_refuses(problem, op, capability) if name == "wgmma" else mma_refuses(problem, capability)
    if name in ("mma", "wgmma") and refused:
        raise ValueError(f"{op}: algorithm is {name!r}, but that cannot run this problem: {refused}. "
                         "Hint: algorithm='auto'")
    if name == "auto":
        # TF32 rounds more than float32, so that it is never chosen; for 16 bits tensor cores are exact.
        short = problem.dtype in SHORT_FLOATS and not refused
        name = "direct" if _narrow(problem) else "mma" if short else "simt"
    if name in ("mma", "wgmma"):
        return _mma_plan(problem, op, name, relu, multiprocessors, aligned)
    if op == "conv_weight_grad":
        first, splits = (_weight_grad_direct(problem, multiprocessors) if name == "direct"
                         else _weight_grad_simt(problem, tile, multiprocessors))
        return _weight_grad_plan(problem, name, first, splits)
    parts, covers = _parts(problem, op)
    launches = tuple(_direct(part, problem.dtype, relu) if name == "direct"
                     else _simt(part, problem.dtype, relu, tile, multiprocessors) for part in parts)
    return Plan(problem, op, name, launches, covers, relu)


def _parts(problem: ConvProblem, op: str) -> tuple[tuple[Lattice, ...], bool]:
    """The lattices of a pass that are not empty, and whether they cover all of its result."""
    parts, covers = ((lattice.forward(problem),), True) if op == "conv" else lattice.input_grad(problem)
    return tuple(part for part in parts if part.batch and math.prod(part.out_size)), covers


def _narrow(problem: ConvProblem) -> bool:
    """Whether groups are so narrow that most of a tile would be empty."""
    widest = max(problem.in_channels, problem.out_channels) // problem.groups
    return problem.groups > 1 and widest <= NARROW_GROUP


def mma_refuses(problem: ConvProblem, capability: tuple[int, int]) -> str | None:
    """Why tensor cores cannot run this, or None."""
    if problem.dtype not in MMA_RUN:
        return f"tensor cores have no {problem.dtype}"
    if capability < MMA_CAPABILITY:
        return (f"the GPU has compute capability {'.'.join(map(str, capability))}, and {MMA_CAPABILITY[0]}.0 or more "
                "is needed")
    return None


def _wgmma_refuses(problem: ConvProblem, op: str, capability: tuple[int, int]) -> str | None:
    """The same of those of sm_90a, which the tensor memory accelerator feeds."""
    if op == "conv_weight_grad":
        return "it has no weight gradient"
    if problem.dtype not in SHORT_FLOATS:
        return f"it takes 16 bits, not {problem.dtype}"
    if capability != WGMMA_CAPABILITY:
        return f"the GPU has compute capability {'.'.join(map(str, capability))}, and 9.0 is needed"
    if problem.groups > 1:
        return f"it takes one group, not {problem.groups}"
    for part in _parts(problem, op)[0]:
        axes, s = _image_axes(part), _structure(part)
        corner, offset = MAP_LIMITS[axes]
        lower, upper = _box(s, axes)
        if not all(-corner <= n < corner for n in (*lower, *upper)):
            return f"its map holds padding from {-corner} to {corner - 1}, and this needs {lower} and {upper}"
        reach = int(((s["taps"] - 1) * s["tap_step"]).max())
        if reach > offset or s["step"].max() > MAP_STEPS:
            return f"its map holds taps up to {offset} apart and strides up to {MAP_STEPS}"
    return None


def _image_axes(part: Lattice) -> int:
    """Spatial axes of the map of the image that `part` reads."""
    return 2 if part.in_size[0] == part.out_size[0] == 1 and all(tap[0] == 0 for tap in part.tap_at) else 3


def _box(s: Any, axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the first tap goes along each axis, fastest first: from which position, and up to which behind the end."""
    spans = ((s["out_size"] - 1) * s["step"] + 1 - s["in_size"] + s["tap_at"]).tolist()
    return tuple(s["tap_at"].tolist()[:-axes - 1:-1]), tuple(spans[:-axes - 1:-1])


def _wgmma(part: Lattice, dtype: str, relu: bool, channels: int) -> Launch:
    """`part` reads `channels`."""
    code, _ = DTYPES[dtype]
    axes, s, taps = _image_axes(part), _structure(part), len(part.tap_at)
    bm, depth = WGMMA_TILE
    bn = 128 if part.out_channels <= 128 else 256
    blocks = ceil_div(channels, depth)
    pack = _pack(part, s, dtype, blocks * depth)
    lower, upper = _box(s, axes)
    # An axis of one element has any stride, and the map wants a multiple of 16 bytes.
    sizes = (*part.in_size[:-axes - 1:-1], part.batch)
    strides = (*part.in_strides[:-axes - 1:-1], part.in_strides[0])
    in_bytes = tuple(2 * stride if n > 1 else 16 for n, stride in zip(sizes, strides, strict=True))
    image = TensorMap((channels, *sizes), in_bytes, (depth,), bm, lower, upper,
                      (1, *s["step"].tolist()[:-axes - 1:-1], 1))
    width = taps * blocks * depth
    weights = TensorMap((width, part.out_channels), (2 * width,), (depth, bn))
    kernel = Kernel("conv_wgmma.cu", "conv_wgmma", (
        ("FC_DTYPE", code), ("BN", bn), ("AXES", axes),
        ("OUT_PIXELS_FAST", int(_pixels_fast(part.out_strides, part.out_channels)))), "sm_90a")
    grid = ceil_div(part.batch * math.prod(part.out_size), bm), ceil_div(part.out_channels, bn)
    smem = 1024 + MMA_STAGES * ((bm + bn) * depth * 2 + 2 * 8)
    return Launch(kernel, grid, (384,), (s, np.int32(blocks), np.int32(relu)), smem, pack, (image, weights))


def _pack(part: Lattice, s: Any, dtype: str, padded: int) -> Pack:
    """Weights as [group, k][tap][c], c padded with zeros."""
    return Pack(Kernel("pack_weights.cu", "pack_weights", (("FC_DTYPE", DTYPES[dtype][0]),)), (s, np.int32(padded)),
                part.groups * part.out_channels * len(part.tap_at) * padded, _weights_layout(s, padded))


def _mma_plan(problem: ConvProblem, op: str, name: str, relu: bool, multiprocessors: int, aligned: bool) -> Plan:
    reads_x, reads_y = op != "conv_input_grad", op != "conv"
    each = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    x, y = (_image(problem, size, strides, channels, aligned) if reads else (strides, channels, None)
            for size, strides, channels, reads in (
                (problem.in_size, problem.x_strides, each[0], reads_x),
                (problem.out_size, problem.y_strides, each[1], reads_y)))
    copies = tuple(copy for copy, reads in ((x[2], reads_x), (y[2], reads_y)) if reads)
    in_place = None in copies
    there = replace(problem, x_strides=x[0], y_strides=y[0])
    if op == "conv_weight_grad":
        first, splits = _weight_grad_mma(there, x[1], y[1], multiprocessors)
        return _weight_grad_plan(problem, name, first, splits)._replace(copies=copies, in_place=in_place)
    parts, covers = _parts(there, op)
    make = _mma if name == "mma" else _wgmma
    launches = tuple(make(part, problem.dtype, relu, x[1] if op == "conv" else y[1]) for part in parts)
    return Plan(problem, op, name, launches, covers, relu, copies=copies, in_place=in_place)


def _image(problem: ConvProblem, size: tuple[int, ...], strides: Strides, channels: int,
           aligned: bool) -> tuple[Strides, int, Copy | None]:
    """Strides and channels of a group with which tensor cores read an image, and the copy for it where one is needed.

    They read channels side by side, in whole runs of 16 bytes.
    """
    run = MMA_RUN[problem.dtype]
    steps = [stride for stride, n in zip((strides[0], *strides[2:]), (problem.batch, *size), strict=True) if n > 1]
    # Not backwards either: the tensor memory accelerator cannot, and others hardly ever are asked to.
    if aligned and strides[1] == 1 and channels % run == 0 and not any(step < run or step % run for step in steps):
        return strides, channels, None
    padded = ceil_div(channels, run) * run
    pixel, pixels = problem.groups * padded, math.prod(size)
    source = np.zeros((), SOURCE)
    source["strides"], source["size"], source["batch"] = strides, size, problem.batch
    source["groups"], source["channels"], source["padded"] = problem.groups, channels, padded
    kernel = Kernel("channels_last.cu", "channels_last", (
        ("FC_DTYPE", DTYPES[problem.dtype][0]), ("CHANNELS_FAST", int(abs(strides[1]) < abs(strides[4])))))
    across, deep = COPY_TILE
    copy = Copy(kernel, (ceil_div(problem.batch * pixels, across), ceil_div(pixel, deep)), source,
                across * 8 + deep * (across + 2) * (16 // run), problem.batch * pixels * pixel)
    return (pixels * pixel, 1, size[1] * size[2] * pixel, size[2] * pixel, pixel), padded, copy


def _mma(part: Lattice, dtype: str, relu: bool, padded: int) -> Launch:
    """`part` reads groups of `padded` channels."""
    code, _ = DTYPES[dtype]
    bm, bn = MMA_TILE[0], min(MMA_TILE[1], 64 if part.out_channels <= 64 else 128)
    run = MMA_RUN[dtype]
    step = 4 * run
    s, taps = _structure(part), len(part.tap_at)
    pack = _pack(part, s, dtype, padded)
    read = s.copy()
    read["in_channels"] = padded
    kernel = Kernel("conv_mma.cu", "conv_mma", (
        ("FC_DTYPE", code), ("BM", bm), ("BN", bn),
        ("OUT_PIXELS_FAST", int(_pixels_fast(part.out_strides, part.out_channels * part.groups)))))
    rows = part.batch * math.prod(part.out_size)
    grid = ceil_div(rows, bm), ceil_div(part.out_channels, bn), part.groups
    _, height, width = s["taps"].tolist()
    args = read, _digits(4, padded // run, width, height), np.int32(ceil_div(taps * padded, step)), np.int32(relu)
    return Launch(kernel, grid, (256,), args, MMA_STAGES * (bm + bn) * (step + run) * (16 // run), pack)


def _weights_layout(s: Any, padded: int) -> Any:
    """What packed weights depend on."""
    return padded, *(s[name].tobytes() for name in ("w_strides", "w_offset", "taps", "in_channels", "out_channels"))


def _direct(part: Lattice, dtype: str, relu: bool) -> Launch:
    channels_fast = abs(part.out_strides[1]) < abs(part.out_strides[4])
    kernel = Kernel("conv_direct.cu", "conv_direct", (
        ("FC_DTYPE", DTYPES[dtype][0]), ("CHANNELS_FAST", int(channels_fast))))
    outputs = part.batch * math.prod(part.out_size) * part.groups * part.out_channels
    return Launch(kernel, (ceil_div(outputs, 256),), (256,), (_structure(part), np.int32(relu)), 0)


def _tile(dtype: str, name: str, rows: int, columns: int, batches: int, multiprocessors: int) -> Tile:
    allowed = tuple(t for t in tiles.SIMT[dtype] if name in ("", t.name))
    return tiles.choose_tile(allowed, rows, columns, batches, multiprocessors)


def _simt(part: Lattice, dtype: str, relu: bool, tile_name: str, multiprocessors: int) -> Launch:
    code, size = DTYPES[dtype]
    rows = part.batch * math.prod(part.out_size)
    tile = _tile(dtype, tile_name, rows, part.out_channels, part.groups, multiprocessors)
    s = _structure(part)
    kernel = Kernel("conv_simt.cu", "conv_simt", (
        ("FC_DTYPE", code), *tile.defines, ("PIXELS_FAST", int(_pixels_fast(part.in_strides, part.in_channels))),
        ("OUT_FAST", int(abs(part.w_strides[1]) < abs(part.w_strides[2])))))
    grid = ceil_div(rows, tile.bm), ceil_div(part.out_channels, tile.bn), part.groups
    args = (s, _tap_digits(tile.bk, s), np.int32(relu))
    return Launch(kernel, grid, (tile.threads,), args, _smem(tile, size, tile.bm * 24 + 2 * tile.bk * 32))


def _pixels_fast(strides: tuple[int, ...], channels: int) -> bool:
    """Whether neighbouring pixels lie closer together than neighbouring channels."""
    return channels == 1 or abs(strides[1]) > abs(strides[4])


def _smem(tile: Tile, size: int, tables: int) -> int:
    pack = 16 // size
    return 2 * tile.bk * (tile.bm + tile.bn + 2 * pack) * size + tables


def _weight_grad_simt(problem: ConvProblem, tile_name: str, multiprocessors: int) -> tuple[Launch, int]:
    part = lattice.forward(problem)
    code, size = DTYPES[problem.dtype]
    width = part.in_channels * problem.taps
    depth = part.batch * math.prod(part.out_size)
    tile = _tile(problem.dtype, tile_name, part.out_channels, width, part.groups, multiprocessors)
    blocks = ceil_div(part.out_channels, tile.bm) * ceil_div(width, tile.bn) * part.groups
    splits, chunk = tiles.split(depth, tile.bk, blocks, part.groups, multiprocessors)
    s = _structure(part)
    _, height, breadth = part.out_size
    kernel = Kernel("weight_grad_simt.cu", "weight_grad_simt", (
        ("FC_DTYPE", code), *tile.defines,
        ("DY_PIXELS_FAST", int(_pixels_fast(part.out_strides, part.out_channels))),
        ("IN_PIXELS_FAST", int(_pixels_fast(part.in_strides, part.in_channels)))))
    grid = ceil_div(width, tile.bn), ceil_div(part.out_channels, tile.bm), part.groups * splits
    args = (s, _digits(tile.bk, breadth, height, part.out_size[0]), np.int32(splits), np.int64(chunk))
    return Launch(kernel, grid, (tile.threads,), args, _smem(tile, size, tile.bn * 24 + 2 * tile.bk * 32)), splits


def _weight_grad_mma(problem: ConvProblem, in_channels: int, out_channels: int,
                     multiprocessors: int) -> tuple[Launch, int]:
    """Groups of `in_channels` and `out_channels` are read, which may be more than there are."""
    part = lattice.forward(problem)
    run = MMA_RUN[problem.dtype]
    step = 4 * run
    width = in_channels * problem.taps
    bm, bn = (64 if n <= 64 else 128 for n in (out_channels, width))
    blocks = ceil_div(out_channels, bm) * ceil_div(width, bn) * part.groups
    splits, chunk = tiles.split(part.batch * math.prod(part.out_size), step, blocks, part.groups, multiprocessors)
    s = _structure(part)
    s["in_channels"], s["out_channels"] = in_channels, out_channels
    _, height, breadth = part.out_size
    kernel = Kernel("weight_grad_mma.cu", "weight_grad_mma", (
        ("FC_DTYPE", DTYPES[problem.dtype][0]), ("BM", bm), ("BN", bn)))
    grid = ceil_div(width, bn), ceil_div(out_channels, bm), part.groups * splits
    args = (s, _digits(step, breadth, height, part.out_size[0]), np.int32(splits), np.int64(chunk),
            np.int32(part.in_channels), np.int32(part.out_channels))
    return Launch(kernel, grid, (256,), args, MMA_STAGES * step * (bm + bn + 16) * (16 // run) + 2 * step * 32), splits


def _weight_grad_direct(problem: ConvProblem, multiprocessors: int) -> tuple[Launch, int]:
    part = lattice.forward(problem)
    code, size = DTYPES[problem.dtype]
    pairs = problem.out_channels * part.in_channels
    lanes = 1 if _pixels_fast(part.in_strides, problem.in_channels) else 32
    taps = next((t for t in TAPS if t >= problem.taps), TAPS[-1])
    across = ceil_div(pairs, lanes), ceil_div(problem.taps, taps)
    depth = part.batch * math.prod(part.out_size)
    splits, chunk = tiles.split(depth, 256 // lanes, across[0] * across[1], 1, multiprocessors)
    kernel = Kernel("weight_grad_direct.cu", "weight_grad_direct", (
        ("FC_DTYPE", code), ("LANES", lanes), ("TAPS", taps)))
    _, height, breadth = part.out_size
    args = _structure(part), _digits(256 // lanes, breadth, height, part.out_size[0]), np.int64(chunk)
    return Launch(kernel, (*across, splits), (256,), args, 256 * size), splits


def _weight_grad_plan(problem: ConvProblem, algorithm: str, first: Launch, splits: int) -> Plan:
    """The sums of `first`, and what adds them."""
    part = lattice.forward(problem)
    weights = problem.out_channels * part.in_channels * problem.taps
    finish = Launch(Kernel("weight_grad_finish.cu", "weight_grad_finish", (("FC_DTYPE", DTYPES[problem.dtype][0]),)),
                    (ceil_div(weights, 256),), (256,), (_structure(part), np.int32(splits)), 0)
    return Plan(problem, "conv_weight_grad", algorithm, (first, finish), sums=splits * weights)


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
            for s, part in zip(structures, _parts(alike, self.plan.op)[0], strict=True):
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
