"""The GPU backend on a GPU: the tables of the kernel tests by CuPy, against the NumPy reference; ``pytest -m gpu``.

Skipped where CuPy finds none. ``-k small`` picks the cases for compute-sanitizer, which is slow.
"""

import importlib.util
import itertools
import random

import numpy as np
import pytest
from cases import CONVS, LAYOUTS, laid_out
from test_cuda_conv import ALGORITHMS
from test_cuda_forms import COPIES, check_copy
from test_cuda_mma import CASES as MMA_CASES
from test_cuda_mma import DTYPES as MMA_DTYPES
from test_cuda_mma import dtype_named, exact, tiled
from test_cuda_wgmma import served
from test_matrix_conv import PASSES, expected, operands, reference_of
from test_matrix_conv import run as run_conv
from test_matrix_pool import OPS, POOLS, WIDE, cached_operands, compare, conditions, extra
from test_matrix_pool import expected as expected_pool
from tolerance import assert_close

from fastconv import functional, models, nn
from fastconv.backends import cuda
from fastconv.backends.cuda import tiles
from fastconv.training import optim

pytestmark = pytest.mark.gpu
SMALL = ("3 channels", "stride 2", "dilation 2 stride 2", "3 groups of primes", "depthwise", "3d mixed", "1d kernel 9",
         "asymmetric padding")


@pytest.fixture(scope="module")
def cupy():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("no CuPy")
    import cupy

    if not cupy.cuda.is_available():
        pytest.skip("CuPy finds no GPU")
    return cupy


def upload(cupy, x):
    """A copy of `x` on the GPU with the same strides, and NaN between its elements."""
    low, high = np.lib.array_utils.byte_bounds(x) if x.size else (0, 0)
    memory = cupy.cuda.alloc(max(high - low, 1))
    cupy.ndarray(max(high - low, 1), cupy.uint8, memory).fill(0xFF)
    start = x.__array_interface__["data"][0] - low if x.size else 0
    array = cupy.ndarray(x.shape, x.dtype, memory + start, x.strides)
    array[...] = cupy.asarray(np.ascontiguousarray(x))
    return array


def check_conv(cupy, name, op, dtype, layouts, algorithm):
    case = CONVS[name]
    x, w, b, dy = operands(case)
    arrays = [upload(cupy, laid_out(v, dtype, layout)) for v, layout in zip((x, w, dy), layouts, strict=True)]
    y = run_conv(op, case, arrays[0], arrays[1], upload(cupy, b.astype(dtype)), arrays[2], algorithm, None)
    n = case.reduction[op]
    assert_close(y.get(), expected(case)[op], n, magnitude=n**0.5)


@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("name", CONVS)
def test_conv(cupy, name, op):
    draw = random.Random(f"{name} {op}")
    for dtype in ("float32", "float64"):
        for algorithm in ALGORITHMS[dtype]:
            check_conv(cupy, name, op, dtype, [draw.choice(list(LAYOUTS)) for _ in range(3)], algorithm)


@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("name", SMALL)
def test_small_conv(cupy, name, op):
    for algorithm in ALGORITHMS["float32"]:
        check_conv(cupy, name, op, "float32", ["contiguous"] * 3, algorithm)


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("name", CONVS)
def test_conv_on_tensor_cores(cupy, name, op, dtype):
    """TF32, float16 and bfloat16, in place and through copies."""
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("tensor cores of compute capability 8.0 are needed")
    draw = random.Random(f"{name} {op} {dtype}")
    for layout in ("contiguous", "channels_last", draw.choice(list(LAYOUTS))):
        check_mma(cupy, CONVS[name], op, dtype, layout, tiled("mma", op, f"{name} {layout}"))


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("op", PASSES)
@pytest.mark.parametrize("name", ["several tiles", "ragged channels", "stride, dilation, padding", "groups"])
def test_small_conv_on_tensor_cores(cupy, name, op, dtype):
    algorithms = ("mma",) if dtype == "float32" else ("mma", "auto")
    for layout, algorithm in itertools.product(("contiguous", "channels_last"), algorithms):
        check_mma(cupy, MMA_CASES[name], op, dtype, layout, algorithm)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", COPIES)
