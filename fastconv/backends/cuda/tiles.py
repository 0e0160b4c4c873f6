"""Which tile a matrix product is cut into: arithmetic on sizes, without a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """A tile of `bm` x `bn` results, `bk` steps deep, of which each thread computes `tm` x `tn`.

    `efficiency` is the share of the peak that its inner loop can reach, the best of them 1.
    """

    bm: int
    bn: int
    bk: int
    tm: int
    tn: int
    efficiency: float

    @property
    def name(self) -> str:
        """"128x64"."""
        return f"{self.bm}x{self.bn}"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.bm // self.tm * (self.bn // self.tn)

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """What the kernel is compiled with."""
        return ("BM", self.bm), ("BN", self.bn), ("BK", self.bk), ("TM", self.tm), ("TN", self.tn)


class CoreTile(NamedTuple):
    """A tile of `bm` x `bn` results for tensor cores, with operands of `stages` steps on their way.

    `blocks` of them share a multiprocessor; `efficiency` is the share of what the fastest of them reached on an H200.
    """

    bm: int
    bn: int
    stages: int
    blocks: int
    efficiency: float

    @property
    def name(self) -> str:
        """"128x64"."""
        return f"{self.bm}x{self.bn}"

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """What the kernel is compiled with."""
        return ("BM", self.bm), ("BN", self.bn), ("STAGES", self.stages), ("BLOCKS", self.blocks)


# Each step of a thread reads tm + tn values of shared memory for tm * tn products.
LARGE = Tile(128, 128, 8, 8, 8, 1.0)
SMALL = Tile(64, 64, 16, 4, 4, 0.75)
NARROW = Tile(128, 32, 16, 4, 4, 0.7)
SIMT = {"float64": (SMALL, NARROW), "float32": (LARGE, SMALL, NARROW), "float16": (LARGE, SMALL, NARROW),
        "bfloat16": (LARGE, SMALL, NARROW)}
# Each step of a block reads bm + bn rows for bm * bn products. Stages are what shared memory has room for. Efficiencies
# are those of 652, 583 and 408 TFLOP/s by wgmma, 210 and 176 by mma, for 256 -> 256 channels of 3x3 on 56x56.
WGMMA = CoreTile(128, 256, 4, 1, 1.0), CoreTile(128, 128, 3, 2, 0.89), CoreTile(128, 64, 4, 2, 0.63)
MMA = CoreTile(128, 128, 4, 2, 0.32), CoreTile(128, 64, 4, 2, 0.27)

# Blocks that a multiprocessor runs at once: by registers and shared memory, two of 256 threads in any case.
RESIDENT = 2
# Splits of a weight gradient read and write sums once more each; at least this deep, that is little.
LEAST_CHUNK = 256
MOST_SPLITS = 1024


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def choose_tile(tiles: tuple[Tile, ...], rows: int, columns: int, batches: int, multiprocessors: int) -> Tile:
    """The tile with the least predicted time for `batches` products of `rows` x `columns`.

    Time is waves of blocks times the products of a block over its efficiency: tiles that hang over the edge and waves
    that leave multiprocessors idle both count.
    """
    def time(tile: Tile) -> float:
        blocks = ceil_div(rows, tile.bm) * ceil_div(columns, tile.bn) * batches
        # While there is less than a wave, what counts is the time of one block.
        waves = max(blocks / (multiprocessors * RESIDENT), 1.0)
        return waves * tile.bm * tile.bn / tile.efficiency

    return min(tiles, key=time)


def choose_core_tile(tiles: tuple[CoreTile, ...], rows: int, columns: int, batches: int,
                     multiprocessors: int) -> tuple[CoreTile, float]:
    """The same for tensor cores, and the predicted time of a step in depth.

    Time is that of the multiprocessor with the most blocks, in products that the fastest tile does meanwhile.
    """
    def time(tile: CoreTile) -> float:
        blocks = ceil_div(rows, tile.bm) * ceil_div(columns, tile.bn) * batches
        return ceil_div(blocks, multiprocessors) * tile.bm * tile.bn / tile.efficiency

    best = min(tiles, key=time)
    return best, time(best)


def split(depth: int, step: int, blocks: int, groups: int, multiprocessors: int) -> tuple[int, int]:
    """Into how many splits the depth of a weight gradient is cut, and how deep each is: a multiple of `step`.

    As many as fill the GPU, if one split has `blocks` blocks, and as the third axis of a grid holds.
    """
    wanted = ceil_div(multiprocessors * RESIDENT, max(blocks, 1))
    splits = max(1, min(wanted, depth // LEAST_CHUNK, MOST_SPLITS, 65535 // groups))
    chunk = max(ceil_div(ceil_div(depth, splits), step), 1) * step
    return max(ceil_div(depth, chunk), 1), chunk
