"""Predicted time of the algorithms, to choose between them on shapes that nobody has measured.

The unit is one cycle of a core. The constants are measured on Zen 4 and rounded; only ratios between algorithms matter.
What computes is counted in multiply-adds of whole vectors, of which a core starts one or two in a cycle.
"""

from __future__ import annotations

import itertools
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from fastconv.backends import _cpu
from fastconv.problem import ConvProblem

# Share of the FMA peak that a register tile reaches, and what it costs to begin and end one, in terms of its sum; a
# product of transforms is stored besides, and loaded again. Tiles of two vectors in channels_last do better.
TILE_SHARE = 0.9
TILE_TERMS = 8
PRODUCT_TERMS = 14
DIRECT_SHARE, DIRECT_TERMS = 0.96, 5
# Multiply-adds that each point and channel vector of a transform takes as long as; more through NCHW transposes, and by
# a factor for tiles of more than 6x6 points, which fit registers even less. In 3D everything takes longer than that, by
# a factor: hundreds of points do not fit registers, nor their pages a TLB; and again in phases, whose transforms and
# outputs are spread further; transforms of weights suffer most. A core that starts two 512-bit multiply-adds in a
# cycle makes transforms, which load and store more, by less faster (measured over 38 layers on Emerald Rapids).
WIDE_TRANSFORM_RATE = 1.25
INPUT_FMAS, OUTPUT_FMAS, TRANSPOSE_FMAS, LARGE_TILE = 6.5, 6.5, 3.0, 2.3
CROWDED, CROWDED_PHASES, CROWDED_WEIGHTS = 1.3, 1.8, 2.0
# Cycles that a point and channel vector of an input takes on its way to L3 and back, where blocks do not fit L2, and to
# memory where they take more than FAR_BYTES; those of 3D are in the factors above.
FAR_POINT_CYCLES, MEMORY_POINT_CYCLES = 13.0, 30.0
# What transforms take longer in sub-grids of a dilated convolution.
SPREAD = 3.0
# Cycles to load a vector of which only some channels exist, in channels_last.
PARTIAL_CYCLES = 19.0
# What a multiply-add takes longer in groups of several channels, whose lanes are picked.
PICKED = 1.45
# Cycles to bring a vector of channels from NCHW into place, plane by plane, or back; to begin with copying a run of
# channels.
MOVE_IN_CYCLES, MOVE_OUT_CYCLES, COPY_CYCLES = 30.0, 12.0, 8.0
DIRECT_STAGE_BYTES = 256 * 1024  # of a copy of the input (csrc/conv_direct.c)
# Cycles to gather a vector of pixels in NCHW, side by side, from rows that are shorter than a tile, or strided.
GATHER_CYCLES, BROKEN_GATHER_CYCLES, STRIDED_GATHER_CYCLES = 20.0, 70.0, 64.0
SECONDS_GATHER_CYCLES = 8.0  # every second pixel, by masks
# Cycles to find the pixels of a tile in another channel, in the second-level caches or, where no CPU foresees so many
# planes, in those beyond; elements of an input that the former hold.
CHANNEL_CYCLES, FAR_CHANNEL_CYCLES, NEAR_ELEMENTS = 15.0, 90.0, 512 * 1024
# Cycles to write an output of a phase, next to which others write theirs; to bring a weight into a panel of rows.
PHASE_CYCLES, PACK_ROW_CYCLES = 6.0, 5.5
# Bytes in a cycle that a core reads from L2, and from further away; weights up to this many bytes stay near.
NEAR_BYTES, FAR_BYTES_PER_CYCLE, NEAR_BYTES_PER_CYCLE = 256 * 1024, 10.0, 32.0

# Cycles to bring a vector of weights into a panel; to transform one for a point; what each takes longer where more than
# so many bytes of them go to memory and back. Tiles of a block of Winograd at least; bytes of a block that stay in L2,
# at most where it is so small, and in L3 (csrc/conv_winograd.c).
PACK_CYCLES, WEIGHT_CYCLES, MEMORY_CYCLES, PACKED_NEAR_BYTES = 12.0, 8.0, 22.0, 512 * 1024
FEW_TILES, BLOCK_BYTES, MOST_BYTES, FAR_BYTES, MANY_TILES = 12, 416 << 10, 640 << 10, 6 << 20, 56

