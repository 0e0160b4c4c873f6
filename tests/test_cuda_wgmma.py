"""Convolutions by wgmma and the tensor memory accelerator of sm_90a, run by the emulator."""

import ctypes
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from cases import CONVS, conv, laid_out
from cuda_emulator import SCHEDULES, DeviceArray, device, emulated, host
from nvrtc import compile_source
from test_cuda_conv import LONG, check
from test_cuda_mma import CASES, channels_last, dtype_named, exact, tiled
from test_matrix_conv import LAYOUTS, PASSES, reference_of, run
from tolerance import assert_close

from fastconv import functional
from fastconv.arrays import SHORT_FLOATS
from fastconv.backends.cuda import driver, tiles
from fastconv.backends.cuda.device import TensorMap, source_text
from fastconv.backends.cuda.plan import plan_for
from fastconv.problem import conv_input_grad_problem, conv_problem, conv_weight_grad_problem

OPS = PASSES[:2]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", SHORT_FLOATS)
@pytest.mark.parametrize("name", sorted(set(CASES) - {"groups"}))
def test_in_place(name, dtype, schedule):
    case, kind = CASES[name], dtype_named(dtype)
    x, w, b, dy = exact(case, dtype)
    right = reference_of(case, x, w, b, dy)
    with emulated(SCHEDULES[schedule]) as provider:
        for op in OPS:
            y = run(op, case, channels_last(x, dtype), DeviceArray(laid_out(w, kind, "contiguous")),
                    device(b.astype(kind)), channels_last(dy, dtype), tiled("wgmma", op, f"{name} {dtype} {schedule}"),
                    None)
            assert_close(host(y), right[op], 1, magnitude=case.reduction[op] ** 0.5)
    names = {launched.kernel.name for launched in provider.launched}
    assert names == ({"conv_wgmma", "pack_weights"} if case.x[0] else set())


def served(case):
    """Whether the map of the image holds this problem: see `test_what_is_refused`."""
    narrow = {len(case.x) - 2} <= {1, 2}
    reach = max((k - 1) * d for k, d in zip(case.w[2:], case.dilation, strict=True))
    pads = max(itertools.chain.from_iterable(case.padding))
    return case.groups == 1 and max(case.stride) <= 8 and reach <= (255 if narrow else 15) and pads <= (
        100 if narrow else 15)


def drawn():
    """(case, pass, dtype, layouts, schedule): each case that can be served in each pass, the rest drawn."""
    for name, op in itertools.product((n for n, case in CONVS.items() if served(case)), OPS):
        draw = random.Random(f"{name} {op}")
        yield name, op, draw.choice(SHORT_FLOATS), draw.choice(LAYOUTS), draw.choice(list(SCHEDULES))


def every():
    """The whole product."""
    return itertools.product((n for n, case in CONVS.items() if served(case)), OPS, SHORT_FLOATS, LAYOUTS, SCHEDULES)


ROWS = list(every() if LONG else drawn())


@pytest.mark.parametrize(("name", "op", "dtype", "layouts", "schedule"), ROWS)
def test_matrix(name, op, dtype, layouts, schedule):
    case = CONVS[name]
    check(op, case, dtype_named(dtype), layouts, schedule, tiled("wgmma", op, f"{name} {dtype}"), exact(case, dtype))


def test_most_cases_are_served():
    assert len({name for name, *_ in drawn()}) > len(CONVS) / 2


def test_residual_and_packed_weights():
    case = CASES["several tiles"]
    x, w, b, _ = exact(case, "float16")
    residual = np.random.default_rng(1).standard_normal(case.y).astype(np.float16)
    with emulated() as provider:
        conv = functional.prepare_conv(device(w.astype(np.float16)), device(b.astype(np.float16)), *case.arguments,
                                       activation="relu", algorithm="wgmma")
        for image in (channels_last(x, "float16"), device(x.astype(np.float16))):
            y = host(conv(image, residual=device(residual)))
            right = np.maximum(functional.conv(x, w, b, *case.arguments) + residual, 0)
            assert_close(y, right, 1, magnitude=144**0.5)
    assert [k.kernel.name for k in provider.launched] == ["pack_weights", "conv_wgmma", "channels_last", "conv_wgmma"]


