"""Pools of the GPU backend, run by the emulator, against the NumPy reference: see `test_cuda_conv`."""

import functools
import itertools
import os
import random
from dataclasses import replace

import numpy as np
import pytest
from cases import Guarded, allocate, laid_out
from cuda_emulator import SCHEDULES, DeviceArray, device, emulated, host
from test_matrix_pool import LAYOUTS, OPS, POOLS, POWERS, WIDE, cached_operands, compare, condition_of, extra

from fastconv import functional
from fastconv.arrays import SHORT_FLOATS, empty, memory_order
from fastconv.backends import cuda, reference
from fastconv.backends.cuda.launches import DTYPES

LONG = os.environ.get("FASTCONV_LONG", "") not in ("", "0")
EXACT = ("max_pool", "max_unpool", "max_unpool_grad")


def dtype_named(name):
    """The dtype; bfloat16 is that of ml_dtypes, without which its tests are skipped."""
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


@functools.lru_cache(4)
def rounded_operands(case, dtype):
    """Operands that are exact in `dtype`."""
    operands = cached_operands(case)[1]
    if dtype not in SHORT_FLOATS:
        return operands

    def rounded(values):
        return values.astype(dtype_named(dtype)).astype(np.float64)
    return replace(operands, dy=rounded(operands.dy), roots={p: rounded(y) for p, y in operands.roots.items()})


@functools.lru_cache(64)
def right_of(op, case, dtype, arguments):
    """What the reference makes of them, and the magnitudes to which errors are relative."""
    arrays = [array for array, _ in rounded_operands(case, dtype).arrays(op, *(arguments or (None,)))]
    problem, _ = cached_operands(case)
    return (getattr(reference, op)(problem, *arrays, *arguments),
            op not in EXACT and condition_of(op, problem, arrays, arguments))


def check(op, case, dtype, layouts, number, schedule):
    """Run one pass and compare; returns the kernels that were launched."""
    arguments = extra(op, number)
    operands, (right, condition) = rounded_operands(case, dtype), right_of(op, case, dtype, arguments)
    dtype = dtype_named(dtype)
    wide, narrow, indices_layout, with_out = layouts
    layout_of = {"wide": wide, "narrow": narrow}
    arrays = []
    for values, size in operands.arrays(op, *(arguments or (None,))):
        if size == "indices":
            _, view = allocate(values.shape, np.int64, indices_layout, -1)
            view[...] = values
        else:
            view = laid_out(values, dtype, layout_of[size])
        arrays.append(DeviceArray(view))
    like = laid_out(operands.x, dtype, wide if op not in WIDE else narrow)
    problem = case.problem(like)
    shape = problem.x_shape if op in WIDE else problem.y_shape
    out = Guarded(shape, dtype, wide if op in WIDE else narrow) if with_out else None
    with emulated(SCHEDULES[schedule]) as provider:
        result = getattr(cuda, op)(problem, *arrays, *arguments, out=DeviceArray(out.view) if out else None)
        y, indices = result if op == "max_pool" else (result, None)
        if op == "max_pool":
            right, right_indices = right
            np.testing.assert_array_equal(host(indices), right_indices)
            values, none = cuda.max_pool(problem, *arrays, False)
            assert none is None
            np.testing.assert_array_equal(host(values), right)
    if out:
        y = out.result()
    else:
        y = host(y)
        assert y.strides == empty(shape, dtype, memory_order(like)).strides
    compare(op, case, y, right, condition)
    return {launched.kernel for launched in provider.launched}


def drawn():
    for name, op in itertools.product(POOLS, OPS):
        draw = random.Random(f"{name} {op}")
        yield (name, op, draw.choice(list(DTYPES)), draw.choice(LAYOUTS), draw.randrange(len(POWERS)),
               draw.choice(list(SCHEDULES)))


def every():
    return itertools.product(POOLS, OPS, DTYPES, LAYOUTS, range(len(POWERS)), SCHEDULES)


ROWS = list(every() if LONG else drawn())


@pytest.mark.parametrize(("name", "op", "dtype", "layouts", "number", "schedule"), ROWS)
def test_matrix(name, op, dtype, layouts, number, schedule):
    check(op, POOLS[name], dtype, layouts, number, schedule)


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["kernel 3, stride 2", "global 7x7", "global 3d"])
def test_nan_infinity_and_signed_zeros(name, order):
    case = POOLS[name]
    rng = np.random.default_rng(0)
    x = laid_out(rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1, -1], case.x), "float32", order)
    problem = case.problem(x)
    with emulated():
        y, at = cuda.max_pool(problem, DeviceArray(x))
        mean = cuda.avg_pool(problem, DeviceArray(x))
    right, right_at = reference.max_pool(problem, x)
    np.testing.assert_array_equal(host(y), right)
    np.testing.assert_array_equal(host(at), right_at)
    np.testing.assert_array_equal(np.isnan(host(mean)), np.isnan(reference.avg_pool(problem, x)))


def test_of_equal_indices_all_are_added_in_order_and_the_last_one_counts():
    rng = np.random.default_rng(0)
    dy = rng.standard_normal((2, 3, 10, 11)).astype(np.float32)
    indices = rng.integers(0, 5, dy.shape)  # 110 outputs for 5 positions
    with emulated():
        dx = functional.max_pool_grad(device(dy), device(indices), (2, 3, 4, 4))
        y = functional.max_unpool(device(dy), device(indices), 2, output_size=(20, 22))
    np.testing.assert_allclose(host(dx), functional.max_pool_grad(dy, indices, (2, 3, 4, 4)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(host(y), functional.max_unpool(dy, indices, 2, output_size=(20, 22)))


def test_indices_outside_of_the_plane_are_skipped():
    dy, indices = np.ones((1, 1, 2, 2), np.float32), np.array([[[[-1, 16], [2**40, 3]]]])
    with emulated():
        dx = functional.max_pool_grad(device(dy), device(indices), (1, 1, 4, 4))
        dz = functional.max_unpool_grad(device(np.ones((1, 1, 4, 4), np.float32)), device(indices))
    assert host(dx).sum() == host(dx)[0, 0, 0, 3] == 1
    np.testing.assert_array_equal(host(dz), [[[[0, 0], [0, 1]]]])


def test_public_functions():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 9, 8)).astype(np.float32)
    with emulated():
        for name, arguments in (("max_pool", (3, 2, 1)), ("avg_pool", (2,)), ("lp_pool", (2.0, 2)),
                                ("adaptive_avg_pool", (4,)), ("adaptive_max_pool", ((3, 5),)), ("global_avg_pool", ()),
                                ("global_max_pool", ())):
            function = getattr(functional, name)
            y = function(np.abs(x), *arguments)
            np.testing.assert_allclose(host(function(device(np.abs(x)), *arguments)), y, rtol=1e-5)
        y, at = functional.max_pool(device(x), 2, return_indices=True)
        with pytest.raises(TypeError, match="grad_output is on the GPU and indices in host memory"):
            functional.max_pool_grad(y, host(at), x.shape)
        with pytest.raises(TypeError, match="in one place"):
            functional.max_pool(device(x), 2, out=np.empty((2, 3, 4, 4), np.float32))
