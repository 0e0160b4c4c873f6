"""Launches for tensor cores, by mma.sync and by wgmma, and the layouts that they read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastconv.arrays import SHORT_FLOATS
from fastconv.backends import lattice
from fastconv.backends.cuda import tiles
from fastconv.backends.cuda.device import Kernel, TensorMap
from fastconv.backends.cuda.launches import DTYPES, Copy, Launch, Pack, digits, parts_of, pixels_fast, structure
from fastconv.backends.cuda.tiles import CoreTile, ceil_div
from fastconv.backends.lattice import Lattice
from fastconv.problem import ConvProblem
from fastconv.problem.common import Strides

# The structure of channels_last.cu.
SOURCE = np.dtype([
    ("strides", np.int64, 5), ("size", np.int32, 3), ("batch", np.int32), ("groups", np.int32), ("channels", np.int32),
    ("padded", np.int32), ("together", np.int32)], align=True)
COPY_CHANNELS, COPY_BYTES = 64, 128  # of a tile: channels, and bytes of each

# Elements of 16 bytes, which copies to tensor cores move at once; how many of these runs make a step in depth; and
# stages of a weight gradient that are in flight.
MMA_RUN = {"float32": 4, "float16": 8, "bfloat16": 8}
MMA_RUNS = 4
MMA_STAGES = 4
MMA_CAPABILITY = 8, 0
TARGET = 16  # bytes, of results.cuh
# The same of wgmma: elements of 128 bytes. What maps of images hold, by spatial axes: corners of the box from -n to
# n - 1, and offsets of taps; and the widest stride.
WGMMA_CAPABILITY = 9, 0
WGMMA_DEPTH = 64
MAP_LIMITS = {2: (128, 255), 3: (16, 31)}
MAP_STEPS = 8


def mma_refuses(problem: ConvProblem, capability: tuple[int, int]) -> str | None:
    """Why tensor cores cannot run this, or None."""
    if problem.dtype not in MMA_RUN:
        return f"tensor cores have no {problem.dtype}"
    if capability < MMA_CAPABILITY:
        return (f"the GPU has compute capability {'.'.join(map(str, capability))}, and {MMA_CAPABILITY[0]}.0 or more "
                "is needed")
    return None


def wgmma_refuses(problem: ConvProblem, op: str, capability: tuple[int, int]) -> str | None:
    """The same of those of sm_90a, which the tensor memory accelerator feeds."""
    if op == "conv_weight_grad":
        return "it has no weight gradient"
    if problem.dtype not in SHORT_FLOATS:
        return f"it takes 16 bits, not {problem.dtype}"
    if capability != WGMMA_CAPABILITY:
        return f"the GPU has compute capability {'.'.join(map(str, capability))}, and 9.0 is needed"
    if problem.groups > 1:
        return f"it takes one group, not {problem.groups}"
    for part in parts_of(problem, op)[0]:
        axes, s = _image_axes(part), structure(part)
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


def image_layout(problem: ConvProblem, size: tuple[int, ...], strides: Strides, channels: int,
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
    copy = _copy(problem, size, strides, channels, padded)
    return (pixels * pixel, 1, size[1] * size[2] * pixel, size[2] * pixel, pixel), padded, copy


def _copy(problem: ConvProblem, size: tuple[int, ...], strides: Strides, channels: int, padded: int) -> Copy:
    """The copy of an image into groups of `padded` channels side by side."""
    run, code = MMA_RUN[problem.dtype], DTYPES[problem.dtype][0]
    all_channels, pixels = problem.groups * padded, problem.batch * math.prod(size)
    groups = problem.groups
    if padded == channels:  # which is as one group
        groups, channels, padded = 1, all_channels, all_channels
    axes = _merged(size, strides[2:])
    source = np.zeros((), SOURCE)
    source["size"], source["batch"] = [n for n, _ in axes], problem.batch
    source["strides"] = (*strides[:2], *(step for _, step in axes))
    source["groups"], source["channels"], source["padded"] = groups, channels, padded
    width, step = axes[-1]
    others = [(problem.batch, strides[0]), (groups * channels, strides[1]), *axes[:-1]]
    together = math.gcd(run, width, *(stride for n, stride in others if n > 1)) if step == 1 else 1
    source["together"] = together * (16 // run)
    channels_fast = abs(strides[1]) < abs(step) or width == 1
    if channels_fast or all_channels <= 2 * run:
        kernel = Kernel("channels_last.cu", "channels_last", (
            ("FC_DTYPE", code), ("TILES", 0), ("CHANNELS_FAST", int(channels_fast))))
        blocks, smem = ceil_div(pixels * (all_channels // run), 256), 0
    else:
        kernel = Kernel("channels_last.cu", "channels_last", (("FC_DTYPE", code), ("TILES", 1)))
        blocks = ceil_div(pixels, COPY_BYTES * run // 16) * groups * ceil_div(padded, COPY_CHANNELS)
        smem = COPY_CHANNELS * COPY_BYTES
    return Copy(kernel, (blocks,), source, smem, pixels * all_channels)


def _merged(size: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Three axes (extent, stride) with the same elements in the same order, as many as can be merged into the last."""
    axes: list[tuple[int, int]] = []
    for n, stride in zip(size, strides, strict=True):
        if axes and axes[-1][1] == n * stride and axes[-1][0] * n < 2**31:
            axes[-1] = axes[-1][0] * n, stride
        elif n > 1:
            axes.append((n, stride))
    return [(1, 0)] * (3 - len(axes)) + axes


def _pack(part: Lattice, s: Any, dtype: str, padded: int) -> Pack:
    """Weights as [group, k][tap][c], c padded with zeros."""
    return Pack(Kernel("pack_weights.cu", "pack_weights", (("FC_DTYPE", DTYPES[dtype][0]),)), (s, np.int32(padded)),
                part.groups * part.out_channels * len(part.tap_at) * padded, _weights_layout(s, padded))