# Depths: 64 for each tap by wgmma, and 8, 16, 24 or 32 by mma, which takes 2.3 times as long for an equal depth and 64
# out channels, and 3.1 times for 256.
@pytest.mark.parametrize(("case", "op", "name"), [
    (conv((32, 3, 224, 224), (64, 3, 7, 7), 2, 3), "conv", "mma"),
    (conv((32, 24, 56, 56), (64, 24, 3, 3), padding=1), "conv", "mma"),
    (conv((32, 32, 56, 56), (64, 32, 3, 3), padding=1), "conv", "wgmma"),
    (conv((32, 16, 56, 56), (256, 16, 3, 3), padding=1), "conv", "mma"),
    (conv((32, 24, 56, 56), (256, 24, 3, 3), padding=1), "conv", "wgmma"),
    (conv((32, 256, 56, 56), (256, 256, 3, 3), padding=1), "conv", "wgmma"),
    (conv((32, 8, 56, 56), (64, 8, 1, 1)), "conv", "wgmma"),  # a step of mma is 32 deep
    (conv((1, 1024, 14, 14), (256, 1024, 1, 1)), "conv", "wgmma"),
    (conv((2, 64, 9, 9, 9), (64, 64, 3, 3, 3), padding=1), "conv", "wgmma"),
    # Of a data gradient the out channels make the depth, and parts of a stride are taken together.
    (conv((32, 256, 56, 56), (16, 256, 3, 3), padding=1), "conv_input_grad", "mma"),
    (conv((32, 3, 224, 224), (64, 3, 7, 7), 2, 3), "conv_input_grad", "wgmma"),
    (conv((32, 128, 28, 28), (256, 128, 3, 3), 2, 1), "conv_input_grad", "wgmma"),
    # What it cannot run does without it.
    (conv((32, 256, 28, 28), (256, 256, 3, 3), padding=1), "conv_weight_grad", "mma"),
    (conv((32, 256, 28, 28), (256, 64, 3, 3), padding=1, groups=4), "conv", "mma"),
    (conv((4, 64, 90, 90), (64, 64, 3, 3), 9), "conv", "mma"),
    (conv((4, 64, 300, 8), (64, 64, 3, 1), dilation=128), "conv", "mma"),
    (conv((4, 64, 20, 20, 20), (64, 64, 3, 3, 3), dilation=16, padding=16), "conv", "mma"),
    (conv((4, 64, 8, 8), (64, 64, 1, 1), padding=129), "conv", "mma"),
])
def test_when_it_is_chosen_unasked(case, op, name):
    x, w, y = (np.empty(shape, np.float32) for shape in (case.x, case.w, case.y))
    problem = {"conv": lambda: conv_problem(x, w, *case.arguments),
               "conv_input_grad": lambda: conv_input_grad_problem(case.x, w, y, *case.arguments),
               "conv_weight_grad": lambda: conv_weight_grad_problem(x, case.w, y, *case.arguments)}[op]()
    assert plan_for(problem, op).algorithm == "simt"  # of float32
    for dtype in SHORT_FLOATS:
        problem = replace(problem, dtype=dtype)
        assert plan_for(problem, op).algorithm == name
        assert plan_for(problem, op, capability=(8, 0)).algorithm == "mma"
        assert plan_for(problem, op, capability=(10, 0)).algorithm == "mma"
        assert plan_for(problem, op, capability=(7, 5)).algorithm == "simt"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chosen_unasked_it_runs(schedule):
    """In place, behind a copy, and where it starts at no multiple of 16 bytes."""
    case = CASES["ragged channels"]
    x, w, b, dy = exact(case, "float16")
    right = reference_of(case, x, w, b, dy)
    with emulated(SCHEDULES[schedule]) as provider:
        for op in OPS:
            image = x if op == "conv" else dy
            for there in (channels_last(image, "float16"), device(image.astype(np.float16)), odd(image)):
                y = run(op, case, there, *(device(a.astype(np.float16)) for a in (w, b)), there, "auto", None)
                assert_close(host(y), right[op], 1, magnitude=case.reduction[op] ** 0.5)
                assert provider.launched[-1].kernel.name == "conv_wgmma"