# Most channels of a block of a weight gradient's input copy (csrc/conv_wgrad_direct.c); bytes of the sums of a block of
# Winograd's, and tiles that one more task for the same block is worth (csrc/conv_wgrad_winograd.c).
WGRAD_CHANNELS = 28
WGRAD_SUM_BYTES, WGRAD_SPLIT_TILES = 600 * 1024, 96
# Cycles for each vector: to copy operands, to store dw; for each point and vector: to transform sums of products.
# Multiply-adds that each point and channel vector of a weight gradient's transforms takes as long as: they go to L2.
VECTOR_CYCLES, STORE_CYCLES, SUM_CYCLES, WGRAD_FMAS = 2.0, 16.0, 16.0, 12.0


class Shape(NamedTuple):
    """A row of csrc/winograd.def."""

    name: str
    outputs: tuple[int, int, int]
    points: tuple[int, int, int]
    taps: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel that it serves in one piece."""
        return tuple(1 if n == 1 else self.taps for n in self.points)


class Phase(NamedTuple):
    """Outputs along one axis that are computed together, and how Winograd cuts the taps that they meet (fc_wino)."""

    size: int
    parts: tuple[int, ...]  # taps of each


@cache
def winograd_shapes() -> tuple[Shape, ...]:
    """The rows of csrc/winograd.def."""
    return tuple(Shape(*row) for row in _cpu.winograd_shapes())


def channels(p: ConvProblem, op: str) -> tuple[int, int]:
    """Channels of one group that a pass reads and writes."""
    c, k = p.in_channels // p.groups, p.out_channels // p.groups
    return (k, c) if op == "conv_input_grad" else (c, k)


def dilation(p: ConvProblem) -> tuple[int, ...]:
    """The dilation of axes along which the kernel has several taps; 1 along the others."""
    return tuple(d if k > 1 else 1 for d, k in zip(p.dilation, p.kernel, strict=True))


def direct(p: ConvProblem, op: str, isa: str, batch: int) -> float:
    """Predicted cycles of the direct algorithm: lanes are output channels, NCHW is transposed on its way in and out."""
    lanes = _cpu.vector_lanes(isa, p.dtype)
    read, written = channels(p, op)
    size, from_size = (p.in_size, p.out_size) if op == "conv_input_grad" else (p.out_size, p.in_size)
    macs = p.macs / p.batch * batch if p.batch else 0
    if op == "conv_weight_grad":
        copied = max(batch, 1) * p.groups * math.prod(size) * (_ceil_div(read, lanes) + _ceil_div(written, lanes))
        return (macs * _round_up(written, lanes) / written / (_rate(isa) * lanes) / TILE_SHARE + VECTOR_CYCLES * copied
                + _store(p, isa))
    wide = written > lanes and strides_written(p, op)[1] == 1
    share, terms = (DIRECT_SHARE, DIRECT_TERMS) if wide else (TILE_SHARE, TILE_TERMS)
    padded = _round_up(written, lanes) / written * (1 + terms / max(read * p.taps, 1))
    if p.taps == 1 and strides_written(p, op)[1] != 1:  # lanes are pixels
        padded = 1 + TILE_TERMS / max(read, 1) + 4 / written**2
    far = _read(4 * p.taps * read * written * p.groups, 1 + batch * math.prod(size) // 512)
    moved = hops = 0.0
    if p.taps > 1:
        if strides_read(p, op)[1] != 1:
            moved += MOVE_IN_CYCLES * math.prod(from_size) * max(read, 1) / lanes * _times_copied(p, op, from_size[2])
        moved += MOVE_OUT_CYCLES * math.prod(size) * _ceil_div(written, lanes) * (strides_written(p, op)[1] != 1)
    elif strides_written(p, op)[1] != 1 and strides_read(p, op)[1] > 1024:
        hops = math.prod(size) / (2 * lanes) * read * batch * p.groups
        hops *= CHANNEL_CYCLES if math.prod(size) * read * batch * p.groups <= NEAR_ELEMENTS else FAR_CHANNEL_CYCLES
    return max(macs * padded / (_rate(isa) * lanes) / share, far) + moved * batch * p.groups + hops


def _times_copied(p: ConvProblem, op: str, width: int) -> float:
    """How often the direct algorithm copies a row of inputs: with those of its neighbours under the same box."""
    step = p.stride[1] if op == "conv" else 1
    taps = p.kernel[1] if op == "conv" else _ceil_div(p.kernel[1], p.stride[1])
    span = p.dilation[1] * (taps - 1) + 1
    row_bytes = max(width * channels(p, op)[0], 1) * (4 if p.dtype == "float32" else 8)
    rows = max((DIRECT_STAGE_BYTES // row_bytes - span) // step + 1, 1)
    return max(((rows - 1) * step + span) / (rows * step), 1.0)


def pixels(p: ConvProblem, op: str, isa: str, batch: int) -> float:
    """Predicted cycles of the direct algorithm where lanes are pixels: a copy of the input, and no transposes."""
    lanes = _cpu.vector_lanes(isa, p.dtype)
    read, written = channels(p, op)
    size = p.out_size if op == "conv_input_grad" else p.in_size
    macs = p.macs / p.batch * batch if p.batch else 0
    terms = 1 + TILE_TERMS / max(read * p.taps, 1) + 4 / written**2  # few rows load more than they compute
    terms += 0.1 / max(read, 1)  # one for each tap
    if op == "conv":  # vectors of a row, or run on through the gaps between rows
        row, pitch = p.out_size[2], p.out_size[2] + (p.kernel[2] - 1) * p.dilation[2] // p.stride[2]
        whole = _round_up(row, lanes)
        terms *= (whole if 16 * whole <= 17 * pitch else pitch) / max(row, 1)
    copied = 2 * math.prod(size) * read / lanes
    if op == "conv_input_grad" and p.stride[2] > 1:
        copied += PHASE_CYCLES * math.prod(p.in_size) * written
    return macs * terms / (_rate(isa) * lanes) / TILE_SHARE + batch * p.groups * copied


def im2col(p: ConvProblem, op: str, isa: str, batch: int) -> float:
    """Predicted cycles of the algorithm that gathers patches; in NCHW lanes are pixels."""
    lanes = _cpu.vector_lanes(isa, p.dtype)
    read, written = channels(p, op)
    size = p.in_size if op == "conv_input_grad" else p.out_size
    pixels = batch * math.prod(size) * p.groups
    if strides_written(p, op)[1] == 1 and written > 1:
        run = COPY_CYCLES + (5 * read if read < lanes else 4 * _ceil_div(read, lanes))
        return direct(p, op, isa, batch) + pixels * p.taps * run
    macs = p.macs / p.batch * batch if p.batch else 0
    terms = 1 + TILE_TERMS / max(read * p.taps, 1) + 4 / written**2  # few rows load more than they compute
    gathered = GATHER_CYCLES if size[2] >= _cpu.tile(isa, p.dtype)[1] else BROKEN_GATHER_CYCLES
    if p.stride[2] > 1 and op == "conv":
        gathered = max(gathered, STRIDED_GATHER_CYCLES)
    return macs * terms / (_rate(isa) * lanes) / TILE_SHARE + gathered * pixels * p.taps * read / lanes


def strides_read(p: ConvProblem, op: str) -> tuple[int, ...]:
    """Strides of what a pass reads."""
    return p.y_strides if op == "conv_input_grad" else p.x_strides


def strides_written(p: ConvProblem, op: str) -> tuple[int, ...]:
    """Strides of what a pass writes."""
    return p.x_strides if op == "conv_input_grad" else p.y_strides


def channelwise(p: ConvProblem, op: str, isa: str, batch: int) -> float:
    """Predicted cycles of the algorithm for groups of few channels: lanes that no whole group fits are lost."""
    lanes = _cpu.vector_lanes(isa, p.dtype)
    read, written = channels(p, op)
    used = max(lanes // max(read, written), 1) * written
    picked = PICKED if max(read, written) > 1 else 1.0
    return p.macs / max(p.batch, 1) * batch / (_rate(isa) * used) / TILE_SHARE * picked


def reference(p: ConvProblem, batch: int) -> float:
    """Predicted cycles of NumPy's sums in float64."""
    return (p.macs / p.batch * batch if p.batch else 0) * 4.0


