"""Convolutions of the GPU backend, run by the emulator, against the NumPy reference.

Every case of the table runs in every pass; dtype, memory layouts, schedule of the warps and tile are drawn, so
that each of them meets each pass many times. ``FASTCONV_LONG=1`` runs the whole product instead.
"""

import importlib
import itertools
import os
import random

import numpy as np
import pytest
from cases import CONVS, Guarded, allocate, laid_out
from cuda_emulator import SCHEDULES, DeviceArray, device, emulated, host
from test_matrix_conv import LAYOUTS, PASSES, expected, operands, reference_of, run
from tolerance import assert_close

from fastconv import functional
from fastconv.arrays import empty, memory_order
from fastconv.backends.cuda import tiles

LONG = os.environ.get("FASTCONV_LONG", "") not in ("", "0")
DTYPES = ("float32", "float64")
ALGORITHMS = {dtype: ["auto", "direct", *(f"simt {t.name}" for t in tiles.SIMT[dtype])] for dtype in DTYPES}


def check(op, case, dtype, layouts, schedule, algorithm, given=None):
    """Run one pass and compare; `given` are other operands. Sums of 16 bits are rounded once, at the end.

    Returns the kernels that were launched.
    """
    x, w, b, dy = given or operands(case)
    first, second, third = layouts
    x_layout, w_layout, dy_layout = (first, second, second) if op != "conv_input_grad" else (first, second, first)
    # views into larger buffers of NaN, which are "on the device" as they are: strides and surroundings count
    x, w, dy = (DeviceArray(laid_out(values, dtype, layout))
                for values, layout in ((x, x_layout), (w, w_layout), (dy, dy_layout)))
    shape = {"conv": case.y, "conv_input_grad": case.x, "conv_weight_grad": case.w}[op]
    guarded = Guarded(shape, dtype, third) if third else None
    out = DeviceArray(guarded.view) if guarded else None
    with emulated(SCHEDULES[schedule]) as provider:
        y = run(op, case, x, w, device(b.astype(dtype)), dy, algorithm, out)
    if guarded:
        assert y is out or host(y) is guarded.view
        result = guarded.result()
    else:
        result = host(y)
        order = memory_order(host(dy if op == "conv_input_grad" else x))
        assert result.strides == empty(shape, dtype, order).strides
    n = case.reduction[op]
    right = (reference_of(case, *given) if given else expected(case))[op]
    assert_close(result, right, 1 if result.itemsize == 2 else n, magnitude=n**0.5)
    return {launched.kernel for launched in provider.launched}


def drawn():
    """(case, pass, dtype, layouts, schedule, algorithm): each case in each pass, the rest drawn."""
    for name, op in itertools.product(CONVS, PASSES):
        draw = random.Random(f"{name} {op}")
        dtype = draw.choice(DTYPES)
        yield name, op, dtype, draw.choice(LAYOUTS), draw.choice(list(SCHEDULES)), draw.choice(ALGORITHMS[dtype])


def every():
    """The whole product."""
    for dtype in DTYPES:
        yield from itertools.product(CONVS, PASSES, (dtype,), LAYOUTS, SCHEDULES, ALGORITHMS[dtype])


ROWS = list(every() if LONG else drawn())


@pytest.mark.parametrize(("name", "op", "dtype", "layouts", "schedule", "algorithm"), ROWS)
def test_matrix(name, op, dtype, layouts, schedule, algorithm):
    check(op, CONVS[name], dtype, layouts, schedule, algorithm)


def test_every_form_of_the_kernels_runs():
    """What is drawn meets every dtype, tile and schedule in every pass."""
    seen = {(op, dtype, algorithm, schedule) for _, op, dtype, _, schedule, algorithm in drawn()}
    for op in PASSES:
        for dtype in DTYPES:
            assert {a for o, d, a, _ in seen if (o, d) == (op, dtype)} == set(ALGORITHMS[dtype])
        assert {s for o, _, _, s in seen if o == op} == set(SCHEDULES)


def test_the_bits_do_not_depend_on_the_schedule():
    case = CONVS["many pixels"]
    x, w, b, dy = (device(v.astype(np.float32)) for v in operands(case))
    for op in PASSES:
        bits = set()
        for flags in SCHEDULES.values():
            with emulated(flags):
                bits.add(host(run(op, case, x, w, b, dy, "auto", None)).tobytes())
        assert len(bits) == 1, op


def test_a_weight_gradient_is_split():
    case = CONVS["many pixels"]
    x, w, b, dy = (device(v.astype(np.float32)) for v in operands(case))
    with emulated() as provider:
        run("conv_weight_grad", case, x, w, b, dy, "auto", None)
    first, finish = provider.launched
    assert first.grid[2] > 10
    assert finish.kernel.name == "weight_grad_finish"


def test_transposed_convolution_with_bias():
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((2, 6, 5, 4), (6, 3, 3, 2), (6,)))
    arguments = {"stride": (3, 4), "padding": 1, "output_padding": (1, 2), "groups": 2}  # some of y meets no tap
    right = functional.conv_transpose(x, w, b, **arguments)
    dy = rng.standard_normal(right.shape).astype(np.float32)
    with emulated():
        y = functional.conv_transpose(device(x), device(w), device(b), **arguments)
        dx = functional.conv_transpose_input_grad(device(dy), device(w), **arguments)
        dw = functional.conv_transpose_weight_grad(device(x), w.shape, device(dy), **arguments)
    assert_close(host(y), right, 18)
    assert_close(host(dx), functional.conv_transpose_input_grad(dy, w, **arguments), 18)
    assert_close(host(dw), functional.conv_transpose_weight_grad(x, w.shape, dy, **arguments), 40)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode):
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 6, 7), (4, 3, 3, 3)))
    right = functional.conv(x, w, padding=2, padding_mode=mode)
    dy = rng.standard_normal(right.shape).astype(np.float32)
    with emulated():
        y = functional.conv(device(x), device(w), padding=2, padding_mode=mode)
        dx = functional.conv_input_grad(x.shape, device(w), device(dy), padding=2, padding_mode=mode)
    assert_close(host(y), right, 27)
    assert_close(host(dx), functional.conv_input_grad(x.shape, w, dy, padding=2, padding_mode=mode), 40)


