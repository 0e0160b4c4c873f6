"""Choice by trial on the GPU, with a clock that tests set; and the heuristic that stands in for it."""

import importlib
import json

import numpy as np
import pytest
from cuda_emulator import device, emulated, host
from tolerance import assert_close

import fastconv
from fastconv import functional, tune
from fastconv.backends.cuda import tiles
from fastconv.backends.cuda import tune as cuda_tune

X, W, DEPTHWISE = (2, 16, 9, 9), (24, 16, 3, 3), (16, 1, 3, 3)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No choices from before, and a folder of its own."""
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_choices", {})
    forget()
    with fastconv.config(tune=True):
        yield


def forget():
    """As in a new process: nothing is chosen, and no call is recognised."""
    tune._choices.clear()
    importlib.import_module("fastconv.functional.conv")._repeats.clear()  # the name is also that of a function


def arrays(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def clock(**seconds):
    """Seconds by a name: of a kernel, or "simt_64x64"; what is not named takes a second."""
    def time(launched):
        kernel = next(k.kernel for k in launched if k.kernel.name not in ("channels_last", "pack_weights"))
        defines = dict(kernel.defines)
        tile = f"simt_{defines['BM']}x{defines['BN']}" if "BK" in defines else kernel.name
        return seconds.get(tile, 1.0)
    return time


@pytest.mark.parametrize("op", ["conv", "conv_input_grad", "conv_weight_grad"])
def test_the_fastest_tile_runs(op):
    x, w, dy = arrays(X, W, (2, 24, 7, 7))

    def run(x, w, dy):
        if op == "conv":
            return functional.conv(x, w)
        if op == "conv_input_grad":
            return functional.conv_input_grad(X, w, dy)
        return functional.conv_weight_grad(x, W, dy)

    right = run(x, w, dy)
    for tile in tiles.SIMT["float32"]:
        forget()
        tune.cache_file().unlink(missing_ok=True)
        with emulated() as provider:
            provider.clock = clock(**{f"simt_{tile.name}": 0.5})
            y = run(device(x), device(w), device(dy))
            kernel = next(k.kernel for k in reversed(provider.launched) if k.kernel.name != "weight_grad_finish")
        assert (dict(kernel.defines)["BM"], dict(kernel.defines)["BN"]) == (tile.bm, tile.bn)
        assert_close(host(y), right, 300)
        (choice,) = tune.choices()
        assert choice.name == f"simt {tile.name}"
        assert len(choice.measured) == len(tiles.SIMT["float32"])


def test_noise_does_not_decide():
    x, w = arrays(X, W)
    with emulated() as provider:
        provider.clock = clock(simt_64x64=0.98)
        functional.conv(device(x), device(w))
    (choice,) = tune.choices()
    assert choice.name == choice.predicted


def test_grouped_and_short():
    x, w = arrays(X, DEPTHWISE)
    with emulated() as provider:
        provider.clock = clock(simt_128x32=0.25)
        functional.conv(device(x), device(w), groups=16)
        provider.clock = clock(conv_mma=0.25)
        functional.conv(device(x.astype(np.float16)), device(w.repeat(16, 1).astype(np.float16)))
        wide = functional.conv(device(x), device(w.repeat(16, 1)))  # float32: never TF32 unasked
    depthwise, short, full = tune.choices()
    assert (depthwise.predicted, depthwise.name) == ("direct", "simt 128x32")
    cores = {f"mma {tile.name}" for tile in tiles.MMA} | {f"wgmma {tile.name}" for tile in tiles.WGMMA}
    assert cores < set(dict(short.measured))
    assert short.name in cores
    assert not cores & set(dict(full.measured))
    assert_close(host(wide), functional.conv(x, w.repeat(16, 1)), 144)


def test_wgmma_is_predicted_and_may_lose():
    x, w = arrays((2, 64, 9, 9), (24, 64, 3, 3), dtype=np.float16)
    for faster in ("conv_wgmma", "conv_mma"):
        forget()
        tune.cache_file().unlink(missing_ok=True)
        with emulated() as provider:
            provider.clock = clock(**{faster: 0.5})
            functional.conv(device(x), device(w))
            assert provider.launched[-1].kernel.name == faster
        assert tune.choices()[0].predicted == "wgmma 128x64"


def test_the_file(monkeypatch):
    x, w = arrays(X, W)
    with emulated() as provider:
        provider.clock = clock(simt_128x32=0.5)
        functional.conv(device(x), device(w))
    (key,), (entry,) = zip(*json.loads(tune.cache_file().read_text())["entries"].items(), strict=True)
    assert json.loads(key)[1:4] == ["emulator", cuda_tune.source_hash(), "conv"]
    assert entry["algorithm"] == "simt 128x32"

    def chosen(provider):
        forget()
        before = len(provider.launched)
        functional.conv(device(x), device(w))
        return tune.choices()[0].name, len(provider.launched) - before

    with emulated() as provider:
        assert chosen(provider) == ("simt 128x32", 1)  # as kept, without a trial
        provider.name = lambda: "another GPU"
        name, launches = chosen(provider)
        assert name == tune.choices()[0].predicted
        assert launches > 3
        del provider.name
        monkeypatch.setattr(cuda_tune, "source_hash", lambda: "other kernels")
        assert chosen(provider)[1] > 3


def test_an_entry_that_cannot_run_is_measured_again():
    x, w = arrays(X, W)
    with emulated() as provider:
        functional.conv(device(x), device(w))
        for change in ({"algorithm": "simt 1x1"}, {"seconds": 3}, {"seconds": {}}):
            data = json.loads(tune.cache_file().read_text())
            next(iter(data["entries"].values())).update(change)
            tune.cache_file().write_text(json.dumps(data))
            forget()
            before = len(provider.launched)
            functional.conv(device(x), device(w))
            assert len(provider.launched) - before > 3


def test_strides_of_the_trial_are_those_of_the_problem():
    x, w = arrays((2, 9, 9, 16), W)
    with emulated() as provider:
        functional.conv(device(np.moveaxis(x, -1, 1)[:, :, ::-1, ::2]), device(w))
        last = provider.launched[-1].kernel
        assert {k.kernel.defines[-2:] for k in provider.launched} == {last.defines[-2:]}  # PIXELS_FAST, OUT_FAST


# ---- the heuristic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "name"), [
    (10**6, 128, "128x128"), (10**6, 256, "128x128"), (10**6, 32, "128x32"), (10**6, 64, "64x64"), (200, 64, "64x64")])
def test_tiles_fit_the_product(rows, columns, name):
    assert tiles.choose_tile(tiles.SIMT["float32"], rows, columns, 1, 132).name == name


@pytest.mark.parametrize(("rows", "columns", "name"), [
    (32 * 56**2, 256, "128x256"), (32 * 28**2, 128, "128x128"), (32 * 56**2, 64, "128x64"), (32 * 7**2, 512, "128x64"),
    (256 * 7**2, 2048, "128x256")])
def test_tiles_of_tensor_cores_fill_the_gpu(rows, columns, name):
    assert tiles.choose_core_tile(tiles.WGMMA, rows, columns, 1, 132)[0].name == name


def test_splits_fill_the_gpu_and_no_more():
    assert tiles.split(10**6, 8, 1, 1, 132)[0] == 2 * 132
    assert tiles.split(10**6, 8, 2 * 132, 1, 132) == (1, 10**6)
    splits, chunk = tiles.split(1000, 8, 1, 1, 132)
    assert splits == 3
    assert chunk % 8 == 0
    assert (splits - 1) * chunk < 1000 <= splits * chunk
