"""Convolutions on tensor cores, run by the emulator: TF32, float16 and bfloat16. And 16 bits without them."""

import importlib
import itertools
import random

import numpy as np
import pytest
from cases import CONVS, conv, laid_out
from cuda_emulator import SCHEDULES, DeviceArray, device, emulated, host
from test_cuda_conv import LONG, check
from test_cuda_pool import POOLS, dtype_named
from test_matrix_conv import LAYOUTS, PASSES, reference_of, run
from tolerance import assert_close

from fastconv import functional, nn
from fastconv.arrays import SHORT_FLOATS
from fastconv.backends import reference
from fastconv.backends.cuda import tiles
from fastconv.functional.activations import ACTIVATIONS, find_activation

DTYPES = ("float32", *SHORT_FLOATS)
OTHERS = ("auto", "direct", *(f"simt {t.name}" for t in tiles.SIMT["float16"]))  # algorithms of 16 bits, besides
CASES = {
    "one step": conv((1, 32, 4, 5), (8, 32, 1, 1)),
    "several tiles": conv((2, 16, 11, 13), (136, 16, 3, 3), padding=1),
    "ragged channels": conv((1, 40, 7, 6), (72, 40, 3, 2), padding=(1, 0)),
    "few steps": conv((2, 8, 5, 7), (24, 8, 1, 2)),
    "stride, dilation, padding": conv((1, 24, 15, 14), (16, 24, 3, 3), (2, 3), ((1, 2), (0, 3)), (2, 1)),
    "groups": conv((1, 48, 6, 7), (72, 16, 3, 3), padding=1, groups=3),
    "depth": conv((1, 16, 5, 6, 7), (16, 16, 2, 3, 2), (1, 2, 1), 1),
    "depth, many channels": conv((1, 8, 3, 4, 5), (136, 8, 2, 1, 2)),
    "length": conv((2, 16, 33), (24, 16, 5), 2, 2),
    "no sample": conv((0, 16, 5, 5), (16, 16, 3, 3)),
}


def rounded(values, dtype):
    """`values` in float64, but exact in `dtype`; for TF32, whose eleven bits float16 has, exact in float16."""
    return values.astype(np.float16 if dtype == "float32" else dtype_named(dtype)).astype(np.float64)


def exact(case, dtype):
    """x, w, b and dy, float64, whose products a tensor core takes without rounding them."""
    rng = np.random.default_rng(0)
    return [rounded(rng.standard_normal(s), dtype) for s in (case.x, case.w, case.w[:1], case.y)]


def channels_last(values, dtype):
    """On the device, in channels_last order, from a multiple of 16 bytes on."""
    memory = np.moveaxis(values, 1, -1)
    dtype = dtype_named(dtype)
    bytes_ = memory.size * dtype.itemsize
    buffer = np.full(bytes_ + 64, 0xFF, np.uint8)
    start = -buffer.__array_interface__["data"][0] % 16
    aligned = buffer[start:start + bytes_].view(dtype).reshape(memory.shape)
    aligned[...] = memory
    return DeviceArray(np.moveaxis(aligned, -1, 1))


def tiled(algorithm, op, seed):
    """An algorithm of tensor cores with one of its tiles, drawn; small problems would always take the smallest."""
    table = {"mma": tiles.MMA, "wgmma": tiles.WGMMA}[algorithm]
    return algorithm if op == "conv_weight_grad" else f"{algorithm} {random.Random(seed).choice(table).name}"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_mma(name, dtype, schedule):
    case = CASES[name]
    x, w, b, dy = exact(case, dtype)
    right = reference_of(case, x, w, b, dy)
    with emulated(SCHEDULES[schedule]) as provider:
        for op in PASSES:  # each reads in place
            y = run(op, case, channels_last(x, dtype), DeviceArray(laid_out(w, dtype_named(dtype), "contiguous")),
                    device(b.astype(dtype_named(dtype))), channels_last(dy, dtype),
                    tiled("mma", op, f"{name} {dtype} {schedule}"), None)
            n = case.reduction[op] if dtype == "float32" else 1
            assert_close(host(y), right[op], n, magnitude=case.reduction[op] ** 0.5)
    names = {launched.kernel.name for launched in provider.launched}
    gradient = {"weight_grad_mma", "weight_grad_finish"}
    assert names == ({"conv_mma", "pack_weights"} | gradient if case.x[0] else gradient)


def test_tf32_rounds_to_eleven_bits():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 8, 6, 6)).astype(np.float32), rng.standard_normal((8, 8, 3, 3)).astype(np.float32)
    with emulated():
        y = host(functional.conv(channels_last(x, "float32"), device(w), algorithm="mma"))
    error = np.abs(y - functional.conv(x, w)).max()
    assert 1e-5 < error < 72**0.5 * 2**-9


