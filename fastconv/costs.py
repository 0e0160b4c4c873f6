"""Predicted time of the algorithms, to choose between them on shapes that nobody has measured.

The unit is one cycle of a core that starts two vector multiply-adds in each. The constants are counted from the
kernels (loads, adds and stores of a transform) and rounded; only ratios between algorithms matter.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from fastconv.backends import _cpu
from fastconv.problem import ConvProblem

# Share of the FMA peak that a register tile reaches, and what is lost where patches are gathered.
TILE_SHARE = 0.85
GATHER_SHARE = 0.75
# Cycles for each point and channel vector: input transform, output transform; more through NCHW transposes.
INPUT_CYCLES, OUTPUT_CYCLES, TRANSPOSE_CYCLES = 3.0, 2.0, 2.0
# Bytes in a cycle that a core reads from L2, and from further away; weights up to this many bytes stay near.
NEAR_BYTES, FAR_BYTES_PER_CYCLE, NEAR_BYTES_PER_CYCLE = 256 * 1024, 6.0, 32.0


class Shape(NamedTuple):
    """A row of csrc/winograd.def."""

    name: str
    outputs: tuple[int, int, int]
    points: tuple[int, int, int]
    taps: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel that it serves."""
        return tuple(1 if n == 1 else self.taps for n in self.points)


@cache
def winograd_shapes() -> tuple[Shape, ...]:
    """The rows of csrc/winograd.def."""
    return tuple(Shape(*row) for row in _cpu.winograd_shapes())


def channels(p: ConvProblem, op: str) -> tuple[int, int]:
    """Channels of one group that a pass reads and writes."""
    c, k = p.in_channels // p.groups, p.out_channels // p.groups
    return (k, c) if op == "conv_input_grad" else (c, k)


def direct(p: ConvProblem, op: str, isa: str, batch: int) -> float:
    """Predicted cycles of the direct algorithm."""
    lanes = _cpu.vector_lanes(isa, p.dtype)
    _, written = channels(p, op)
    by_pixels = (p.x_strides if op == "conv_input_grad" else p.y_strides)[1] == 1
    padded = _round_up(written, lanes) / written if by_pixels and written > lanes // 2 else 1
    size = p.in_size if op == "conv_input_grad" else p.out_size
    macs = p.macs / p.batch * batch if p.batch else 0
    inner = size[2] >= 2 * lanes or by_pixels
    far = _read(4 * p.taps * math.prod(channels(p, op)) * p.groups, 1 + batch * math.prod(size) // 512)
    return max(macs * padded / (2 * lanes) / (TILE_SHARE if inner else GATHER_SHARE), far)


def winograd(p: ConvProblem, op: str, isa: str, shape: Shape, batch: int, packed: bool) -> float:
    """Predicted cycles of a Winograd shape; `packed` if the weights are transformed already."""
    lanes = _cpu.vector_lanes(isa, p.dtype)
    rows, columns = _cpu.tile(isa, p.dtype)
    read, written = channels(p, op)
    size = p.in_size if op == "conv_input_grad" else p.out_size
    tiles = max(batch, 1) * math.prod(-(-n // m) for n, m in zip(size, shape.outputs, strict=True))
    points = math.prod(shape.points)
    strip = tiles / _round_up(tiles, rows) if tiles < 4 * rows else 1  # tiles of few rows load more than they compute
    products = tiles * points * read * _round_up(written, lanes) / (2 * lanes) / TILE_SHARE / (0.5 + 0.5 * strip)
    far_from = (p.y_strides, p.x_strides) if op == "conv_input_grad" else (p.x_strides, p.y_strides)
    transforms = tiles * points * (
        _vectors(read, lanes) * (INPUT_CYCLES + (TRANSPOSE_CYCLES if far_from[0][1] != 1 else 0))
        + _vectors(written, lanes) * (OUTPUT_CYCLES + (TRANSPOSE_CYCLES if far_from[1][1] != 1 else 0)))
    itemsize = 4 if p.dtype == "float32" else 8
    block = max(2 * rows, 320 * 1024 // itemsize // points // max(read, 1))
    weights = points * read * _round_up(written, columns) * itemsize
    # Transforming a panel of weights takes about one pass over the taps in double precision for each point.
    transforming = 0 if packed else weights / itemsize * shape.taps * 3 / lanes
    return p.groups * (max(products, _read(weights, -(-tiles // block))) + transforms + transforming)


def _read(size: float, times: float) -> float:
    """Cycles to read `size` bytes of weights `times` times."""
    return size * times / (NEAR_BYTES_PER_CYCLE if size <= NEAR_BYTES else FAR_BYTES_PER_CYCLE)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _vectors(n: int, lanes: int) -> int:
    return -(-n // lanes)