def test_nan_and_infinity_go_where_the_formula_says():
    case = CONVS["stride 2"]
    x, w, b, dy = (v.astype(np.float32) for v in operands(case))
    x, dy = x.copy(), dy.copy()
    x[0, 1, 2, 3], x[1, 0, 0, 0], dy[0, 0, 1, 1] = np.nan, np.inf, -np.inf
    for op in PASSES:
        right = run(op, case, x, w, b, dy, "reference", None)
        with emulated():
            y = host(run(op, case, *(device(v) for v in (x, w, b, dy)), "auto", None))
        assert_close(y, right, case.reduction[op])


def test_without_a_batch_and_linear():
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((3, 6, 7), (4, 3, 3, 3), (4,)))
    rows, v = rng.standard_normal((2, 5, 9)).astype(np.float32), rng.standard_normal((4, 9)).astype(np.float32)
    with emulated():
        assert_close(host(functional.conv2d(device(x), device(w), device(b))), functional.conv2d(x, w, b), 27)
    dy, wide = rng.standard_normal((2, 5, 4)).astype(np.float32), laid_out(rows, "float32", "strided")
    with emulated():
        for x in (rows, wide, rows):  # the last call is recognised
            assert_close(host(functional.linear(device(x), device(v), device(b))), functional.linear(rows, v, b), 9)
            assert_close(host(functional.linear_input_grad(device(dy), device(v))),
                         functional.linear_input_grad(dy, v), 4)
            assert_close(host(functional.linear_weight_grad(device(x), device(dy))),
                         functional.linear_weight_grad(rows, dy), 10)
        assert functional.linear(device(rows[:, :0]), device(v)).shape == (2, 0, 4)


def test_calls_with_the_same_layout_are_recognised():
    module = importlib.import_module("fastconv.functional.conv")  # the name is also that of a function
    x, w = device(np.ones((1, 2, 5, 5), np.float32)), device(np.ones((3, 2, 3, 3), np.float32))
    with emulated():
        module._repeats.clear()
        first = functional.conv(x, w)
        assert len(module._repeats) == 1
        np.testing.assert_array_equal(host(functional.conv(x, w)), host(first))
        assert len(module._repeats) == 1
        functional.conv(device(np.ones((1, 2, 5, 6), np.float32)), w)
        assert len(module._repeats) == 2
        with pytest.raises(TypeError, match="stride is True"):
            functional.conv(x, w, stride=True)


def test_errors():
    x, w = np.ones((1, 2, 5, 5), np.float32), np.ones((3, 2, 3, 3), np.float32)
    with emulated():
        with pytest.raises(TypeError, match="input is on the GPU and weight in host memory"):
            functional.conv(device(x), w)
        with pytest.raises(TypeError, match="weight is on the GPU and input in host memory"):
            functional.conv(x, device(w))
        with pytest.raises(TypeError, match="in host memory"):
            functional.conv(device(x), device(w), out=np.empty((1, 3, 3, 3), np.float32))
        with pytest.raises(ValueError, match="algorithm is 'im2col', but for arrays on the GPU"):
            functional.conv(device(x), device(w), algorithm="im2col")
        with pytest.raises(TypeError, match="float32 or float64"):
            functional.conv(device(x.astype(np.int32)), device(w))
        long = device(np.broadcast_to(np.float32(0), (1, 1, 2**28)))
        with pytest.raises(ValueError, match=r"fewer than 2\*\*28"):
            functional.conv(long, device(np.ones((1, 1, 1), np.float32)))


def test_guards_work():
    """The buffers of these tests are where kernels run: a write beside the output is seen."""
    _, view = allocate((1, 2, 3), np.float32, "channel_slice", 0)
    array = DeviceArray(view)
    assert array.data.ptr == view.__array_interface__["data"][0]


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_a_depthwise_convolution_is_direct_and_its_weight_gradient_split(order):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 6, 40, 41)).astype(np.float32), rng.standard_normal((6, 1, 3, 5)).astype(np.float32)
    x, dy = laid_out(x, "float32", order), laid_out(rng.standard_normal(x.shape), "float32", order)
    options = {"padding": (1, 2), "groups": 6}
    with emulated() as provider:
        y = functional.conv(device(x), device(w), **options)
        dw = functional.conv_weight_grad(device(x), w.shape, device(dy), **options)
    forward, backward, finish = provider.launched
    assert forward.kernel.name == "conv_direct"
    assert backward.kernel.name == "weight_grad_direct"
    assert backward.grid[2] > 1
    assert backward.grid[1] == 2  # of 15 taps, 9 at once
    assert finish.kernel.name == "weight_grad_finish"
    assert_close(host(y), functional.conv(x, w, **options), 15)
    assert_close(host(dw), functional.conv_weight_grad(x, w.shape, dy, **options), 3280)
