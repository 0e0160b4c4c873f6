"""The door to the GPU: which arrays are let in, what is said where there is no GPU; that the emulator sees mistakes."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import SCHEDULES, DeviceArray, device, emulated, host
from cuda_emulator.array import FUNCTIONS, UFUNCS
from test_backends import ORACLES, positional

from fastconv import functional
from fastconv.arrays import as_array, check_out, empty, memory_order, on_device, to_channels_last
from fastconv.backends import cuda, reference
from fastconv.backends.cuda import device as backend
from fastconv.backends.cuda import driver
from fastconv.backends.cuda.device import CupyProvider, Kernel, TensorMap
from fastconv.backends.cuda.launches import LATTICE

HAS_CUPY = importlib.util.find_spec("cupy") is not None


@pytest.mark.parametrize("name", sorted(cuda.__all__))
def test_signatures_are_those_of_the_reference(name):
    assert name in set(reference.__all__) - ORACLES
    assert positional(getattr(cuda, name)) == positional(getattr(reference, name))


# ---- arrays ------------------------------------------------------------------------------------------------------


class Foreign:
    """An array of another library on the GPU."""

    device = "cuda:0"

    def __init__(self, x):
        self.owner = x
        self.__cuda_array_interface__ = x.__cuda_array_interface__


def test_arrays_of_the_provider_are_taken_as_they_are():
    x = device(np.ones((2, 3), np.float32))
    with emulated():
        assert as_array(x, "x") is x
        assert on_device(x)
    assert not on_device(host(x))


def test_the_interface_is_shared():
    x = device(np.arange(24, dtype=np.float64).reshape(2, 3, 4).transpose(2, 0, 1))
    with emulated():
        view = as_array(Foreign(x), "x")
    assert isinstance(view, DeviceArray)
    np.testing.assert_array_equal(host(view), host(x))
    host(view)[0, 1, 2] = -5
    assert host(x)[0, 1, 2] == -5


def test_outputs_on_the_device():
    x = device(np.ones((2, 3, 4, 5), np.float32))
    with emulated():
        y = empty((2, 3, 4, 5), np.float32, "channels_last", like=x)
        assert isinstance(y, DeviceArray)
        assert memory_order(y) == "channels_last"
        z = to_channels_last(x)
        assert isinstance(z, DeviceArray)
        assert memory_order(z) == "channels_last"
        assert check_out(y, (2, 3, 4, 5), np.float32, inputs=[x]) is y
        with pytest.raises(ValueError, match="shares memory"):
            check_out(x, (2, 3, 4, 5), np.float32, inputs=[x])
        with pytest.raises(TypeError, match="out is on the GPU and an input in host memory"):
            check_out(y, (2, 3, 4, 5), np.float32, inputs=[host(x)])


NO_GPU = """
import sys
if {blocked}: sys.modules["cupy"] = None
import numpy as np, fastconv.functional as F

class Foreign:
    device = "cuda:0"
    __cuda_array_interface__ = dict(shape=(1, 1, 3, 3), typestr="<f4", data=(0, False), version=3, strides=None)

x = np.ones((1, 1, 3, 3), np.float32)
print(F.conv(x, x).item())
try:
    F.conv(Foreign(), x)
except TypeError as error:
    print(error)
