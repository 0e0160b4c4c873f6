"""Depthwise planes in NCHW, which kernels with masks read in place: lengths around vectors, and borders."""

import itertools

import numpy as np
import pytest
from tolerance import assert_close

import fastconv.functional as F
from fastconv import config
from fastconv.backends import _cpu

WIDTHS = (4, 5, 7, 8, 9, 14, 15, 16, 17, 18, 28, 31, 32, 33, 34, 47, 49)
HEIGHTS = (6, 7, 8, 13, 14, 15)
PADDINGS = (0, 1, 2, ((0, 1), (1, 0)), ((2, 0), (0, 2)))


def guarded(shape, dtype):
    """A view whose rows, planes and images have NaN between them, and the array that it is a view of."""
    whole = np.full((shape[0], shape[1] + 1, *(n + 2 for n in shape[2:-1]), shape[-1] + 3), np.nan, dtype)
    return whole[:, 1:, *(slice(1, -1),) * (len(shape) - 3), 2:-1], whole


@pytest.fixture(params=_cpu.available_isas())
def isa(request):
    with config(isa=request.param):
        yield request.param


def draw(rng, shape, dtype):
    view, _ = guarded(shape, dtype)
    view[...] = rng.standard_normal(shape)
    return view


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_planes(isa, dtype, padding):
    rng = np.random.default_rng(0)
    for count, (height, width) in enumerate(itertools.product(HEIGHTS, WIDTHS)):
        channels, batch = (1, 2, 3, 17)[count % 4], 1 + count % 2
        x = draw(rng, (batch, channels, height, width), dtype)
        w = rng.standard_normal((channels, 1, 3, 3)).astype(dtype)
        bias = rng.standard_normal(channels).astype(dtype) if count % 3 else None
        if count % 5 == 0:
            w[-1, 0, 0, 0] = np.inf  # zeros of the padding take part, too
        with np.errstate(invalid="ignore"):
            expected = F.conv2d(x, w, bias, padding=padding, groups=channels, algorithm="reference")
        out, whole = guarded(expected.shape, dtype)
        F.conv2d(x, w, bias, padding=padding, groups=channels, algorithm="channelwise", out=out)
        infinite = ~np.isfinite(expected)
        np.testing.assert_array_equal(out[infinite], expected[infinite])
        assert_close(np.where(infinite, 0, out), np.where(infinite, 0, expected), 10)
        out[...] = np.nan
        assert np.isnan(whole).all()  # nothing beside it was written


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_of_planes(isa, dtype):
    """The taps descend."""
    rng = np.random.default_rng(1)
    for width, padding in itertools.product(WIDTHS, PADDINGS):
        shape, w = (2, 5, 9, width), rng.standard_normal((5, 1, 3, 3)).astype(dtype)
        dy = draw(rng, F.conv2d(np.zeros(shape, dtype), w, padding=padding, groups=5).shape, dtype)
        dx = {a: F.conv_input_grad(shape, w, dy, padding=padding, groups=5, algorithm=a)
              for a in ("channelwise", "reference")}
        assert_close(dx["channelwise"], dx["reference"], 9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("taps", "padding", "stride", "dilation"), [
    ((3, 3, 3), 1, 1, 1), ((3, 3, 3), 0, (2, 1, 1), 1), ((2, 3, 3), (1, 2, 0), 1, (2, 1, 1)), ((1, 3, 3), 1, 1, 1),
    ((3, 3, 3), 1, (1, 2, 1), 1), ((3, 3, 3), 1, 1, (1, 1, 2)),
])  # fmt: skip
def test_volumes(isa, dtype, taps, padding, stride, dilation):
    """Slices of padding have no input at all."""
    rng = np.random.default_rng(2)
    for depth, height, width, channels in ((3, 7, 7, 4), (5, 9, 20, 3), (4, 15, 33, 1), (3, 8, 5, 33)):
        x = draw(rng, (2, channels, depth, height, width), dtype)
        w = rng.standard_normal((channels, 1, *taps)).astype(dtype)
        y = {a: F.conv3d(x, w, None, stride, padding, dilation, channels, algorithm=a)
             for a in ("channelwise", "reference")}
        assert_close(y["channelwise"], y["reference"], 27)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [(300, 40), (29, 1024), (8, 1030), (40, 2100)])
def test_bands_and_segments(isa, dtype, size):
    """Large planes are cut into tasks; all threads together make the bits of one."""
    rng = np.random.default_rng(3)
    x, w = draw(rng, (1, 2, *size), dtype), rng.standard_normal((2, 1, 3, 3)).astype(dtype)
    y = {}
    for threads in (1, 2, 3):
        with config(threads=threads):
            y[threads] = F.prepare_conv(w, padding=1, groups=2, activation="relu", algorithm="channelwise")(x)
    expected = np.maximum(F.conv2d(x, w, padding=1, groups=2, algorithm="reference"), 0)
    assert_close(y[1], expected, 9)
    np.testing.assert_array_equal(y[1], y[2])
    np.testing.assert_array_equal(y[1], y[3])