def _weights_layout(s: Any, padded: int) -> Any:
    """What packed weights depend on."""
    return padded, *(s[name].tobytes() for name in ("w_strides", "w_offset", "taps", "in_channels", "out_channels"))


def _tile(table: tuple[CoreTile, ...], name: str, part: Lattice, multiprocessors: int) -> tuple[CoreTile, float]:
    allowed = tuple(t for t in table if name in ("", t.name))
    return tiles.choose_core_tile(allowed, part.batch * math.prod(part.out_size), part.out_channels, part.groups,
                                  multiprocessors)


def predicted(problem: ConvProblem, op: str, name: str, multiprocessors: int) -> float:
    """Time of a forward pass or data gradient by "mma" or "wgmma", in a unit of both.

    What tiles reach was measured with full ones; how empty they are, in depth too, is counted.
    """
    table = tiles.MMA if name == "mma" else tiles.WGMMA
    # Each tap takes whole runs of channels. A step of mma is of several, which may belong to different taps.
    run, at_once = (MMA_RUN[problem.dtype], MMA_RUNS) if name == "mma" else (WGMMA_DEPTH, 1)
    total = 0.0
    for part in parts_of(problem, op)[0]:
        steps = ceil_div(len(part.tap_at) * ceil_div(part.in_channels, run), at_once)
        total += steps * at_once * run * _tile(table, "", part, multiprocessors)[1]
    return total


def conv_mma(part: Lattice, dtype: str, relu: bool, padded: int, tile_name: str, multiprocessors: int) -> Launch:
    """`part` reads groups of `padded` channels."""
    code, _ = DTYPES[dtype]
    tile, _ = _tile(tiles.MMA, tile_name, part, multiprocessors)
    bm, bn, run = tile.bm, tile.bn, MMA_RUN[dtype]
    step = MMA_RUNS * run
    s, taps = structure(part), len(part.tap_at)
    pack = _pack(part, s, dtype, padded)
    read = s.copy()
    read["in_channels"] = padded
    kernel = Kernel("conv_mma.cu", "conv_mma", (
        ("FC_DTYPE", code), *tile.defines,
        ("OUT_PIXELS_FAST", int(pixels_fast(part.out_strides, part.out_channels * part.groups)))))
    rows = part.batch * math.prod(part.out_size)
    grid = ceil_div(rows, bm), ceil_div(part.out_channels, bn), part.groups
    _, height, width = s["taps"].tolist()
    args = read, digits(MMA_RUNS, padded // run, width, height), np.int32(ceil_div(taps * padded, step)), np.int32(relu)
    stages = tile.stages * (bm + bn) * (step + run) * (16 // run)
    return Launch(kernel, grid, (256,), args, max(stages, _results(bm, bn)) + bm * TARGET, pack)


def _results(bm: int, bn: int) -> int:
    """Bytes of the results of a tile, which take the place of its operands."""
    return 4 * max(bn * (bm + 4), bm * (bn + 8))


def conv_wgmma(part: Lattice, dtype: str, relu: bool, channels: int, tile_name: str, multiprocessors: int) -> Launch:
    """`part` reads `channels`."""
    code, _ = DTYPES[dtype]
    axes, s, taps = _image_axes(part), structure(part), len(part.tap_at)
    (tile, _), depth = _tile(tiles.WGMMA, tile_name, part, multiprocessors), WGMMA_DEPTH
    bm, bn, blocks = tile.bm, tile.bn, ceil_div(channels, depth)
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
        ("FC_DTYPE", code), *tile.defines, ("AXES", axes),
        ("OUT_PIXELS_FAST", int(pixels_fast(part.out_strides, part.out_channels)))), "sm_90a")
    grid = ceil_div(part.batch * math.prod(part.out_size), bm), ceil_div(part.out_channels, bn)
    # As `_results` need less than the stages, barriers and targets lie behind those.
    smem = 1024 + tile.stages * ((bm + bn) * depth * 2 + 2 * 8) + bm * TARGET
    return Launch(kernel, grid, (288,), (s, np.int32(blocks), np.int32(relu)), smem, pack, (image, weights))


def weight_grad_mma(problem: ConvProblem, in_channels: int, out_channels: int,
                    multiprocessors: int) -> tuple[Launch, int]:
    """Groups of `in_channels` and `out_channels` are read, which may be more than there are."""
    part = lattice.forward(problem)
    run = MMA_RUN[problem.dtype]
    step = MMA_RUNS * run
    width = in_channels * problem.taps
    bm, bn = (64 if n <= 64 else 128 for n in (out_channels, width))
    blocks = ceil_div(out_channels, bm) * ceil_div(width, bn) * part.groups
    splits, chunk = tiles.split(part.batch * math.prod(part.out_size), step, blocks, part.groups, multiprocessors)
    s = structure(part)
    s["in_channels"], s["out_channels"] = in_channels, out_channels
    _, height, breadth = part.out_size
    kernel = Kernel("weight_grad_mma.cu", "weight_grad_mma", (
        ("FC_DTYPE", DTYPES[problem.dtype][0]), ("BM", bm), ("BN", bn)))
    grid = ceil_div(width, bn), ceil_div(out_channels, bm), part.groups * splits
    args = (s, digits(step, breadth, height, part.out_size[0]), np.int32(splits), np.int64(chunk),
            np.int32(part.in_channels), np.int32(part.out_channels))
    return Launch(kernel, grid, (256,), args, MMA_STAGES * step * (bm + bn + 16) * (16 // run) + 2 * step * 32), splits
