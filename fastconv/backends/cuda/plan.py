"""Plans of convolutions on the GPU: which kernels run a pass, and their launches."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fastconv.arrays import SHORT_FLOATS
from fastconv.backends import lattice
from fastconv.backends.cuda import tiles
from fastconv.backends.cuda.device import Kernel
from fastconv.backends.cuda.launches import (
    DTYPES,
    Launch,
    Plan,
    digits,
    parts_of,
    pixels_fast,
    structure,
    tap_digits,
)
from fastconv.backends.cuda.tensor_cores import (
    conv_mma,
    conv_wgmma,
    image_layout,
    mma_refuses,
    predicted,
    weight_grad_mma,
    wgmma_refuses,
)
from fastconv.backends.cuda.tiles import CoreTile, Tile, ceil_div
from fastconv.backends.lattice import Lattice
from fastconv.problem import ConvProblem

ALGORITHMS = ("auto", "direct", "simt", "mma", "wgmma")
"""What a call may ask for; "simt 64x64" forces a tile too."""
# What "auto" takes for 16 bits: of those that can run a problem, the one that is predicted to be faster. TF32 rounds
# more than float32, so that it is never chosen; of 16 bits tensor cores are exact.
SHORT = ("mma", "wgmma")

# Groups of at most this many channels run without tiles.
NARROW_GROUP = 8
# Taps that a thread of the direct weight gradient sums at once.
TAPS = (1, 3, 9)

# Positions are added in 32 bits, beside one that lies outside of everything (FC_OUTSIDE).
MOST_POSITIONS = 2**28
_MAX_GRID = 65535  # of the second and third axis


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
    if name not in ALGORITHMS or (tile and tile not in [t.name for t in tiles_of(problem, op, name)]):
        raise ValueError(f"{op}: algorithm is {algorithm!r}, but for arrays on the GPU one of "
                         f"{', '.join(map(repr, ALGORITHMS))} is needed. Hint: 'auto' lets fastconv choose")
    _check_sizes(problem, op)
    refused = refuses(problem, op, name, capability)
    if refused:
        raise ValueError(f"{op}: algorithm is {name!r}, but that cannot run this problem: {refused}. "
                         "Hint: algorithm='auto'")
    if name == "auto":
        name = "direct" if _narrow(problem) else _core(problem, op, multiprocessors, capability) or "simt"
    if name in ("mma", "wgmma"):
        return _mma_plan(problem, op, name, relu, tile, multiprocessors, aligned)
    forced = f"{name} {tile}".rstrip()
    if op == "conv_weight_grad":
        first, splits = (_weight_grad_direct(problem, multiprocessors) if name == "direct"
                         else _weight_grad_simt(problem, tile, multiprocessors))
        return _weight_grad_plan(problem, forced, first, splits)
    parts, covers = parts_of(problem, op)
    launches = tuple(_direct(part, problem.dtype, relu) if name == "direct"
                     else _simt(part, problem.dtype, relu, tile, multiprocessors) for part in parts)
    return Plan(problem, op, forced, launches, covers, relu)


def tiles_of(problem: ConvProblem, op: str, name: str) -> tuple[Tile, ...] | tuple[CoreTile, ...]:
    """The tiles that a call may force of an algorithm."""
    if name == "simt":
        return tiles.SIMT[problem.dtype]
    if op == "conv_weight_grad":
        return ()
    return {"mma": tiles.MMA, "wgmma": tiles.WGMMA}.get(name, ())


def refuses(problem: ConvProblem, op: str, name: str, capability: tuple[int, int]) -> str | None:
    """Why an algorithm cannot run this, or None."""
    if name == "wgmma":
        return wgmma_refuses(problem, op, capability)
    return mma_refuses(problem, capability) if name == "mma" else None


def _core(problem: ConvProblem, op: str, multiprocessors: int, capability: tuple[int, int]) -> str | None:
    """What runs 16 bits on tensor cores, if anything does."""
    able = [name for name in SHORT if problem.dtype in SHORT_FLOATS and refuses(problem, op, name, capability) is None]
    if len(able) < 2:
        return next(iter(able), None)
    return min(able, key=lambda name: predicted(problem, op, name, multiprocessors))


def _narrow(problem: ConvProblem) -> bool:
    """Whether groups are so narrow that most of a tile would be empty."""
    widest = max(problem.in_channels, problem.out_channels) // problem.groups
    return problem.groups > 1 and widest <= NARROW_GROUP


def _direct(part: Lattice, dtype: str, relu: bool) -> Launch:
    channels_fast = abs(part.out_strides[1]) < abs(part.out_strides[4])
    kernel = Kernel("conv_direct.cu", "conv_direct", (
        ("FC_DTYPE", DTYPES[dtype][0]), ("CHANNELS_FAST", int(channels_fast))))
    outputs = part.batch * math.prod(part.out_size) * part.groups * part.out_channels
    return Launch(kernel, (ceil_div(outputs, 256),), (256,), (structure(part), np.int32(relu)), 0)


def _tile(dtype: str, name: str, rows: int, columns: int, batches: int, multiprocessors: int) -> Tile:
    allowed = tuple(t for t in tiles.SIMT[dtype] if name in ("", t.name))
    return tiles.choose_tile(allowed, rows, columns, batches, multiprocessors)


def _simt(part: Lattice, dtype: str, relu: bool, tile_name: str, multiprocessors: int) -> Launch:
    code, size = DTYPES[dtype]
    rows = part.batch * math.prod(part.out_size)
    tile = _tile(dtype, tile_name, rows, part.out_channels, part.groups, multiprocessors)
    s = structure(part)
    kernel = Kernel("conv_simt.cu", "conv_simt", (
        ("FC_DTYPE", code), *tile.defines, ("PIXELS_FAST", int(pixels_fast(part.in_strides, part.in_channels))),
        ("OUT_FAST", int(abs(part.w_strides[1]) < abs(part.w_strides[2])))))
    grid = ceil_div(rows, tile.bm), ceil_div(part.out_channels, tile.bn), part.groups
    args = (s, tap_digits(tile.bk, s), np.int32(relu))
    return Launch(kernel, grid, (tile.threads,), args, _smem(tile, size, tile.bm * 24 + 2 * tile.bk * 32))


def _smem(tile: Tile, size: int, tables: int) -> int:
    pack = 16 // size
    return 2 * tile.bk * (tile.bm + tile.bn + 2 * pack) * size + tables


def _mma_plan(problem: ConvProblem, op: str, name: str, relu: bool, tile: str, multiprocessors: int,
              aligned: bool) -> Plan:
    reads_x, reads_y = op != "conv_input_grad", op != "conv"
    each = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    x, y = (image_layout(problem, size, strides, channels, aligned) if reads else (strides, channels, None)
            for size, strides, channels, reads in (
                (problem.in_size, problem.x_strides, each[0], reads_x),
                (problem.out_size, problem.y_strides, each[1], reads_y)))
    copies = tuple(copy for copy, reads in ((x[2], reads_x), (y[2], reads_y)) if reads)
    in_place = None in copies
    there = replace(problem, x_strides=x[0], y_strides=y[0])
    if op == "conv_weight_grad":
        first, splits = weight_grad_mma(there, x[1], y[1], multiprocessors)
        return _weight_grad_plan(problem, name, first, splits)._replace(copies=copies, in_place=in_place)
    parts, covers = parts_of(there, op)
    make = conv_mma if name == "mma" else conv_wgmma
    channels = x[1] if op == "conv" else y[1]
    launches = tuple(make(part, problem.dtype, relu, channels, tile, multiprocessors) for part in parts)
    return Plan(problem, op, f"{name} {tile}".rstrip(), launches, covers, relu, copies=copies, in_place=in_place)


def _weight_grad_simt(problem: ConvProblem, tile_name: str, multiprocessors: int) -> tuple[Launch, int]:
    part = lattice.forward(problem)
    code, size = DTYPES[problem.dtype]
    width = part.in_channels * problem.taps
    depth = part.batch * math.prod(part.out_size)
    tile = _tile(problem.dtype, tile_name, part.out_channels, width, part.groups, multiprocessors)
    blocks = ceil_div(part.out_channels, tile.bm) * ceil_div(width, tile.bn) * part.groups
    splits, chunk = tiles.split(depth, tile.bk, blocks, part.groups, multiprocessors)
    s = structure(part)
    _, height, breadth = part.out_size
    kernel = Kernel("weight_grad_simt.cu", "weight_grad_simt", (
        ("FC_DTYPE", code), *tile.defines,
        ("DY_PIXELS_FAST", int(pixels_fast(part.out_strides, part.out_channels))),
        ("IN_PIXELS_FAST", int(pixels_fast(part.in_strides, part.in_channels)))))
    grid = ceil_div(width, tile.bn), ceil_div(part.out_channels, tile.bm), part.groups * splits
    args = (s, digits(tile.bk, breadth, height, part.out_size[0]), np.int32(splits), np.int64(chunk))
    return Launch(kernel, grid, (tile.threads,), args, _smem(tile, size, tile.bn * 24 + 2 * tile.bk * 32)), splits


def _weight_grad_direct(problem: ConvProblem, multiprocessors: int) -> tuple[Launch, int]:
    part = lattice.forward(problem)
    code, size = DTYPES[problem.dtype]
    pairs = problem.out_channels * part.in_channels
    lanes = 1 if pixels_fast(part.in_strides, problem.in_channels) else 32
    taps = next((t for t in TAPS if t >= problem.taps), TAPS[-1])
    across = ceil_div(pairs, lanes), ceil_div(problem.taps, taps)
    depth = part.batch * math.prod(part.out_size)
    splits, chunk = tiles.split(depth, 256 // lanes, across[0] * across[1], 1, multiprocessors)
    kernel = Kernel("weight_grad_direct.cu", "weight_grad_direct", (
        ("FC_DTYPE", code), ("LANES", lanes), ("TAPS", taps)))
    _, height, breadth = part.out_size
    args = structure(part), digits(256 // lanes, breadth, height, part.out_size[0]), np.int64(chunk)
    return Launch(kernel, (*across, splits), (256,), args, 256 * size), splits


def _weight_grad_plan(problem: ConvProblem, algorithm: str, first: Launch, splits: int) -> Plan:
    """The sums of `first`, and what adds them."""
    part = lattice.forward(problem)
    weights = problem.out_channels * part.in_channels * problem.taps
    finish = Launch(Kernel("weight_grad_finish.cu", "weight_grad_finish", (("FC_DTYPE", DTYPES[problem.dtype][0]),)),
                    (ceil_div(weights, 256),), (256,), (structure(part), np.int32(splits)), 0)
    return Plan(problem, "conv_weight_grad", algorithm, (first, finish), sums=splits * weights)
