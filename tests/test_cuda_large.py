"""Offsets beyond 2**31: small arrays whose elements lie far apart, in memory that is mapped but hardly used."""

import mmap
import sys

import numpy as np
import pytest
from cases import conv
from cuda_emulator import DeviceArray, device, emulated, host
from test_cuda_forms import check_copy
from test_cuda_mma import exact
from test_matrix_conv import PASSES, reference_of, run
from tolerance import assert_close

from fastconv import functional

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps memory as Linux does")

CASE = conv((2, 8, 4, 5), (8, 8, 3, 2), stride=(1, 2), padding=1)
# Elements from one sample, channel, row and column to the next.
APART = {"contiguous": (2**33 + 64, 2**30 + 32, 2**28, 1), "channels_last": (2**33 + 64, 1, 2**30 + 16, 2**27 + 8)}


def far_apart(values, dtype, order):
    """`values` in memory of which only the pages that hold them are there."""
    strides, size = APART[order], np.dtype(dtype).itemsize
    span = sum((n - 1) * step for n, step in zip(values.shape, strides, strict=True)) + 1
    assert span > 2**32
    try:
        memory = mmap.mmap(-1, span * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    except OSError as error:
        pytest.skip(f"no address space: {error}")
    view = np.ndarray(values.shape, dtype, memory, 0, [s * size for s in strides])
    view[...] = values
    return DeviceArray(view)


@pytest.mark.parametrize("order", APART)
@pytest.mark.parametrize(("dtype", "algorithm"), [
    ("float32", "simt 64x64"), ("float32", "direct"), ("float32", "mma"), ("float16", "mma")])
@pytest.mark.parametrize("op", PASSES)
def test_convolutions(op, dtype, algorithm, order):
    x, w, b, dy = exact(CASE, dtype)
    right = reference_of(CASE, x, w, b, dy)[op]
    shape = {"conv": CASE.y, "conv_input_grad": CASE.x, "conv_weight_grad": CASE.w}[op]
    out = far_apart(np.full(shape, np.nan), dtype, order)
    with emulated():
        run(op, CASE, far_apart(x, dtype, order), device(w.astype(dtype)), device(b.astype(dtype)),
            far_apart(dy, dtype, order), algorithm, out)
    n = CASE.reduction[op]
    assert_close(host(out), right, n if dtype == "float32" else 1, magnitude=n**0.5)


@pytest.mark.parametrize("order", APART)
def test_copies(order):
    """By tiles, for which `CASE` has too few channels, and by runs."""
    with emulated():
        check_copy(far_apart(np.random.default_rng(0).integers(-99, 99, (2, 24, 3, 5)), "float16", order), 1)


@pytest.mark.parametrize("order", APART)
def test_pools(order):
    values = np.random.default_rng(0).standard_normal((2, 3, 5, 6)).astype(np.float32)
    x = far_apart(values, "float32", order)
    y, at = functional.max_pool(values, 2, return_indices=True)
    mean = functional.avg_pool(values, 3, 2, 1)
    with emulated():
        out = far_apart(np.zeros_like(y), "float32", order)
        _, at_there = functional.max_pool(x, 2, return_indices=True, out=out)
        np.testing.assert_array_equal(host(out), y)
        np.testing.assert_array_equal(host(at_there), at)
        out = far_apart(np.zeros_like(mean), "float32", order)
        functional.avg_pool(x, 3, 2, 1, out=out)
        assert_close(host(out), functional.avg_pool(values.astype(np.float64), 3, 2, 1), 9)
        dx = far_apart(np.full_like(values, np.nan), "float32", order)
        functional.max_pool_grad(far_apart(y, "float32", order), at_there, values.shape, out=dx)
        np.testing.assert_array_equal(host(dx), functional.max_pool_grad(y, at, values.shape))
        dx = far_apart(np.full_like(values, np.nan), "float32", order)
        functional.avg_pool_grad(far_apart(mean, "float32", order), values.shape, 3, 2, 1, out=dx)
        assert_close(host(dx), functional.avg_pool_grad(mean.astype(np.float64), values.shape, 3, 2, 1), 4)
