"""Every pool and its gradient x instruction set x dtype x memory layout against the NumPy reference.

Workspaces and outputs are full of NaN, inputs have NaN around them, and outputs have guards around
and between their elements: see `cases`. What needs no rounding is compared exactly, bits of zeros
included.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from cases import Guarded, allocate, laid_out
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import rms, tolerance

from fastconv.arrays import empty, memory_order
from fastconv.backends import _cpu, cpu, reference
from fastconv.config import config
from fastconv.problem import adaptive_pool_problem, pool_problem

ISAS = _cpu.available_isas()
DTYPES = (np.float32, np.float64)


@dataclass(frozen=True)
class Pool:
    """A pool of an input of shape `x`: sliding windows, or adaptive ones if `output_size` is given."""

    x: tuple[int, ...]
    kernel: int | tuple[int, ...] = 1
    stride: int | tuple[int, ...] | None = None
    padding: object = 0
    dilation: int | tuple[int, ...] = 1
    ceil_mode: bool = False
    include_pad: bool = True
    output_size: int | tuple[int | None, ...] | None = None

    def problem(self, x):
        """Describe the pool of the array x, whose batch may differ from that of the case."""
        ndim = len(self.x) - 2
        if self.output_size is not None:
            return adaptive_pool_problem(x, self.output_size, ndim=ndim, op="pool")
        return pool_problem(
            x,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.include_pad,
            ndim=ndim,
            op="pool",
        )


# Vectors have 2, 4, 8 or 16 lanes, which are channels or columns, four vectors at a time.
AROUND_LANES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 67)

POOLS = {
    **{f"{n} channels": Pool((2, n, 4, 5), 3, 2, 1) for n in AROUND_LANES},
    **{f"width {n}": Pool((1, 2, 3, n), 3, 1, 1) for n in AROUND_LANES},
    **{f"width {n}, stride 2": Pool((1, 2, 4, n), 2, 2, ceil_mode=True) for n in AROUND_LANES},
    **{f"length {n}": Pool((2, 3, n), 3, 1, 1) for n in AROUND_LANES},
    **{f"kernel {k}": Pool((1, 3, 9, 23), k, 1, k // 2) for k in range(1, 6)},
    **{f"kernel {k}, stride {k}": Pool((1, 3, 11, 43), k, k) for k in range(1, 6)},
    "kernel 3, stride 2": Pool((2, 5, 13, 41), 3, 2, 1),
    "kernel 3, stride 2, ceil": Pool((2, 5, 12, 40), 3, 2, 0, ceil_mode=True),
    "kernel 3x2, stride 1x3": Pool((2, 4, 9, 38), (3, 2), (1, 3), (1, 0)),
    "stride above kernel": Pool((2, 3, 11, 50), 2, (3, 5)),
    "kernel is input": Pool((2, 7, 5, 6), (5, 6)),
    "asymmetric padding": Pool((2, 4, 7, 19), 3, 2, ((0, 2), (1, 0))),
    "without padding in the divisor": Pool((1, 4, 7, 19), 3, 1, 1, include_pad=False),
    "ceil, without padding in the divisor": Pool((1, 4, 8, 20), 3, 2, 1, 1, True, False),
    "windows of one element and two divisors": Pool((1, 2, 1), 8, 2, ((7, 5),), ceil_mode=True),
    "dilation 2": Pool((1, 9, 11, 37), 3, 1, 1, 2),
    "dilation 3, padding 1, stride 2": Pool((2, 3, 11, 29), 3, 2, 1, 3, True, False),
    "dilation above stride, much padding": Pool((1, 3, 9, 17), 5, 1, 2, 3),
    "one element": Pool((3, 2, 1, 1), 1),
    "1d": Pool((2, 6, 57), 4, 3, 2),
    "1d dilated": Pool((2, 6, 57), 4, 1, 0, 5),
    "1d, several lines": Pool((1, 2, 5003), 3, 2, 1),
    "1d, several lines, dilated": Pool((1, 2, 4999), 4, 1, 2, 7),
    "several lines": Pool((1, 2, 3, 4500), 2, 1),
    "3d": Pool((2, 5, 5, 6, 18), 2, 2),
    "3d overlapping": Pool((1, 9, 5, 7, 19), 3, 2, 1),
    "3d mixed": Pool((1, 3, 6, 8, 20), (2, 3, 4), (1, 2, 3), (1, 0, 2), (2, 1, 1), True, False),
    "adaptive 5x7 to 3x4": Pool((2, 5, 5, 7), output_size=(3, 4)),
    "adaptive 13x37 to 4x11": Pool((1, 17, 13, 37), output_size=(4, 11)),
    "adaptive, more outputs than inputs": Pool((2, 3, 3, 4), output_size=(5, 9)),
    "adaptive 1d": Pool((2, 3, 61), output_size=7),
    "adaptive 3d": Pool((1, 4, 5, 7, 9), output_size=(2, None, 4)),
    "global 7x7": Pool((2, 19, 7, 7), output_size=1),
    "global 1d": Pool((2, 3, 301), output_size=1),
    "global 3d": Pool((1, 8, 4, 5, 21), output_size=1),
    "tasks of several rows": Pool((1, 1, 120, 300), 3, 2, 1),
    "many channels": Pool((2, 300, 3, 4), 2, 1),
    "no sample": Pool((0, 3, 5, 6), 2),
    "no output": Pool((2, 3, 5, 6), output_size=(0, 2)),
    "no output in width": Pool((2, 3, 5, 6), output_size=(2, 0)),
}

# What is pooled, and how: maximum and what goes by index are exact
OPS = (
    "max_pool",
    "max_pool_grad",
    "max_pool_input_grad",
    "max_unpool",
    "max_unpool_grad",
    "avg_pool",
    "avg_pool_grad",
    "lp_pool",
    "lp_pool_grad",
)
EXACT = ("max_pool", "max_unpool", "max_unpool_grad")
# The result of these has the size of the pool's input.
WIDE = ("max_pool_grad", "max_pool_input_grad", "max_unpool", "avg_pool_grad", "lp_pool_grad")
DIVISORS = (None, 7)
POWERS = (2.0, 1.0, 3.0, 2.5)

# (layout of arrays of the input's size, of the output's size, of indices, whether out= is given)
LAYOUTS = [
    ("contiguous", "contiguous", "contiguous", False),
    ("channels_last", "channels_last", "channels_last", False),
    ("contiguous", "contiguous", "contiguous", True),
    ("channels_last", "channels_last", "channels_last", True),
    ("contiguous", "channels_last", "contiguous", True),
    ("channels_last", "contiguous", "channels_last", True),
    ("channels_last", "channels_last", "strided", True),
    ("channel_slice", "channel_slice", "channel_slice", True),
    ("channels_last_slice", "channels_last_slice", "channels_last_slice", True),
    ("cropped", "cropped", "cropped", True),
    ("strided", "strided", "negative", True),
    ("negative", "negative", "strided", True),
    ("transposed", "transposed", "transposed", True),
    ("channels_last_negative", "channels_last_negative", "channels_last_negative", True),
]


@pytest.fixture(autouse=True)
def poisoned():
    _cpu.poison_workspaces(True)
    yield
    _cpu.poison_workspaces(False)


@dataclass(frozen=True)
class Operands:
    """Arrays, float64 but exact in float32, of one case."""

    x: np.ndarray
    dy: np.ndarray
    indices: np.ndarray
    maxima: np.ndarray
    roots: dict[float, np.ndarray]  # y of lp_pool, by p

    def arrays(self, op, p):
        """Return what `op` reads: (array, "wide" | "narrow" | "indices") in the order of its parameters."""
        x, dy, indices = (self.x, "wide"), (self.dy, "narrow"), (self.indices, "indices")
        return {
            "max_pool": (x,),
            "max_pool_grad": (dy, indices),
            "max_pool_input_grad": (x, (self.maxima, "narrow"), dy),
            "max_unpool": (dy, indices),
            "max_unpool_grad": (x, indices),
            "avg_pool": (x,),
            "avg_pool_grad": (dy,),
            "lp_pool": (x,),
            "lp_pool_grad": (x, (self.roots.get(p), "narrow"), dy),
        }[op]


def make_operands(case, seed=0):
    rng = np.random.default_rng(seed)
    # Values on a grid, so that maxima are often not unique; powers of them stay small.
    x = rng.integers(1, 40, case.x) / 8
    problem = case.problem(x)
    maxima, indices = reference.max_pool(problem, x)
    dy = rng.standard_normal(problem.y_shape, np.float32).astype(np.float64)
    roots = {p: reference.lp_pool(problem, x, p).astype(np.float32).astype(np.float64) for p in POWERS}
    return problem, Operands(x, dy, indices, maxima, roots)


def extra(op, number):
    """Return the positional arguments of `op` behind its arrays, of which there are several sets."""
    if op.startswith("avg"):
        return (DIVISORS[number % len(DIVISORS)],)
    if op.startswith("lp"):
        return (POWERS[number % len(POWERS)],)
    return ()


@functools.lru_cache(64)
def expected(case, op, arguments):
    problem, operands = cached_operands(case)
    arrays = [array for array, _ in operands.arrays(op, *(arguments or (None,)))]
    return getattr(reference, op)(problem, *arrays, *arguments)


@functools.lru_cache(64)
def conditions(case, op, arguments):
    problem, operands = cached_operands(case)
    arrays = [array for array, _ in operands.arrays(op, *(arguments or (None,)))]
    return condition_of(op, problem, arrays, arguments)


@functools.lru_cache(4)
def cached_operands(case):
    return make_operands(case)


@functools.lru_cache(64)
def terms(case):
    """Return how many terms one element of a sum has at most: forward, and backward."""
    problem, _ = cached_operands(case)
    forward = backward = 1
    for windows, n in zip(problem.windows, problem.in_size, strict=True):
        covered = np.zeros(n, int)
        for first, step, count in zip(windows.first, windows.step, windows.count, strict=True):
            covered[first : first + count * step : step] += 1
        forward *= int(windows.count.max(initial=0))
        backward *= int(covered.max())
    return forward, backward


def condition_of(op, problem, arrays, arguments):
    """Return the sum of the magnitudes of the terms of every element, to which its error is relative."""
    magnitudes = [a if a.dtype == np.int64 else np.abs(a.astype(np.float64)) for a in arrays]
    return getattr(reference, op)(problem, *magnitudes, *arguments)


def compare(op, case, actual, right, condition):
    if op in EXACT:
        np.testing.assert_array_equal(actual, right)
        np.testing.assert_array_equal(np.signbit(actual), np.signbit(right))
        return
    forward, backward = terms(case)
    n = max(backward, 1) if op in WIDE else forward
    # The terms of Lp go through two powers and three products before they are summed, each of which rounds.
    bound = tolerance(actual.dtype, n + 16 * op.startswith("lp"))
    finite = np.isfinite(right)
    np.testing.assert_array_equal(actual[~finite], right[~finite])
    error = np.abs(actual[finite].astype(np.float64) - right[finite])
    assert np.all(error <= bound * condition[finite]), f"off by {np.max(error)}: bound {bound} of the terms"


def check(op, case, dtype, layouts, number):
    _, operands = cached_operands(case)
    wide, narrow, indices_layout, with_out = layouts
    layout_of = {"wide": wide, "narrow": narrow, "indices": indices_layout}
    arguments = extra(op, number)
    arrays = []
    for values, size in operands.arrays(op, *(arguments or (None,))):
        if size == "indices":
            _, view = allocate(values.shape, np.int64, layout_of[size], -1)
            view[...] = values
            arrays.append(view)
        else:
            arrays.append(laid_out(values, dtype, layout_of[size]))
    like = laid_out(operands.x, dtype, wide if op not in WIDE else narrow)
    problem = case.problem(like)
    shape = problem.x_shape if op in WIDE else problem.y_shape
    out = Guarded(shape, dtype, wide if op in WIDE else narrow) if with_out else None
    result = getattr(cpu, op)(problem, *arrays, *arguments, out=out and out.view)
    y, indices = result if op == "max_pool" else (result, None)
    if out:
        assert y is out.view
        y = out.result()
    else:
        assert y.strides == empty(shape, dtype, memory_order(like)).strides
    assert y.dtype == dtype
    right = expected(case, op, arguments)
    if op == "max_pool":
        right, right_indices = right
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(indices, right_indices)
        values, none = cpu.max_pool(problem, *arrays, False, out=out and out.view)
        assert none is None
        np.testing.assert_array_equal(out.result() if out else values, right)  # of zeros, either may come out
    compare(op, case, y, right, op not in EXACT and conditions(case, op, arguments))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", POOLS)
def test_pool(name, isa, ran):
    case = POOLS[name]
    with config(isa=isa, threads=1):
        for dtype in DTYPES:
            for op in OPS:
                for number, layouts in enumerate(LAYOUTS):
                    config(threads=1 + number % 2)
                    try:
                        check(op, case, dtype, layouts, number)
                    except Exception as error:
                        error.add_note(f"{op} of {case}, {np.dtype(dtype)}, {layouts}, {extra(op, number)}")
                        raise
                    ran("pools that ran", f"{isa:8} {np.dtype(dtype)}  {op}")


# --------------------------------------------------------------------------------------------------
# Random pools
# --------------------------------------------------------------------------------------------------


@st.composite
def pools(draw):
    """Draw a small pool of any kind, whose windows have at most 6 elements along each axis."""
    ndim = draw(st.integers(1, 3))
    largest = {1: 80, 2: 36, 3: 9}[ndim]
    sizes = tuple(draw(st.integers(1, largest)) for _ in range(ndim))
    x = (draw(st.integers(1, 2)), draw(st.sampled_from(AROUND_LANES)), *sizes)
    if draw(st.booleans()):
        return Pool(x, output_size=tuple(draw(st.integers((n + 5) // 6, n + 2)) for n in sizes))
    dilation = tuple(draw(st.integers(1, 3)) for _ in sizes)
    kernel = tuple(draw(st.integers(1, min(5, (n - 1) // d + 1))) for n, d in zip(sizes, dilation, strict=True))
    padding = tuple((draw(st.integers(0, k // 2)), draw(st.integers(0, k // 2))) for k in kernel)
    stride = tuple(draw(st.integers(1, 4)) for _ in sizes)
    return Pool(x, kernel, stride, padding, dilation, draw(st.booleans()), draw(st.booleans()))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(case=pools(), number=st.integers(0, len(LAYOUTS) - 1), seed=st.integers(0, 9))
def test_random_pool(isa, case, number, seed):
    with config(isa=isa, threads=1 + seed % 3):
        for dtype in DTYPES:
            for op in OPS:
                check(op, case, dtype, LAYOUTS[number], seed)


# --------------------------------------------------------------------------------------------------
# NaN and infinity
# --------------------------------------------------------------------------------------------------

SPECIAL = [
    Pool((2, 9, 9, 37), 3, 1, 1),
    Pool((2, 33, 8, 12), 2, 2),
    Pool((1, 17, 10, 35), 3, 2, 1, 2),
    Pool((1, 5, 4, 5, 21), 3, 2, 1),
    Pool((2, 3, 90), 5, 3, 2),
    Pool((2, 8, 7, 40), output_size=(3, 1)),
    Pool((2, 3, 9, 40), 2, 3),  # elements in no window
    Pool((2, 5, 7, 9), output_size=1),
    Pool((2, 5, 150), output_size=2),
]


def against_reference(op, case, problem, *arrays):
    """Compare one operation on any values; trailing numbers are its arguments."""
    arguments = tuple(a for a in arrays if not isinstance(a, np.ndarray))
    arrays = arrays[: len(arrays) - len(arguments)]
    exact = [a if a.dtype == np.int64 else a.astype(np.float64) for a in arrays]
    right = getattr(reference, op)(problem, *exact, *arguments)
    compare(
        op, case, getattr(cpu, op)(problem, *arrays, *arguments), right, condition_of(op, problem, exact, arguments)
    )


def lp_root(problem, x, p):
    return reference.lp_pool(problem, x.astype(np.float64), p).astype(x.dtype)


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SPECIAL, ids=str)
def test_special_values(case, isa, dtype, order):
    rng = np.random.default_rng(5)
    values = rng.choice(
        [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 2.0], case.x, p=[0.12, 0.03, 0.25, 0.1, 0.1, 0.2, 0.2]
    )
    values[:, 0] = -np.inf  # windows without any finite value
    values[:, -1] = np.where(rng.random(values[:, -1].shape) < 0.5, 0.0, -0.0)  # zeros of both signs are equal
    x = laid_out(values, dtype, order)
    problem = case.problem(x)
    dy = laid_out(
        rng.choice([np.nan, np.inf, 1.0, -2.0, 0.0], problem.y_shape, p=[0.05, 0.05, 0.4, 0.4, 0.1]), dtype, order
    )
    with config(isa=isa), np.errstate(all="ignore"):
        y, indices = cpu.max_pool(problem, x)
        right, right_indices = reference.max_pool(problem, x)
        np.testing.assert_array_equal(indices, right_indices)
        np.testing.assert_array_equal(y, right)
        # bit for bit the element that the index names
        flat = x.reshape(*x.shape[:2], -1)
        named = np.take_along_axis(flat, indices.reshape(*x.shape[:2], -1), 2).reshape(y.shape)
        np.testing.assert_array_equal(np.signbit(y), np.signbit(named))

        against_reference("avg_pool", case, problem, x)
        against_reference("avg_pool_grad", case, problem, dy)
        against_reference("max_pool_grad", case, problem, dy, indices)
        against_reference("max_unpool", case, problem, y, indices)
        exact = dy.astype(np.float64)
        right, condition = (reference.max_pool_grad(problem, g, right_indices) for g in (exact, np.abs(exact)))
        compare("max_pool_input_grad", case, cpu.max_pool_input_grad(problem, x, y, dy), right, condition)
        for p in (2.0, 3.0):
            against_reference("lp_pool", case, problem, x, p)
            against_reference("lp_pool_grad", case, problem, x, lp_root(problem, x, p), dy, p)


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 0.5])
@pytest.mark.parametrize("isa", ISAS)
def test_lp_of_negative_values(isa, p, order):
    """Sums of whole numbers are exact, so that negative ones and zero are told apart."""
    case = Pool((2, 17, 9, 21), 3, 2, 1)
    x = laid_out(np.random.default_rng(3).integers(-2, 3, case.x), np.float32, order)
    problem = case.problem(x)
    dy = laid_out(np.random.default_rng(4).standard_normal(problem.y_shape), np.float32, order)
    right = reference.lp_pool(problem, x.astype(np.float64), p)
    assert np.isnan(right).any() == (p in (3.0, 0.5))
    assert (right == 0).any()
    with config(isa=isa):
        against_reference("lp_pool", case, problem, x, p)
        against_reference("lp_pool_grad", case, problem, x, lp_root(problem, x, p), dy, p)


# --------------------------------------------------------------------------------------------------
# Long sums
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 2, 300_000), (1, 2, 600, 500), (1, 2, 64, 64, 64)])
@pytest.mark.parametrize("isa", ISAS)
def test_long_average_keeps_its_bound(isa, shape, order):
    """The documented bound, (128 + kH * ceil(kW / 128) + kD) * eps * sum |x|, on sums that all round one way."""
    x = empty(shape, np.float32, order)
    x[...] = np.random.default_rng(0).uniform(1, 1 + 1e-3, shape)
    problem = Pool(shape, output_size=1).problem(x)
    depth, height, width = problem.in_size
    with config(isa=isa):
        y = cpu.avg_pool(problem, x)
    exact = x.astype(np.float64).mean(axis=tuple(range(2, x.ndim))).reshape(y.shape)
    bound = (128 + height * math.ceil(width / 128) + depth) * np.finfo(np.float32).eps
    assert np.abs(y / exact - 1).max() < bound
    # A single running sum of these is off by more than this.
    assert np.abs(y / exact - 1).max() < 2e-5


# --------------------------------------------------------------------------------------------------
# Identities on sizes that are too large for the reference
# --------------------------------------------------------------------------------------------------

LARGE = [
    Pool((4, 64, 56, 56), 3, 2, 1),
    Pool((2, 48, 61, 57), 3, 1, 1, include_pad=False),
    Pool((2, 32, 14, 28, 28), 2, 2),
    Pool((4, 40, 40, 40), output_size=(7, 9)),
    Pool((2, 24, 9000), 5, 3, 2),
]


def values(shape, dtype, order, seed):
    array = empty(shape, dtype, order)
    array[...] = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return array


def dot(a, b):
    return float(np.sum(a.astype(np.float64) * b))


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_adjoint(case, isa, dtype, order):
    x = values(case.x, dtype, order, 1)
    problem = case.problem(x)
    dy = values(problem.y_shape, dtype, order, 2)
    with config(isa=isa):
        y, dx = cpu.avg_pool(problem, x), cpu.avg_pool_grad(problem, dy)
        m, indices = cpu.max_pool(problem, x)
        dm = cpu.max_pool_grad(problem, dy, indices)
        gathered = cpu.max_unpool_grad(problem, x, indices)
    # The errors of n products average out: the sum is as exact as one of its terms, times sqrt(n).
    n = dot(y != 0, y != 0)
    scale = math.sqrt(n) * rms(y) * rms(dy)
    assert abs(dot(y, dy) - dot(x, dx)) <= tolerance(dtype, 9) * scale
    assert abs(dot(m, dy) - dot(x, dm)) <= tolerance(dtype, 9) * math.sqrt(n) * rms(m) * rms(dy)
    np.testing.assert_array_equal(gathered, m)


# --------------------------------------------------------------------------------------------------
# The same bits
# --------------------------------------------------------------------------------------------------


def run_all(problem, x, dy):
    y, indices = cpu.max_pool(problem, x)
    average, root = cpu.avg_pool(problem, x), cpu.lp_pool(problem, x, 2.0)
    return [
        y,
        indices,
        average,
        root,
        cpu.max_pool_grad(problem, dy, indices),
        cpu.avg_pool_grad(problem, dy),
        cpu.lp_pool_grad(problem, x, root, dy, 2.0),
        cpu.max_unpool(problem, dy, indices),
        cpu.max_unpool_grad(problem, x, indices),
    ]


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_same_bits_for_any_threads_and_batch(case, isa, order):
    x = values(case.x, np.float32, order, 1)
    problem = case.problem(x)
    dy = values(problem.y_shape, np.float32, order, 2)
    with config(isa=isa, threads=1):
        right = run_all(problem, x, dy)
        for threads in (2, 4):
            config(threads=threads)
            for ours, theirs in zip(run_all(problem, x, dy), right, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        alone = run_all(case.problem(x[1:2]), x[1:2], dy[1:2])
        for ours, theirs in zip(alone, right, strict=True):
            np.testing.assert_array_equal(ours, theirs[1:2])


def test_max_pool_of_scattered_indices_adds_in_order():
    """Several outputs at one input are added in row-major order: 1e8 swallows what comes after it."""
    case = Pool((1, 1, 1, 4), (1, 1))
    dy = np.array([1.0, 1e8, 1.0, -1e8], np.float32).reshape(1, 1, 1, 4)
    dx = cpu.max_pool_grad(case.problem(dy), dy, np.full((1, 1, 1, 4), 2))
    forward = np.float32(0)
    for value in dy.ravel():
        forward += value
    np.testing.assert_array_equal(dx.ravel(), [0, 0, forward, 0])


def test_last_of_equal_indices_counts():
    case = Pool((2, 3, 4), 1)
    x = np.arange(24, dtype=np.float64).reshape(2, 3, 4) + 1
    y = cpu.max_unpool(case.problem(x), x, np.zeros((2, 3, 4), np.int64))
    np.testing.assert_array_equal(y[..., 0], x[..., 3])
    assert not y[..., 1:].any()


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [-1, 30, 2**40, -(2**62)])
@pytest.mark.parametrize("op", ["max_pool_grad", "max_unpool", "max_unpool_grad"])
def test_index_out_of_range(op, bad, order):
    case = Pool((2, 3, 5, 6), 2)
    x = values(case.x, np.float32, order, 0)
    problem = case.problem(x)
    indices = empty(problem.y_shape, np.int64, order)
    indices[...] = 29
    indices[1, 2, 1, 0] = bad
    array = x if op == "max_unpool_grad" else values(problem.y_shape, np.float32, order, 0)
    with pytest.raises(ValueError, match=rf"{op}: indices\[1, 2, 1, 0\] is {bad}, .* \(5, 6\) .* 5 \* 6 - 1 = 29"):
        getattr(cpu, op)(problem, array, indices)


@pytest.mark.parametrize("channels", [1, 2])
def test_window_beyond_32_bits_is_refused(channels):
    """Positions within a window are 32-bit lanes beside float32; the input takes no memory."""
    x = np.broadcast_to(np.zeros(channels, np.float32).reshape(1, channels, 1, 1), (1, channels, 2**31 + 2, 1))
    problem = Pool(x.shape, output_size=1).problem(x)
    with pytest.raises(ValueError, match=r"max_pool: the windows, \(2147483650, 1\) .* 2\*\*31 positions"):
        cpu.max_pool(problem, x)


def test_positions_beyond_32_bits():
    """Small windows far apart in a plane of 2**33 elements that takes no memory."""
    x = np.broadcast_to(np.ones((1, 1, 1), np.float32), (1, 1, 2**33))
    problem = Pool(x.shape, 2, 2**31 - 1).problem(x)
    y, indices = cpu.max_pool(problem, x)
    np.testing.assert_array_equal(indices.ravel(), [o * (2**31 - 1) for o in range(5)])
    np.testing.assert_array_equal(y, np.ones((1, 1, 5)))
    np.testing.assert_array_equal(cpu.avg_pool(problem, x), np.ones((1, 1, 5)))
