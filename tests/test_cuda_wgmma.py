"""Convolutions by wgmma and the tensor memory accelerator of sm_90a, run by the emulator."""

import ctypes
import itertools
import random

import numpy as np
import pytest
from cases import CONVS, laid_out
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


def test_it_is_never_chosen_unasked():
    x, w = channels_last(np.ones((1, 64, 9, 9)), "float16"), device(np.ones((128, 64, 3, 3), np.float16))
    with emulated() as provider:
        functional.conv(x, w)
    assert provider.launched[-1].kernel.name == "conv_mma"


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
