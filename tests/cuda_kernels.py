"""Every form of every kernel of the GPU backend, for the tests that compile them all."""

from __future__ import annotations

import itertools

from fastconv.arrays import SHORT_FLOATS
from fastconv.backends.cuda import tiles
from fastconv.backends.cuda.device import Kernel
from fastconv.backends.cuda.launches import DTYPES
from fastconv.backends.cuda.plan import TAPS
from fastconv.backends.cuda.tensor_cores import MMA_RUN

KINDS = (-1, 0, 1, 2)


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
        if dtype in MMA_RUN:
            kernels += [Kernel("conv_mma.cu", "conv_mma", (number, *core.defines, ("OUT_PIXELS_FAST", fast)))
                        for core, fast in itertools.product(tiles.MMA, (0, 1))]
            if dtype in SHORT_FLOATS:
                kernels += [Kernel("conv_wgmma.cu", "conv_wgmma", (
                    number, *core.defines, ("AXES", axes), ("OUT_PIXELS_FAST", fast)), "sm_90a")
                    for core, axes, fast in itertools.product(tiles.WGMMA, (2, 3), (0, 1))]
            kernels += [Kernel("channels_last.cu", "channels_last", (number, *form)) for form in (
                (("TILES", 1),), (("TILES", 0), ("CHANNELS_FAST", 0)), (("TILES", 0), ("CHANNELS_FAST", 1)))]
            kernels += [Kernel("weight_grad_mma.cu", "weight_grad_mma", (number, ("BM", bm), ("BN", bn)))
                        for bm, bn in itertools.product((64, 128), (64, 128))]
            kernels.append(Kernel("pack_weights.cu", "pack_weights", (number,)))
        kernels.append(Kernel("weight_grad_finish.cu", "weight_grad_finish", (number,)))
        kernels += [Kernel("conv_direct.cu", "conv_direct", (number, ("CHANNELS_FAST", fast))) for fast in (0, 1)]
        kernels += [Kernel("weight_grad_direct.cu", "weight_grad_direct", (number, ("LANES", lanes), ("TAPS", taps)))
                    for lanes, taps in itertools.product((1, 32), TAPS)]
        for fast, index in itertools.product((0, 1), ("int", "int64")):
            form = (("CHANNELS_FAST", fast), ("LANES", 1), ("INDEX", index))
            shared = (("CHANNELS_FAST", 0), ("LANES", 32), ("INDEX", index))
            kernels += [Kernel("pool.cu", name, (number, (name.upper(), 1), *form)) for name in ("max_pool", "gather")]
            kernels += [Kernel("pool.cu", name, (number, (name.upper(), 1), *form, ("KIND", kind)))
                        for name, kind in itertools.product(("sum_pool", "sum_pool_grad"), KINDS)]
            if not fast:
                kernels.append(Kernel("pool.cu", "max_pool", (number, ("MAX_POOL", 1), *shared)))
                kernels += [Kernel("pool.cu", "sum_pool", (number, ("SUM_POOL", 1), *shared, ("KIND", kind)))
                            for kind in KINDS]
        kernels += [Kernel("pool.cu", "scatter", (
            number, ("SCATTER", 1), ("CHANNELS_FAST", 0), ("LANES", 1), ("INDEX", "int64"), ("ADDS", adds)))
            for adds in (0, 1)]
    return kernels


def name_of(kernel: Kernel) -> str:
    """A name for a test."""
    return "-".join([kernel.name, *(f"{k.removeprefix('FC_')}={v}" for k, v in kernel.defines)])
