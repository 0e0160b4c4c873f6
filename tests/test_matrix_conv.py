"""Every pass x algorithm x instruction set x dtype x memory layout against the NumPy reference.

Outputs are full of NaN, workspaces too, inputs have NaN around them, and outputs have guards around
and between their elements: see `cases`.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from cases import CONVS, Guarded, conv, label_of, laid_out
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close

from fastconv import functional, plan
from fastconv.arrays import empty, memory_order
from fastconv.backends import _cpu, reference
from fastconv.config import config
from fastconv.plan import ROWS
from fastconv.problem import conv_input_grad_problem, conv_problem, conv_weight_grad_problem

ISAS = _cpu.available_isas()
ALGORITHMS = tuple(row.name for row in ROWS if row.name != "reference")
PASSES = ("conv", "conv_input_grad", "conv_weight_grad")

WINOGRAD_GRADIENT_KERNELS = {(1, 1, 3), (1, 3, 3), (3, 3, 3), (1, 1, 5), (1, 5, 5), (1, 1, 2), (1, 2, 2), (1, 3, 1)}
# Tiles there are by whether the kernel has several taps along depth, height, width.
WINOGRAD_AXES = {(False, False, True), (False, True, True), (True, True, True), (False, True, False)}
WINOGRAD_AXES_OF_3_TAPS = {(True, True, True), (False, True, False)}

# (layout of the first array that is read, of the second, of out=; None lets fastconv allocate)
LAYOUTS = [
    ("contiguous", "contiguous", None),
    ("channels_last", "channels_last", None),
    ("contiguous", "channels_last", "contiguous"),
    ("channels_last", "contiguous", "channels_last"),
    ("contiguous", "transposed", "channels_last"),
    ("channels_last", "channels_last", "contiguous"),
    ("channel_slice", "contiguous", "channel_slice"),
    ("channels_last_slice", "channel_slice", "channels_last_slice"),
    ("cropped", "channels_last_slice", "cropped"),
    ("strided", "negative", "strided"),
    ("negative", "strided", "negative"),
    ("transposed", "cropped", "transposed"),
    ("channels_last_negative", "channels_last_negative", "channels_last_negative"),
]


@pytest.fixture(autouse=True)
def poisoned():
    _cpu.poison_workspaces(True)
    yield
    _cpu.poison_workspaces(False)


@functools.lru_cache(4)
def operands(case, seed=0):
    """Return x, w, b, dy, float64, exact in float32 too."""
    rng = np.random.default_rng(seed)
    shapes = (case.x, case.w, case.w[:1], case.y)
    return [rng.standard_normal(shape, np.float32).astype(np.float64) for shape in shapes]


def reference_of(case, x, w, b, dy):
    """Return what each pass computes, by the reference, in float64."""
    arguments = case.arguments
    return {
        "conv": reference.conv(conv_problem(x, w, *arguments), x, w, b),
        "conv_input_grad": reference.conv_input_grad(conv_input_grad_problem(case.x, w, dy, *arguments), dy, w),
        "conv_weight_grad": reference.conv_weight_grad(conv_weight_grad_problem(x, case.w, dy, *arguments), x, dy),
    }


@functools.lru_cache(4)
def expected(case):
    """Return `reference_of` the operands of a case."""
    return reference_of(case, *operands(case))


def run(op, case, x, w, b, dy, algorithm, out):
    """Run one pass by the public functions."""
    options = {"algorithm": algorithm, "out": out}
    if op == "conv":
        return functional.conv(x, w, b, *case.arguments, **options)
    if op == "conv_input_grad":
        return functional.conv_input_grad(case.x, w, dy, *case.arguments, **options)
    return functional.conv_weight_grad(x, case.w, dy, *case.arguments, **options)


def winograd_may_refuse(op, case, layout):
    kernel = (1,) * (5 - len(case.w)) + case.w[2:]
    strided, dilated = ({*sizes} != {1} for sizes in (case.stride, case.dilation))
    if op == "conv_weight_grad":
        return strided or kernel not in WINOGRAD_GRADIENT_KERNELS
    axes = tuple(k > 1 for k in kernel)
    taps = max(-(-k // s) for k, s in zip(case.w[2:], case.stride, strict=True))  # of a phase
    no_tile = axes not in WINOGRAD_AXES or taps == 1 or (taps == 2 and axes in WINOGRAD_AXES_OF_3_TAPS)
    large = max(kernel) > 10 or (len(case.x) == 5 and (strided or max(kernel) > 6)) or max(case.stride) > 2
    return (strided and dilated) or large or no_tile


def channelwise_may_refuse(op, case, layout):
    fewest_lanes = 2  # of any instruction set and dtype
    return max(case.x[1], case.w[0]) > fewest_lanes * case.groups


# What each algorithm need not do; a row of fastconv.plan that is not here may refuse nothing.
MAY_REFUSE = {
    "winograd": winograd_may_refuse,
    "channelwise": channelwise_may_refuse,
}


def closeness(op, case, algorithm):
    """Return what `assert_close` is to know of a pass by what `label_of` names."""
    n = case.reduction[op]
    if op == "conv_weight_grad" and algorithm.startswith("winograd"):
        return {"reduction_length": n, "algorithm": algorithm.replace("winograd", "winograd weight gradient"),
                "magnitude": n**0.5, "taps": max(case.w[2:])}
    # Of n products of standard normal values, whatever the padding takes away from the rms.
    return {"reduction_length": n, "algorithm": algorithm, "magnitude": n**0.5}


def attempt(op, case, operands, algorithm, layout, out=None):
    """Run one pass, or return None where the algorithm refuses what it may refuse."""
    try:
        return run(op, case, *operands, algorithm, out)
    except ValueError as error:
        may_refuse = MAY_REFUSE.get(algorithm, lambda op, case, layout: False)
        if "cannot run" in str(error) and may_refuse(op, case, layout):
            return None
        raise


def check(op, case, algorithm, dtype, layouts):
    """Run one pass in one layout and compare; return False if the algorithm refuses the layout."""
    x, w, b, dy = operands(case)
    first, second, third = layouts
    # x and w, dy and w, x and dy
    x_layout, w_layout, dy_layout = (first, second, second) if op != "conv_input_grad" else (first, second, first)
    x, w, dy = (laid_out(values, dtype, layout) for values, layout in ((x, x_layout), (w, w_layout), (dy, dy_layout)))
    shape = {"conv": case.y, "conv_input_grad": case.x, "conv_weight_grad": case.w}[op]
    out = Guarded(shape, dtype, third) if third else None
    arrays = x, w, b.astype(dtype), dy
    y = attempt(op, case, arrays, algorithm, first, out and out.view)
    if y is None:
        return False
    label = label_of(op, case, (x, w, dy), algorithm, y)
    if out:
        assert y is out.view
        y = out.result()
    else:
        order = memory_order(dy if op == "conv_input_grad" else x)
        assert y.strides == empty(shape, dtype, order).strides
    assert y.dtype == dtype
    assert_close(y, expected(case)[op], **closeness(op, case, label))
    return True


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONVS)
def test_conv(name, isa, algorithm, ran):
    with config(isa=isa, threads=1):
        for dtype in (np.float32, np.float64):
            for op in PASSES:
                for number, layouts in enumerate(LAYOUTS):
                    config(threads=1 + number % 2)
                    try:
                        served = check(op, CONVS[name], algorithm, dtype, layouts)
                    except Exception as error:
                        error.add_note(f"{op} of {CONVS[name]}, {np.dtype(dtype)}, {layouts}")
                        raise
                    what = f"{isa:8} {np.dtype(dtype)}  {algorithm:8} {op}"
                    ran("convolutions that ran" if served else "convolutions refused", what)
                    if not served:
                        break  # no other layout changes its mind


# --------------------------------------------------------------------------------------------------
# Every tile of Winograd's, not only the one that is predicted to be fastest
# --------------------------------------------------------------------------------------------------

VARIANT_CASES = [
    *(f"kernel {k}" for k in (2, 3, 4, 5, 7, 8)), "kernel 5x1", "kernel 1x7", "stride 2", "stride 2x3", "dilation 2",
    "stride above kernel", "asymmetric padding, stride 2", "padding beyond kernel, stride 3", "long reduction",
    "3 groups of primes", "1d kernel 9", "1d kernel 10", "1d kernel 8, stride 2", "33 in channels",
    "33 out channels", *(n for n in CONVS if n.startswith("3d")),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", VARIANT_CASES)
def test_every_tile_of_winograd(name, isa, ran):
    case = CONVS[name]
    for dtype, order in itertools.product((np.float32, np.float64), ("contiguous", "channels_last")):
        x, w, b, dy = (laid_out(a, dtype, order if a.ndim > 1 else "contiguous") for a in operands(case))
        problems = {"conv": (conv_problem(x, w, *case.arguments), x, b),
                    "conv_input_grad": (conv_input_grad_problem(case.x, w, dy, *case.arguments), dy, None)}
        for op, (problem, read, bias) in problems.items():
            request = plan.Request(problem, op, isa, False, bias is not None, False, problem.batch, 1)
            for row, variant in plan.candidates(request):
                if row.name != "winograd":
                    continue
                chosen = plan.make_plan(dataclasses.replace(request, variant=variant), row, variant)
                shape = case.y if op == "conv" else case.x
                out = laid_out(np.full(shape, np.nan if chosen.covers else 0.0), dtype, order)
                assert chosen.engine.run(read, w, bias, out, 1)
                ran("convolutions that ran", f"{isa:8} {np.dtype(dtype)}  {variant:14} {op}")
                try:
                    assert_close(out, expected(case)[op], **closeness(op, case, f"winograd {variant}"))
                except AssertionError as error:
                    error.add_note(f"{op} of {case}, {np.dtype(dtype)}, {order}, {variant}")
                    raise


# --------------------------------------------------------------------------------------------------
# Random shapes around the sizes of tiles
# --------------------------------------------------------------------------------------------------


@st.composite
def convs(draw, isa, dtype):
    """Draw a convolution whose channels and widths lie around multiples of this table's tile."""
    rows, columns = _cpu.tile(isa, np.dtype(dtype).name)

    def size(largest):
        base = draw(st.sampled_from([1, rows, 2 * rows, columns // 2, columns, 2 * columns]))
        return min(max(base + draw(st.integers(-1, 1)), 1), largest)

    ndim = draw(st.integers(1, 3))
    kernel, stride, dilation = (
        tuple(draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))) for _ in range(3)
    )
    padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(ndim))
    out_size = [draw(st.integers(1, 4)) for _ in range(ndim - 1)] + [size(65)]
    in_size = [
        max((o - 1) * s + d * (k - 1) + 1 - lo - hi, 1)
        for o, s, d, k, (lo, hi) in zip(out_size, stride, dilation, kernel, padding, strict=True)
    ]
    # groups, channels of each that are read and written; the second is depthwise, the last fits several to a vector
    kinds = [(1, size(33), size(65)), (size(65), 1, 1), (2, size(17), size(17)), (size(17), size(6), size(6))]
    groups, c, k = draw(st.sampled_from(kinds))
    return conv(
        (draw(st.integers(1, 2)), groups * c, *in_size),
        (groups * k, c, *kernel),
        stride,
        padding,
        dilation,
        groups,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("isa", ISAS)
def test_conv_around_tiles(isa, dtype, ran):
    @settings(max_examples=60, deadline=None, database=None)
    @given(convs(isa, dtype), st.sampled_from(LAYOUTS), st.sampled_from(ALGORITHMS))
    def test(case, layouts, algorithm):
        for op in PASSES:
            served = check(op, case, algorithm, dtype, layouts)
            what = f"{isa:8} {np.dtype(dtype)}  {algorithm:8} {op}"
            ran("convolutions that ran" if served else "convolutions refused", what)

    with config(isa=isa, threads=2):
        test()


# --------------------------------------------------------------------------------------------------
# NaN and infinity
# --------------------------------------------------------------------------------------------------

SPECIAL_CASES = [
    "kernel 3",
    "length 33",
    "17 in channels",
    "17 out channels",
    "width 33",
    "length 17",
    "kernel 5",
    "1x1 padded",
    "3 channels",
    "stride 2x3",
    "stride above padded kernel",
    "dilation 3 stride 2",
    "padding beyond kernel, stride 3",
    "3 groups of primes",
    "depthwise",
    "depthwise stride 2",
    "depthwise, asymmetric",
    "33 depthwise channels",
    "depthwise width 17",
    "1d depthwise",
    "long reduction",
    "3d mixed",
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_conv_of_nan_and_infinity(name, isa, algorithm):
    """One special value at a time, first, last or anywhere; the zeros of the padding meet it too."""
    case = CONVS[name]
    rng = np.random.default_rng(0)
    for special, value in ((0, np.inf), (0, np.nan), (1, -np.inf), (1, np.nan), (3, np.inf)):
        for where in (0, -1, None):
            values = [array.copy() for array in operands(case)]
            at = rng.integers(values[special].size) if where is None else where
            values[special].flat[at] = value
            with np.errstate(invalid="ignore"):
                right = reference_of(case, *values)
            for layout in ("contiguous", "channels_last"):
                x, w, dy = (laid_out(values[i], np.float32, layout) for i in (0, 1, 3))
                arrays = (x, w, values[2].astype(np.float32), dy)
                for op in PASSES:
                    with config(isa=isa, threads=1):
                        y = attempt(op, case, arrays, algorithm, layout)
                        if y is None:
                            continue
                        label = label_of(op, case, (x, w, dy), algorithm, y)
                    try:
                        assert_close(y, right[op], **closeness(op, case, label))
                    except AssertionError as error:
                        error.add_note(f"{op} of {case}, {layout}, {value} at {at} of {special}")
                        raise


# --------------------------------------------------------------------------------------------------
# Transposed convolutions, and arrays whose elements share memory
# --------------------------------------------------------------------------------------------------


def output_padding(case):
    """Return what the transposed convolution needs to come back to the shape of x."""
    sizes = zip(case.x[2:], case.y[2:], case.w[2:], case.stride, case.padding, case.dilation, strict=True)
    return tuple(n - ((o - 1) * s - lo - hi + d * (k - 1) + 1) for n, o, k, s, (lo, hi), d in sizes)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_transpose(name, isa, ran):
    """dx of the convolution, and its own gradients: the forward pass and dw."""
    case = CONVS[name]
    x, w, _, dy = operands(case)
    b = np.random.default_rng(1).standard_normal(case.x[1])
    arguments = (case.stride, case.padding, output_padding(case), case.groups, case.dilation)
    right = reference_of(case, x, w, np.zeros(case.w[0]), dy)
    transposed = right["conv_input_grad"] + b.reshape(-1, *[1] * (x.ndim - 2))
    n = case.reduction
    for dtype in (np.float32, np.float64):
        for layout in ("contiguous", "channels_last", "strided"):
            tx, tw, tdy = (laid_out(array, dtype, layout) for array in (x, w, dy))
            with config(isa=isa, threads=1, exact=True):
                y = functional.conv_transpose(tdy, tw, b.astype(dtype), *arguments)
                grad = functional.conv_transpose_input_grad(tx, tw, *arguments)
                weight_grad = functional.conv_transpose_weight_grad(tdy, case.w, tx, *arguments)
            for actual, exact, op in (
                (y, transposed, "conv_input_grad"),
                (grad, right["conv"], "conv"),
                (weight_grad, right["conv_weight_grad"], "conv_weight_grad"),
            ):
                assert actual.dtype == dtype
                assert_close(actual, exact, n[op] + 1, magnitude=n[op] ** 0.5)
                ran("convolutions that ran", f"{isa:8} {np.dtype(dtype)}  auto     transposed {op}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", SPECIAL_CASES)
def test_conv_of_broadcast_arrays(name, isa):
    """Strides of zero: one sample, one filter and one gradient, seen many times."""
    case = CONVS[name]
    x, w, b, dy = operands(case)
    x, w, dy = (np.broadcast_to(array[:1, :1], array.shape).astype(np.float64) for array in (x, w, dy))
    right = reference_of(case, x, w, b, dy)
    once = [np.broadcast_to(array[:1, :1].astype(np.float32), array.shape) for array in (x, w, dy)]
    assert all(array.strides[:2] == (0, 0) for array in once)
    with config(isa=isa, exact=True):
        for op in PASSES:
            y = run(op, case, once[0], once[1], b.astype(np.float32), once[2], "auto", None)
            n = case.reduction[op]
            # The terms of these sums are not independent: the errors of n equal ones add up.
            assert_close(y, right[op], n**2, magnitude=n**0.5)