def odd(values):
    """On the device, in channels_last order, two bytes behind a multiple of 16."""
    last = np.moveaxis(values, 1, -1)
    memory = np.zeros(last.size + 8, np.float16)
    start = -memory.__array_interface__["data"][0] // 2 % 8 + 1
    there = memory[start:start + last.size].reshape(last.shape)
    there[...] = last
    return DeviceArray(np.moveaxis(there, -1, 1))


def test_what_is_refused():
    x, w = np.ones((1, 16, 40, 40), np.float16), np.ones((16, 16, 3, 3), np.float16)

    def refused(words, *arguments, dtype=np.float16, weight=w, image=x, **options):
        with pytest.raises(ValueError, match=words):
            functional.conv(device(image.astype(dtype)), device(weight.astype(dtype)), *arguments, algorithm="wgmma",
                            **options)

    with emulated() as provider:
        refused("takes 16 bits, not float32", dtype=np.float32)
        refused("takes one group, not 2", weight=w[:, :8], groups=2)
        refused("strides up to 8", stride=9)
        refused("taps up to 255 apart", dilation=128, padding=128)
        refused("padding from -128 to 127", padding=129)
        refused("taps up to 31 apart", dilation=16, padding=(0, 16, 16), weight=w[:, :, None],
                image=np.stack([x, x], 2))
        with pytest.raises(ValueError, match="has no weight gradient"):
            functional.conv_weight_grad(device(x), w.shape, device(x), padding=1, algorithm="wgmma")
        provider.capability = lambda: (10, 0)
        refused(r"compute capability 10\.0, and 9\.0 is needed", padding=3)


def test_the_map_that_the_driver_is_asked_for(monkeypatch):
    """The order of arguments is that of cuda.h: ..., dims, strides, corners, channels, pixels, steps, ..."""
    asked = []

    def plain(argument):
        return list(argument) if isinstance(argument, ctypes.Array) else getattr(argument, "value", argument)

    class Library:
        def cuTensorMapEncodeIm2col(self, to, *rest):
            ctypes.memset(to, 7, 128)
            asked.append((to.value % 64, *map(plain, rest)))
            return 0

        def cuTensorMapEncodeTiled(self, to, *rest):
            return 1

    monkeypatch.setattr(driver, "_library", Library)
    image = TensorMap((16, 9, 8, 2), (32, 288, 2304), (64,), 128, (-1, -2), (-3, -4), (1, 2, 1, 1))
    encoded = driver.tensor_map(4096, "bfloat16", image)
    assert encoded.shape == ()
    assert encoded.tobytes() == b"\7" * 128
    assert asked == [(0, 9, 4, 4096, [16, 9, 8, 2], [32, 288, 2304], [-1, -2], [-3, -4], 64, 128, [1, 2, 1, 1],
                      0, 3, 3, 0)]
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled fails with CUresult 1"):
        driver.tensor_map(4096, "float16", TensorMap((64, 8), (128,), (64, 8)))


@pytest.mark.parametrize("first", [True, False])
def test_the_longer_name_of_an_architecture_wins(first):
    """CuPy adds the GPU's own, sm_90, behind ours."""
    defines = (("FC_DTYPE", 2), *tiles.WGMMA[0].defines, ("AXES", 2), ("OUT_PIXELS_FAST", 0))
    names = ("sm_90a", "sm_90") if first else ("sm_90", "sm_90a")
    compiled = compile_source(source_text("conv_wgmma.cu"), names[0], defines, f"-arch={names[1]}")
    assert "wgmma.mma_async" in compiled.ptx