@cache
def clock() -> float:
    """Cycles of a core in a second, as Linux tells them, for times that people read; 3e9 elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "cpu MHz":
                return float(value) * 1e6
    except (OSError, ValueError):
        pass
    return 3e9


def winograd_phases(p: ConvProblem, op: str, shape: Shape) -> tuple[tuple[Phase, ...], ...]:
    """The phases of each axis: one in a forward pass, `stride` of them in a data gradient."""
    axes = []
    for n, m, kernel, stride, apart, taps in zip(
            p.in_size, p.out_size, p.kernel, p.stride, dilation(p), shape.kernel, strict=True):
        cut = _cut(kernel, stride, taps)
        if op == "conv_input_grad":
            axes.append(tuple(Phase(_ceil_div(_ceil_div(n, stride), apart), parts) for parts in cut))
        else:
            axes.append((Phase(_ceil_div(m, apart), tuple(itertools.chain(*cut))),))
    return tuple(axes)


@lru_cache(4096)
def _cut(kernel: int, stride: int, taps: int) -> tuple[tuple[int, ...], ...]:
    """Of each residue of the stride: its taps, in parts of at most `taps`."""
    residues = (_ceil_div(kernel - i, stride) for i in range(min(stride, kernel)))
    return tuple(tuple(min(taps, k - i) for i in range(0, k, taps)) for k in residues)


def winograd(p: ConvProblem, op: str, isa: str, shape: Shape, batch: int, packed: bool) -> float:
    """Predicted cycles of a Winograd shape; `packed` if the weights are transformed already."""
    if op == "conv_weight_grad":
        return _winograd_weight_grad(p, isa, shape, batch)
    lanes = _cpu.vector_lanes(isa, p.dtype)
    rows, columns = _cpu.tile(isa, p.dtype)
    read, written = channels(p, op)
    grids = _grids(p, p.in_size if op == "conv_input_grad" else p.out_size)
    points, axes = math.prod(shape.points), winograd_phases(p, op, shape)
    images = max(batch, 1) * grids
    tiles, terms, multiplied = (images * math.prod(sum(per_axis) for per_axis in counted) for counted in zip(*(
        _count(phases, m, n, r)
        for phases, m, n, r in zip(axes, shape.outputs, shape.points, shape.kernel, strict=True)), strict=True))
    height = tiles / max(_ceil_div(tiles, rows), 1)  # strips of few rows load more than they compute
    products = multiplied * read * _round_up(written, lanes) / (_rate(isa) * lanes) / TILE_SHARE
    products *= (1 + PRODUCT_TERMS / max(read * terms / max(tiles, 1), 1)) * (1 + 1 / max(height, 1))
    transform_rate = min(_rate(isa), WIDE_TRANSFORM_RATE) if isa == "avx512" else _rate(isa)
    transforms = _crowding(shape) * points / transform_rate * (
        terms * (_ceil_div(read, lanes) * (INPUT_FMAS + (TRANSPOSE_FMAS if strides_read(p, op)[1] != 1 else 0))
                 + (PARTIAL_CYCLES if strides_read(p, op)[1] == 1 and read % lanes else 0))
        + tiles * _ceil_div(written, lanes) * (OUTPUT_FMAS + (TRANSPOSE_FMAS if strides_written(p, op)[1] != 1 else 0)))
    if grids > 1:  # pixels lie in pages of their own, and in NCHW are gathered one by one
        transforms *= SPREAD
        if dilation(p)[2] > 1:
            gathered = terms * points * read * (strides_read(p, op)[1] != 1)
            gathered += tiles * math.prod(shape.outputs) * written * (strides_written(p, op)[1] != 1)
            by_masks = isa == "avx512" and dilation(p)[2] == 2
            transforms += (SECONDS_GATHER_CYCLES if by_masks else STRIDED_GATHER_CYCLES) * gathered / lanes
    itemsize = 4 if p.dtype == "float32" else 8
    depth = read * math.prod(max(len(phase.parts) for phase in phases) for phases in axes)
    few, tile_bytes = _round_up(FEW_TILES, rows), points * (depth + columns) * itemsize  # as conv_winograd.c cuts
    block, far = BLOCK_BYTES // tile_bytes // rows * rows, max(FAR_BYTES // tile_bytes // rows, 1) * rows
    if block < few and few * tile_bytes <= MOST_BYTES:
        block = few
    elif block < few:
        block = min(MANY_TILES // rows * rows, far)
        each = FAR_POINT_CYCLES if block * tile_bytes <= FAR_BYTES else MEMORY_POINT_CYCLES
        transforms += each * points * terms * _ceil_div(read, lanes) * (shape.points[0] == 1)
    vectors = points * depth * _round_up(written, columns) / lanes
    weights = vectors * lanes * itemsize
    crowded = 1.0
    if shape.points[0] > 1:
        crowded = CROWDED * (CROWDED_PHASES if any(len(phases) > 1 for phases in axes) else 1)
    computing = (max(products, _read(weights, _ceil_div(tiles, block))) + transforms) * crowded
    if packed:
        return p.groups * computing
    each = WEIGHT_CYCLES * (CROWDED_WEIGHTS if shape.points[0] > 1 else 1)
    phased = math.prod(map(len, axes))  # each phase has weights of its own
    far_away = p.groups * phased * weights > PACKED_NEAR_BYTES
    apart = computing + phased * vectors * (each + (MEMORY_CYCLES if far_away else 0))
    fused = (products + transforms) * crowded + vectors * each * max(_ceil_div(tiles, max(far, block)), phased)
    return p.groups * (min(apart, fused) if p.groups * written > columns else apart)


def packing(p: ConvProblem, op: str, isa: str, in_tasks: bool, as_rows: bool) -> float:
    """Predicted cycles to bring weights into place for the plain sum: `in_tasks` if they stay in L2 for their use,
    `as_rows` if lanes are pixels."""
    lanes, columns = _cpu.vector_lanes(isa, p.dtype), _cpu.tile(isa, p.dtype)[1]
    read, written = channels(p, op)
    if as_rows:
        return PACK_ROW_CYCLES * p.taps * read * written * p.groups
    weights = p.taps * read * _round_up(written, columns) * p.groups
    far = not in_tasks and weights * (4 if p.dtype == "float32" else 8) > PACKED_NEAR_BYTES
    return weights / lanes * (PACK_CYCLES + (MEMORY_CYCLES if far else 0))


def _grids(p: ConvProblem, size: tuple[int, ...]) -> int:
    """Sub-grids into which a dilation cuts what is written."""
    return math.prod(max(min(d, n), 1) for d, n in zip(dilation(p), size, strict=True))


def _count(phases: tuple[Phase, ...], outputs: int, points: int, taps: int) -> tuple[list[int], list[int], list[int]]:
    """Of each phase along an axis: tiles, tiles x parts, and tiles x parts x points that are multiplied."""
    tiles = [_ceil_div(phase.size, outputs) for phase in phases]
    return (tiles, [n * len(phase.parts) for n, phase in zip(tiles, phases, strict=True)],
            [n * sum(points - (points > 1 and k < taps) for k in phase.parts)
             for n, phase in zip(tiles, phases, strict=True)])


@cache
def _rate(isa: str) -> int:
    return _cpu.fma_rate(isa)


def _winograd_weight_grad(p: ConvProblem, isa: str, shape: Shape, batch: int) -> float:
    lanes = _cpu.vector_lanes(isa, p.dtype)
    read, written = channels(p, "conv_weight_grad")
    tiles = max(batch, 1) * _grids(p, p.out_size) * math.prod(
        _ceil_div(_ceil_div(n, d), m) for n, d, m in zip(p.out_size, dilation(p), shape.outputs, strict=True))
    points = math.prod(shape.points)
    side = math.isqrt(WGRAD_SUM_BYTES // (4 if p.dtype == "float32" else 8) // points) // lanes * lanes
    # Each block of dw transforms its operands anew, and each of its tasks its sums.
    blocks = _ceil_div(read, max(side, lanes)), _ceil_div(written, max(side, lanes))
    tasks = max(min(16 // (blocks[0] * blocks[1] * p.groups), tiles // WGRAD_SPLIT_TILES), 1)
    in_vectors, out_vectors = _ceil_div(read, lanes), _ceil_div(written, lanes)
    products = tiles * points * read * out_vectors / _rate(isa) / TILE_SHARE
    far_in, far_out = ((WGRAD_FMAS + (TRANSPOSE_FMAS if strides[1] != 1 else 0)) / _rate(isa)
                       for strides in (p.x_strides, p.y_strides))
    transforms = _crowding(shape) * tiles * points * (
        in_vectors * blocks[1] * far_in + out_vectors * blocks[0] * far_out)
    sums = tasks * points * read * out_vectors * SUM_CYCLES
    slices = p.kernel[0] if shape.points[0] == 1 else 1  # each depth of a kernel by itself
    return slices * p.groups * (products + transforms + sums) + _store(p, isa)


def _crowding(shape: Shape) -> float:
    """What transforms of a shape take longer than those of 6x6 points."""
    return LARGE_TILE if shape.points[2] > 6 else 1.0


def _store(p: ConvProblem, isa: str) -> float:
    """Cycles to write dw."""
    return p.taps * p.out_channels * (p.in_channels // p.groups) / _cpu.vector_lanes(isa, p.dtype) * STORE_CYCLES


def _read(size: float, times: float) -> float:
    """Cycles to read `size` bytes of weights `times` times."""
    return size * times / (NEAR_BYTES_PER_CYCLE if size <= NEAR_BYTES else FAR_BYTES_PER_CYCLE)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _ceil_div(n: int, m: int) -> int:
    return -(-n // m)