def test_what_is_chosen():
    x, w = np.ones((1, 16, 6, 6)), np.ones((8, 16, 3, 3))
    with emulated() as provider:
        functional.conv(channels_last(x, "float32"), device(w.astype(np.float32)))
        assert provider.launched.pop().kernel.name == "conv_simt"  # never TF32 unasked
        there = channels_last(x, "float16")
        functional.conv(there, device(w.astype(np.float16)))
        assert provider.launched.pop().kernel.name == "conv_mma"
        memory = np.full(16 * 36 + 9, 1, np.float16)
        start = (-memory.__array_interface__["data"][0] // 2) % 8 + 1  # off by one element
        odd = DeviceArray(np.moveaxis(memory[start:start + 576].reshape(1, 6, 6, 16), -1, 1))
        y = functional.conv(odd, device(w.astype(np.float16)))
        assert [k.kernel.name for k in provider.launched[-3:]] == ["channels_last", "pack_weights", "conv_mma"]
        assert (host(y) == 144).all()
        for algorithm in ("mma 64x64", "auto 128x64", "direct 128x64"):
            with pytest.raises(ValueError, match=f"algorithm is '{algorithm}'"):
                functional.conv(there, device(w.astype(np.float16)), algorithm=algorithm)
        with pytest.raises(ValueError, match="no float64"):
            functional.conv(channels_last(x, "float64"), device(w), algorithm="mma")
        functional.conv_weight_grad(there, (16, 16, 3, 3), there, padding=1)
        assert [k.kernel.name for k in provider.launched[-2:]] == ["weight_grad_mma", "weight_grad_finish"]
        functional.conv_weight_grad(odd, (16, 16, 3, 3), there, padding=1)
        assert [k.kernel.name for k in provider.launched[-4:]] == [
            "channels_last", "channels_last", "weight_grad_mma", "weight_grad_finish"]
        provider.capability = lambda: (7, 5)
        importlib.import_module("fastconv.functional.conv")._repeats.clear()
        functional.conv(there, device(w.astype(np.float16)))
        assert provider.launched[-1].kernel.name == "conv_simt"
        with pytest.raises(ValueError, match=r"compute capability 7\.5, and 8\.0 or more"):
            functional.conv(there, device(w.astype(np.float16)), algorithm="mma")
    with pytest.raises(TypeError, match="float32 or float64"):
        functional.conv(x.astype(np.float16), w.astype(np.float16))  # on the CPU


def drawn():
    """(case, pass, dtype, layouts, schedule, algorithm): each case in each pass and dtype, the rest drawn."""
    for name, op, dtype in itertools.product(CONVS, PASSES, DTYPES):
        draw = random.Random(f"{name} {op} {dtype}")
        for algorithm in (tiled("mma", op, draw.random()), draw.choice(OTHERS))[:1 if dtype == "float32" else 2]:
            yield name, op, dtype, draw.choice(LAYOUTS), draw.choice(list(SCHEDULES)), algorithm


def every():
    """The whole product."""
    for dtype in DTYPES:
        algorithms = ("mma",) if dtype == "float32" else ("mma", *OTHERS)
        yield from itertools.product(CONVS, PASSES, (dtype,), LAYOUTS, SCHEDULES, algorithms)


@pytest.mark.parametrize(("name", "op", "dtype", "layouts", "schedule", "algorithm"),
                         list(every() if LONG else drawn()))
def test_matrix(name, op, dtype, layouts, schedule, algorithm):
    case = CONVS[name]
    check(op, case, dtype_named(dtype), layouts, schedule, algorithm, exact(case, dtype))


@pytest.mark.parametrize("dtype", SHORT_FLOATS)
def test_pools_of_16_bits(dtype):
    case = POOLS["3d overlapping"]
    x = rounded(np.random.default_rng(0).standard_normal(case.x), dtype)
    problem, there = case.problem(x), device(x.astype(dtype_named(dtype)))
    with emulated():
        y, at = functional.max_pool(there, 3, 2, 1, return_indices=True)
        mean = functional.avg_pool(there, 3, 2, 1)
        norm = functional.lp_pool(there, 2.0, 3, 2)
        dx = functional.max_pool_grad(y, at, x.shape)
        mean_dx = functional.avg_pool_grad(mean, x.shape, 3, 2, 1)
        back = functional.max_unpool_grad(there, at)
    right, right_at = reference.max_pool(problem, x)
    np.testing.assert_array_equal(host(y).astype(np.float64), right)
    np.testing.assert_array_equal(host(back).astype(np.float64), right)
    np.testing.assert_array_equal(host(at), right_at)
    assert_close(host(mean), reference.avg_pool(problem, x), 1)
    assert_close(host(norm), functional.lp_pool(x, 2.0, 3, 2), 1)
    assert_close(host(dx), reference.max_pool_grad(problem, right, right_at), 8)
    assert_close(host(mean_dx), functional.avg_pool_grad(host(mean).astype(np.float64), x.shape, 3, 2, 1), 1)


@pytest.mark.parametrize("dtype", SHORT_FLOATS)
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"clip"}))
def test_activations_of_16_bits(name, dtype):
    x = rounded(np.random.default_rng(0).standard_normal((2, 3, 40)), dtype)
    function = find_activation("test", name)
    with emulated():
        y = function(device(x.astype(dtype_named(dtype))))
    assert y.dtype == dtype_named(dtype)
    assert_close(host(y), function(x), 1)


