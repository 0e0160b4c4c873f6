"""Every form of every kernel of the GPU backend, for the tests that compile them all."""

from __future__ import annotations

import itertools

from fastconv.backends.cuda import tiles
from fastconv.backends.cuda.conv import DTYPES
from fastconv.backends.cuda.device import Kernel


def every() -> list[Kernel]:
    """All that the host code can ask for."""
    kernels = []
    for dtype, (code, _) in DTYPES.items():
        number = ("FC_DTYPE", code)
        for tile, first, second in itertools.product(tiles.SIMT[dtype], (0, 1), (0, 1)):
            kernels += [
                Kernel("conv_simt.cu", "conv_simt",
                       (number, *tile.defines, ("PIXELS_FAST", first), ("OUT_FAST", second))),
                Kernel("weight_grad_simt.cu", "weight_grad_simt",
                       (number, *tile.defines, ("DY_PIXELS_FAST", first), ("IN_PIXELS_FAST", second)))]
        kernels.append(Kernel("weight_grad_finish.cu", "weight_grad_finish", (number,)))
    return kernels


def name_of(kernel: Kernel) -> str:
    """A name for a test."""
    return "-".join([kernel.name, *(f"{k.removeprefix('FC_')}={v}" for k, v in kernel.defines)])
