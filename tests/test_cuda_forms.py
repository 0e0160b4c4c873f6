"""Every form of every kernel of the GPU backend, by the emulator: in three orders of warps, and with copies of cp.async
that land at once or as late as they may.

A few cases of the tables of the CPU's tests are enough to launch them all, which is counted; the tables themselves run
in `test_cuda_conv`, `test_cuda_mma` and `test_cuda_pool`.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from cases import CONVS
from cuda_emulator import SCHEDULES, DeviceArray, compile_all, emulated, host, require_compiler
from cuda_kernels import every
from test_cuda_conv import check as check_conv
from test_cuda_mma import CASES as MMA_CASES
from test_cuda_mma import dtype_named, exact
from test_cuda_pool import check as check_pool
from test_matrix_conv import LAYOUTS
from test_matrix_pool import LAYOUTS as POOL_LAYOUTS
from test_matrix_pool import POOLS, POWERS
from tolerance import assert_close

from fastconv import functional
from fastconv.arrays import SHORT_FLOATS
from fastconv.backends.cuda import pool, tiles
from fastconv.backends.cuda.conv import _copier
from fastconv.backends.cuda.launches import DTYPES
from fastconv.backends.cuda.tensor_cores import MMA_RUN, image_layout
from fastconv.problem import conv_problem

# Channels and pixels lie closer together by turns: in the operand that is read first, and in the other one.
ALL_LAYOUTS, SAME_LAYOUTS = LAYOUTS[:4], LAYOUTS[:2]
# Above and below 64 channels of the result, and of the depth, where tiles of weight gradients are another.
WIDE, DEEP, BOTH, SMALL = "65 out channels", "stride 2", "long reduction to x", "1x1 stride 2"


def forms(dtype, *, pools):
    """Those of a dtype, compiled side by side."""
    require_compiler()
    found = {k for k in every() if (k.source == "pool.cu") is pools and dict(k.defines)["FC_DTYPE"] == DTYPES[dtype][0]}
    compile_all(found)
    return found


def convolutions(dtype):
    """(pass, case, layouts, algorithm)."""
    for tile in tiles.SIMT[dtype]:
        for layouts in ALL_LAYOUTS:
            yield "conv_weight_grad", "3 groups of primes", layouts, f"simt {tile.name}"
        for layouts in SAME_LAYOUTS:  # weights are read along other axes in the two passes
            yield "conv", "3 groups of primes", layouts, f"simt {tile.name}"
            yield "conv_input_grad", "3 groups of primes", layouts, f"simt {tile.name}"
    for layouts in SAME_LAYOUTS:
        yield "conv", "depthwise, dilation", layouts, "direct"
        for case in ("1x1 stride 2", "length 5", "3d mixed"):  # one tap, three, more
            yield "conv_weight_grad", case, layouts, "direct"
        if dtype in MMA_RUN:
            for tile in tiles.MMA:
                yield "conv", WIDE, layouts, f"mma {tile.name}"
    if dtype in MMA_RUN:
        yield "conv_input_grad", DEEP, SAME_LAYOUTS[0], "mma"
        for case in (WIDE, DEEP, BOTH, SMALL):
            yield "conv_weight_grad", case, SAME_LAYOUTS[0], "mma"
    if dtype in SHORT_FLOATS:
        for case, layouts, tile in itertools.product(("several tiles", "depth"), SAME_LAYOUTS, tiles.WGMMA):
            yield "conv", case, layouts, f"wgmma {tile.name}"


def pools():
    """(pass, case, layouts, number of the power)."""
    for case, layouts in (("3d mixed", POOL_LAYOUTS[0]), ("3d mixed", POOL_LAYOUTS[1]), ("global 3d", POOL_LAYOUTS[0])):
        for op in ("max_pool", "max_pool_grad", "max_unpool", "max_unpool_grad", "avg_pool", "avg_pool_grad"):
            yield op, case, layouts, 0
        for number in range(len(POWERS) - 1):
            yield "lp_pool", case, layouts, number
            yield "lp_pool_grad", case, layouts, number


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions(dtype, schedule):
    number, wanted, launched = dtype_named(dtype), forms(dtype, pools=False), set()
    for op, name, layouts, algorithm in convolutions(dtype):
        case = MMA_CASES.get(name) or CONVS[name]
        launched |= check_conv(op, case, number, layouts, schedule, algorithm, exact(case, dtype))
    assert launched == wanted


def spaced(values, dtype, first, gap):
    """On the device, channels side by side: `first` elements behind a multiple of 16 bytes, `gap` behind each pixel."""
    pixels = np.moveaxis(values, 1, -1)
    shape = *pixels.shape[:-1], pixels.shape[-1] + gap
    buffer = np.full(math.prod(shape) + 64, 7, dtype)
    start = -buffer.__array_interface__["data"][0] % 16 // buffer.itemsize + first
    view = buffer[start:start + math.prod(shape)].reshape(shape)[..., :pixels.shape[-1]]
    view[...] = pixels
    return DeviceArray(np.moveaxis(view, -1, 1))


@pytest.mark.parametrize("schedule", ["forward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_in_runs(dtype, schedule):
    """And such, of results and residuals, whose pixels do not start with a run."""
    number, case = dtype_named(dtype), MMA_CASES["several tiles"]
    x, w, b, _ = exact(case, dtype)
    residual = np.random.default_rng(1).integers(-9, 9, case.y)
    right = np.maximum(functional.conv(x, w, b, *case.arguments) + residual, 0)
    algorithms = ["simt", *["mma"] * (dtype in MMA_RUN), *["wgmma"] * (dtype in SHORT_FLOATS)]
    for algorithm, (first, gap, *third) in itertools.product(
            algorithms, ((0, 0, 0, 0), (0, 8, 0, 0), (1, 0, 0, 0), (0, 3, 0, 0), (0, 0, 1, 0), (0, 0, 0, 3))):
        with emulated(SCHEDULES[schedule]):
            run = functional.prepare_conv(DeviceArray(w.astype(number)), DeviceArray(b.astype(number)), *case.arguments,
                                          activation="relu", algorithm=algorithm)
            y = spaced(np.zeros(case.y), number, first, gap)
            run(spaced(x, number, 0, 0), residual=spaced(residual, number, *third), out=y)
        assert_close(host(y), right, 1 if number.itemsize == 2 else 144, magnitude=144**0.5)
        memory = host(y).base.reshape(-1)
        assert (memory != 7).sum() <= right.size, "written beside the result"


# Copies for tensor cores: shape, groups, bytes of float16 and float32 that lie together, and a view of a larger array.
COPIES = {
    "16 bytes": ((2, 70, 4, 16), 1, (16, 16), lambda x: x),
    "8 bytes": ((2, 70, 2, 6), 1, (8, 16), lambda x: x),
    "4 bytes": ((3, 70, 3, 6), 1, (4, 8), lambda x: x),
    "one element": ((3, 33, 3, 3), 1, (2, 4), lambda x: x),
    "one sample": ((1, 64, 5, 16), 1, (16, 16), lambda x: x),
    "depth": ((2, 24, 3, 4, 6), 1, (16, 16), lambda x: x),
    "length": ((2, 66, 136), 1, (16, 16), lambda x: x),
    "rows of 16 bytes": ((2, 34, 5, 24), 1, (16, 16), lambda x: x[..., 8:]),
    "rows of 8 bytes": ((2, 34, 5, 20), 1, (8, 16), lambda x: x[..., :12]),
    "planes": ((2, 34, 4, 4, 8), 1, (16, 16), lambda x: x[:, :, 1:3]),
    "gaps": ((2, 34, 6, 12), 1, (2, 4), lambda x: x[..., ::2]),
    "backwards": ((2, 34, 3, 8), 1, (2, 4), lambda x: x[:, ::-1, ::-1, ::-1]),
    "whole groups": ((2, 48, 3, 8), 2, (16, 16), lambda x: x),
    "groups with zeros": ((2, 42, 3, 8), 2, (16, 16), lambda x: x),
    "wide groups with zeros": ((1, 201, 3, 8), 3, (16, 16), lambda x: x),
    "few channels": ((3, 3, 9, 11), 1, (2, 4), lambda x: x),
    "few groups": ((3, 6, 9, 11), 2, (2, 4), lambda x: x),
    "channels side by side": ((2, 5, 7, 35), 1, (2, 4), lambda x: np.moveaxis(x, -1, 1)),
    "few channels side by side": ((2, 5, 7, 3), 1, (2, 4), lambda x: np.moveaxis(x, -1, 1)),
    "groups side by side": ((2, 5, 7, 14), 2, (2, 4), lambda x: np.moveaxis(x, -1, 1)),
    "one pixel": ((5, 21, 1, 1), 1, (2, 4), lambda x: x),
    "one channel": ((2, 1, 8, 8), 1, (16, 16), lambda x: x),
}


def check_copy(x, groups, together=None, fetch=host):
    """Of `x` on the device into groups of padded channels side by side."""
    each = x.shape[1] // groups
    problem = conv_problem(x, np.empty((groups, each, *(1,) * (x.ndim - 2)), x.dtype), groups=groups)
    size = problem.in_size
    strides, padded, copy = image_layout(problem, size, problem.x_strides, each, False)
    assert together in (None, int(copy.source["together"]))
    y = fetch(_copier(copy, x.dtype)(x)).reshape(problem.batch, *size, groups, padded)
    assert [step * y.itemsize for step in strides] == [y.strides[0], y.itemsize, *y.strides[1:4]]
    right = np.moveaxis(fetch(x).reshape(problem.batch, groups, each, *size), (1, 2), (-2, -1))
    np.testing.assert_array_equal(y[..., :each], right)
    assert not y[..., each:].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", sorted(MMA_RUN))
def test_copies(dtype, schedule):
    """From any address."""
    number = dtype_named(dtype)
    for shape, groups, together, view in COPIES.values():
        for first in range(16 // number.itemsize):
            values = np.random.default_rng(first).integers(-99, 99, shape)
            buffer = np.full(values.size + 64, 7, number)
            start = -buffer.__array_interface__["data"][0] % 16 // number.itemsize + first
            x = buffer[start:start + values.size].reshape(shape)
            x[...] = values
            with emulated(SCHEDULES[schedule]):
                check_copy(DeviceArray(view(x)), groups, together[number.itemsize // 4])


@pytest.mark.parametrize("index", ["int", "int64"])
@pytest.mark.parametrize("schedule", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pools(dtype, schedule, index, monkeypatch):
    """Copies of cp.async are in none of them. Large arrays count elements in 64 bits; here all do."""
    if index == "int64":
        monkeypatch.setattr(pool, "MOST_INT", 0)
    wanted, launched = forms(dtype, pools=True), set()
    for op, name, layouts, number in pools():
        launched |= check_pool(op, POOLS[name], dtype, layouts, number, schedule)
    assert launched == {k for k in wanted if dict(k.defines)["INDEX"] == index or k.name == "scatter"}


def test_pools_copy_nothing_asynchronously():
    assert "cp_async" not in (Path(pool.__file__).parent / "pool.cu").read_text()