@pytest.mark.parametrize("dtype", SHORT_FLOATS)
def test_prepared_in_16_bits(dtype):
    case = CASES["several tiles"]
    x, w, b, _ = exact(case, dtype)
    residual = rounded(np.random.default_rng(1).standard_normal(case.y), dtype)
    kind = dtype_named(dtype)
    with emulated():
        conv = functional.prepare_conv(device(w.astype(kind)), device(b.astype(kind)), *case.arguments,
                                       activation="relu")
        y = host(conv(channels_last(x, dtype), residual=device(residual.astype(kind))))
    right = np.maximum(functional.conv(x, w, b, *case.arguments) + residual, 0)
    assert y.dtype == kind
    assert_close(y, right, 1, magnitude=144**0.5)


def test_weights_are_packed_once():
    """By prepared convolutions for every size of input, by layers until a parameter is written."""
    x, w = rounded(np.ones((2, 16, 6, 6)), "float16"), np.ones((8, 16, 3, 3), np.float16)
    layer = nn.Conv2d(16, 8, 3, rng=0)
    with emulated() as provider:
        def packings(run, *inputs):
            before = len(provider.launched)
            for image in inputs:
                run(image)
            return sum(k.kernel.name == "pack_weights" for k in provider.launched[before:])

        sizes = channels_last(x, "float16"), channels_last(x[:1, :, :5], "float16"), device(x.astype(np.float16))
        prepared = functional.prepare_conv(device(w), algorithm="mma")
        assert prepared.nbytes == 0
        assert packings(prepared, *sizes, *sizes) == 1
        assert prepared.nbytes == w.nbytes
        up = functional.prepare_conv_transpose(device(w.transpose(1, 0, 2, 3).copy()), stride=2, algorithm="mma")
        assert packings(up, *sizes, *sizes) == 4  # one for each phase
        layer.to("cuda")
        layer._prepare = lambda weight, bias, activation: functional.prepare_conv(weight, bias, algorithm="mma")
        image = channels_last(x, "float32")
        assert packings(layer, image, image) == 1
        first = host(layer(image))
        with layer.weight.write() as value:
            value *= 2
        with layer.bias.write() as value:
            value *= 2
        assert packings(layer, image, image) == 1
        np.testing.assert_array_equal(host(layer(image)), 2 * first)


def test_bfloat16_of_other_libraries():
    """Their array interface names it by two bytes, "<V2", as PyTorch does."""
    kind = dtype_named("bfloat16")
    x, w = np.ones((1, 8, 4, 4), kind), np.ones((8, 8, 3, 3), kind)

    class Tensor:
        device = "cuda:0"

        def __init__(self, owner):
            self.owner = owner
            self.__cuda_array_interface__ = owner.__cuda_array_interface__

    there = device(x)
    assert there.__cuda_array_interface__["typestr"] == "<V2"
    with emulated():
        y = functional.conv(Tensor(there), Tensor(device(w)))
    assert y.dtype == kind
    assert (host(y) == 72).all()


@pytest.mark.parametrize("dtype", SHORT_FLOATS)
def test_layers_refuse_16_bits(dtype):
    with pytest.raises(TypeError, match=f"dtype is {dtype}, but layers compute in float32 or float64.*prepare_conv"):
        nn.Conv2d(3, 4, 3, dtype=dtype_named(dtype))


def test_mixed_dtypes_are_refused():
    x, w = np.ones((1, 8, 4, 4), dtype_named("bfloat16")), np.ones((8, 8, 3, 3), np.float16)
    with emulated(), pytest.raises(TypeError, match="weight has dtype float16, but input"):
        functional.conv(device(x), device(w))