def test_small_copies(cupy, name, dtype):
    """To channels_last, from every address."""
    shape, groups, together, view = COPIES[name]
    size, values = np.dtype(dtype).itemsize, np.random.default_rng(0).integers(-99, 99, shape).astype(dtype)
    for first in range(16 // size):
        x = cupy.empty(values.size + 64, dtype)[first:first + values.size].reshape(shape)
        x[...] = cupy.asarray(values)
        check_copy(view(x), groups, together[size // 4], cupy.asnumpy)


@pytest.mark.parametrize("name", [*sorted(set(MMA_CASES) - {"groups"}), *CONVS])
@pytest.mark.parametrize("op", PASSES[:2])
def test_wgmma(cupy, name, op):
    """By RawModule for sm_90a, and maps of the driver."""
    if cupy.cuda.Device().compute_capability != "90":
        pytest.skip("compute capability 9.0 is needed")
    case = MMA_CASES.get(name) or CONVS[name]
    if not served(case):
        pytest.skip("the map does not hold it")
    for layout, tile in itertools.product(("contiguous", "channels_last"), tiles.WGMMA):
        check_mma(cupy, case, op, "float16", layout, f"wgmma {tile.name}")


@pytest.mark.parametrize("name", ["several tiles", "stride, dilation, padding", "depth"])
def test_small_wgmma(cupy, name):
    test_wgmma(cupy, name, "conv")


def check_mma(cupy, case, op, dtype, layout, algorithm="mma"):
    kind, given = dtype_named(dtype), exact(case, dtype)
    x, w, dy = (upload(cupy, laid_out(v, kind, layout)) for v in (given[0], given[1], given[3]))
    y = run_conv(op, case, x, w, upload(cupy, given[2].astype(kind)), dy, algorithm, None)
    n = case.reduction[op]
    assert_close(y.get(), reference_of(case, *given)[op], n if dtype == "float32" else 1, algorithm="tensor cores",
                 magnitude=n**0.5)


def check_pool(cupy, name, op, dtype, layout, number):
    case = POOLS[name]
    _, given = cached_operands(case)
    arguments = extra(op, number)
    arrays = [upload(cupy, laid_out(v, dtype, layout) if size != "indices" else v)
              for v, size in given.arrays(op, *(arguments or (None,)))]
    problem = case.problem(laid_out(given.x, dtype, layout))
    result = getattr(cuda, op)(problem, *arrays, *arguments)
    right = expected_pool(case, op, arguments)
    if op == "max_pool":
        (result, at), (right, right_at) = result, right
        np.testing.assert_array_equal(at.get(), right_at)
    exact = op in ("max_pool", "max_unpool", "max_unpool_grad")
    compare(op, case, result.get(), right, not exact and conditions(case, op, arguments))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", POOLS)
def test_pool(cupy, name, op):
    for dtype in ("float32", "float64"):
        for number, layout in enumerate(("contiguous", "channels_last", "cropped" if op in WIDE else "channel_slice")):
            check_pool(cupy, name, op, dtype, layout, number)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["kernel 3, stride 2", "3d mixed", "global 7x7", "adaptive 1d"])
def test_small_pool(cupy, name, op):
    check_pool(cupy, name, op, "float32", "contiguous", 0)


@pytest.mark.parametrize("name", ["resnet10", "densenet121"])
def test_a_training_step(cupy, name):
    def step(net, x, labels):
        optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        logits, backward = net.forward(x)
        loss, gradient = nn.cross_entropy(logits, labels)
        backward(gradient)
        optimizer.step()
        return logits, loss

    def make():
        return getattr(models, name)(num_classes=3, width=1 / 8, dtype=np.float64, rng=0)

    x, labels = np.random.default_rng(0).standard_normal((4, 3, 64, 64)), np.arange(4) % 3
    here, there = make(), make()
    logits, loss = step(here, x, labels)
    logits_there, loss_there = step(there.to("cuda"), cupy.asarray(x), cupy.asarray(labels))
    np.testing.assert_allclose(logits_there.get(), logits, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(loss_there, loss, rtol=1e-9)
    for key, value in here.state_dict().items():
        np.testing.assert_allclose(there.state_dict()[key], value, rtol=1e-6, atol=1e-8, err_msg=key)


def test_a_graph_can_be_captured(cupy):
    x, w = cupy.ones((2, 3, 16, 16), cupy.float32), cupy.ones((4, 3, 3, 3), cupy.float32)
    right, out = functional.conv(x, w, padding=1), cupy.zeros((2, 4, 16, 16), cupy.float32)
    functional.conv(x, w, padding=1, out=out)  # compiles
    out.fill(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        functional.conv(x, w, padding=1, out=out)
        graph = stream.end_capture()
        assert not out.any()
        graph.launch(stream)
    stream.synchronize()
    cupy.testing.assert_array_equal(out, right)