"""


needs_cupy = pytest.mark.skipif(not HAS_CUPY, reason="no CuPy")


@pytest.mark.parametrize("blocked", [True, pytest.param(False, marks=needs_cupy)])
def test_without_a_gpu_the_rest_works_and_the_error_says_what_to_install(blocked):
    # -P: the fastconv that is tested, not the folder that tests are started in
    program = [sys.executable, "-P", "-W", "ignore", "-c", NO_GPU.format(blocked=blocked)]
    one, error = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    assert one == "9.0"
    if blocked or "finds no GPU" in error:
        assert 'pip install "fastconv[cuda13]"' in error
        assert "input is a __main__.Foreign on device cuda:0" in error


@needs_cupy
def test_what_stands_for_cupy_can_do_no_more_than_cupy():
    import cupy

    for name in FUNCTIONS.keys() | UFUNCS:
        assert hasattr(cupy, name), name


def test_what_stands_for_cupy_refuses_what_cupy_refuses():
    x = device(np.ones(3, np.float32))
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(TypeError, match=r"numpy\.ndarray"):
        x + np.ones(3, np.float32)
    with pytest.raises(AssertionError, match="where"):
        np.add(x, x, where=x > 0)
    with pytest.raises(AssertionError, match="not in the list"):
        np.convolve(x, x)


# ---- the emulator ------------------------------------------------------------------------------------------------

SUM_BLOCK = """
#include "prim.cuh"
extern "C" __global__ void sum(const float *x, float *y, const int n) {{
  FC_SMEM(memory);
  float *s = reinterpret_cast<float *>(memory);
  {write}
  {barrier}
  float total = 0;
  for (int i = 0; i < n; i++) total += s[(threadIdx.x + i) % n];
  y[threadIdx.x] = total;
}}
FC_EXPORT(sum)
"""
WRITE = "s[threadIdx.x] = x[threadIdx.x];"
ASYNC = "fc::cp_async16(&s[threadIdx.x * 4 % n], &x[threadIdx.x * 4 % n], true); fc::cp_commit(); {wait}"


def run_planted(monkeypatch, flags, write=WRITE, barrier="__syncthreads();", n=64, args=None):
    """Run a small kernel, perhaps with a mistake in it; the result that is right is 64 times 64."""
    text = SUM_BLOCK.format(write=write, barrier=barrier).replace('#include "prim.cuh"', (
        backend._SOURCES / "prim.cuh").read_text())
    monkeypatch.setattr(backend, "source_text", lambda name: text)
    kernel = Kernel(f"planted{abs(hash(text))}.cu", "sum", (("FC_DTYPE", 0),))
    x, y = device(np.ones(n, np.float32)), device(np.zeros(n, np.float32))
    with emulated(flags) as provider:
        provider.launcher(kernel, (1,), (n,), (np.int32(n),) if args is None else args, n * 4)(x, y)
    return host(y)


@pytest.mark.parametrize("flags", SCHEDULES.values(), ids=SCHEDULES)
def test_a_right_kernel_is_right(monkeypatch, flags):
    assert (run_planted(monkeypatch, flags) == 64).all()
    assert (run_planted(monkeypatch, flags, ASYNC.format(wait="fc::cp_wait<0>();")) == 64).all()


@pytest.mark.parametrize("flags", SCHEDULES.values(), ids=SCHEDULES)
def test_a_missing_barrier_shows(monkeypatch, flags):
    assert not (run_planted(monkeypatch, flags, barrier="") == 64).all()


def test_a_missing_wait_shows_where_copies_land_late(monkeypatch):
    assert np.isnan(run_planted(monkeypatch, 0, ASYNC.format(wait=""))).any()


@pytest.mark.parametrize(("planted", "message"), [
    ("if (threadIdx.x < 40) __syncthreads(); else __syncwarp();", "deadlock"),
    ("if (threadIdx.x % 2) __syncwarp(); else __shfl_xor_sync(~0u, 1, 1);", "divergent warp"),
    ("unsigned r[4]; fc::ldmatrix_x4(r, &s[1]);", "not a multiple of 16 bytes"),
    ("fc::cp_async16(&s[1], &x[0], true);", "not a multiple of the size"),
])
def test_mistakes_are_reported(monkeypatch, planted, message):
    with pytest.raises(RuntimeError, match=message):
        run_planted(monkeypatch, 0, WRITE + planted)


def test_arguments_of_another_size_are_reported(monkeypatch):
    with pytest.raises(RuntimeError, match="argument 2 has another size"):
        run_planted(monkeypatch, 0, args=(np.int64(64),))
    with pytest.raises(RuntimeError, match="their number differs"):
        run_planted(monkeypatch, 0, args=())
    with pytest.raises(TypeError, match="handed a int"):
        run_planted(monkeypatch, 0, args=(64,))


# ---- what the host costs -----------------------------------------------------------------------------------------


ones = partial(np.ones, dtype=np.float32)
IMAGE, WEIGHT, HALF = (2, 16, 14, 14), (16, 16, 3, 3), (2, 16, 7, 7)
CALLS = {
    "conv": lambda x, w, half, at: functional.conv(x, w, None, 1, 1),
    "conv_input_grad": lambda x, w, half, at: functional.conv_input_grad(IMAGE, w, x, 1, 1),
    "conv_weight_grad": lambda x, w, half, at: functional.conv_weight_grad(x, WEIGHT, x, 1, 1),
    "conv_transpose": lambda x, w, half, at: functional.conv_transpose(x, w, None, 1, 1),
    "max_pool": lambda x, w, half, at: functional.max_pool(x, 2),
    "max_pool with indices": lambda x, w, half, at: functional.max_pool(x, 2, return_indices=True),
    "max_pool_grad": lambda x, w, half, at: functional.max_pool_grad(half, at, IMAGE),
    "avg_pool": lambda x, w, half, at: functional.avg_pool(x, 2),
    "avg_pool_grad": lambda x, w, half, at: functional.avg_pool_grad(half, IMAGE, 2),
}
ROWS = {
    "linear": lambda x, w, b, dy: functional.linear(x, w, b),
    "linear_input_grad": lambda x, w, b, dy: functional.linear_input_grad(dy, w),
}


@pytest.mark.parametrize("name", [*CALLS, *ROWS])
def test_the_host_takes_less_than_20_us_for_a_call(name):
    """CPU time of a repeated call whose launches do nothing, in the fastest of many rounds."""
    shapes = (IMAGE, WEIGHT, HALF) if name in CALLS else ((8, 64), (10, 64), (10,), (8, 10))
    arrays = [device(ones(shape)) for shape in shapes]
    if name in CALLS:
        arrays.append(device(np.zeros(HALF, np.int64)))
    call = {**CALLS, **ROWS}[name]
    with emulated(null=True):
        call(*arrays)
        best = min(_seconds(lambda: call(*arrays), time.process_time) for _ in range(20))
    assert best < 20e-6, f"{best * 1e6:.1f} µs"


def test_what_a_call_repeats_belongs_to_its_provider():
    x, w = device(ones((1, 2, 4, 4))), device(ones((2, 2, 3, 3)))
    for _ in range(2):
        with emulated() as provider:
            functional.conv(x, w)
            assert len(provider.launched) == 1


def test_maps_are_kept_by_address(monkeypatch):
    made = []

    def encode(address, dtype, layout):
        made.append((address, dtype, layout))
        return len(made)

    monkeypatch.setattr(driver, "tensor_map", encode)
    layout = TensorMap((64, 8), (128,), (64, 8))
    map_of = CupyProvider.mapper(None, "float16", layout)  # which needs nothing of the provider
    first, second = device(np.zeros(64, np.float16)), device(np.zeros(64, np.float16))
    assert [map_of(a) for a in (first, second, first, second)] == [1, 2, 1, 2]
    assert made[0] == (first.data.ptr, "float16", layout)
    others = [device(np.zeros(64, np.float16)) for _ in range(70)]
    for other in others:
        map_of(other)
    assert map_of(first) == 73  # they are not kept for ever


def test_structures_are_passed_as_bytes():
    """Of a structure with fields CuPy would ask for the whole description at each launch."""
    s = np.zeros((), LATTICE)
    s["batch"] = 3
    passed = backend._as_bytes(s)
    s["batch"] = 4
    assert passed.dtype.names is None
    assert passed.shape == ()
    assert passed.tobytes() != s.tobytes()
    assert passed.view(LATTICE)["batch"] == 3
    assert backend._as_bytes(np.int32(5)) == 5


def _seconds(call, clock, times=100):
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times


# ---- the script for the day when there is a GPU ------------------------------------------------------------------


def test_gpu_check_runs_dry(tmp_path):
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "gpu_check.sh").exists():
        pytest.skip("bench is not beside the tests")
    done = subprocess.run(["bash", "bench/gpu_check.sh", str(tmp_path), "primitives", "times", "times_mma"], cwd=root,
                          text=True, capture_output=True, env={**os.environ, "DRY_RUN": "1"}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: none" in done.stdout
    times = json.loads((tmp_path / "gpu_times.json").read_text())["times"]
    assert {t["pass"] for t in times} >= {"conv", "conv_input_grad", "conv_weight_grad", "max_pool"}
    mma = json.loads((tmp_path / "gpu_times_mma.json").read_text())["times"]
    assert {(t["precision"], t["pass"]) for t in mma} >= {
        (precision, op) for precision in ("float16", "tf32") for op in ("conv", "conv_input_grad", "conv_weight_grad")}
    assert {t["pass"] for t in mma if t["precision"] == "float16_mma"} == {"conv", "conv_input_grad"}
    assert json.loads((tmp_path / "gpu_primitives.json").read_text())["machine"]["device"] == "emulator"
