"""What holds of convolution without an oracle, on shapes too large for one.

<conv(x, w), y> = <x, conv_input_grad(y, w)> = <w, conv_weight_grad(x, y)>; linearity; shift by
stride; and the same bits for any number of threads and, if asked for, any batch. With and without
the fast algorithms that round more than the plain sum (``exact``).
"""

import itertools

import numpy as np
import pytest
from cases import conv, label_of
from tolerance import tolerance

import fastconv
from fastconv import functional
from fastconv.backends import _cpu

ISAS = _cpu.available_isas()
DTYPES = (np.float32, np.float64)
ORDERS = ("contiguous", "channels_last")

LARGE = {
    # layers of LeNet, VGG, ResNet, MobileNet, and of networks on volumes and signals
    "VGG 3x3": conv((2, 64, 56, 56), (64, 64, 3, 3), padding=1),
    "VGG 3x3, last": conv((2, 256, 14, 14), (128, 256, 3, 3), padding=1),
    "ResNet first": conv((1, 3, 112, 112), (64, 3, 7, 7), stride=2, padding=3),
    "ResNet stride 2": conv((2, 64, 29, 29), (128, 64, 3, 3), stride=2, padding=1),
    "ResNet 1x1": conv((2, 256, 28, 28), (64, 256, 1, 1)),
    "ResNet 1x1 stride 2": conv((1, 128, 28, 28), (256, 128, 1, 1), stride=2),
    "AlexNet groups": conv((2, 48, 27, 27), (128, 24, 5, 5), padding=2, groups=2),
    "depthwise": conv((2, 96, 56, 56), (96, 1, 3, 3), padding=1, groups=96),
    "depthwise 5x5": conv((1, 96, 28, 28), (96, 1, 5, 5), padding=2, groups=96),
    "groups of 4": conv((1, 64, 28, 28), (64, 4, 3, 3), padding=1, groups=16),
    "dilated": conv((1, 32, 65, 65), (32, 32, 3, 3), padding=4, dilation=4),
    "asymmetric": conv((2, 32, 40, 41), (48, 32, 2, 3), 2, ((0, 1), (3, 0))),
    "3d": conv((1, 16, 20, 24, 28), (24, 16, 3, 3, 3), padding=1),
    "3d stride 2": conv((1, 8, 32, 32, 32), (16, 8, 3, 3, 3), stride=2, padding=1),
    "signal": conv((4, 32, 4000), (32, 32, 9), stride=2, padding=4),
}

# (name, exact): not exact only where something else can be chosen
VARIANTS = [
    (name, exact)
    for name, case in LARGE.items()
    for exact in (True, False)
    if exact or {*case.stride, *case.dilation} == {1}
]


def operands(case, dtype, order, seed=0):
    """Return x, w, dy of standard normal values."""
    rng = np.random.default_rng(seed)
    arrays = (rng.standard_normal(shape, dtype) for shape in (case.x, case.w, case.y))
    return [fastconv.to_channels_last(a) if order == "channels_last" else a for a in arrays]


def run_all(case, x, w, dy):
    """Return y, dx, dw."""
    return (
        functional.conv(x, w, None, *case.arguments),
        functional.conv_input_grad(x.shape, w, dy, *case.arguments),
        functional.conv_weight_grad(x, w.shape, dy, *case.arguments),
    )


def bound(case, op, arrays, result):
    """Return how far one element of a result, of x, w and dy, may be from the exact one."""
    n, dtype, label = case.reduction[op], result.dtype, label_of(op, case, arrays, "auto", result)
    if op == "conv_weight_grad":
        label = label.replace("winograd", "winograd weight gradient")
    taps = 5 if case.w[-1] == 5 else 3
    return n**0.5 * max(tolerance(dtype, n), tolerance(dtype, n, label, ndim=len(case.x) - 2, taps=taps))


def dot(a, b):
    return float(np.vdot(a.astype(np.float64), b.astype(np.float64)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "exact"), VARIANTS)
def test_gradients_are_adjoint(name, exact, order, dtype):
    case = LARGE[name]
    for isa in ISAS if dtype is np.float32 else ISAS[-1:]:
        x, w, dy = operands(case, dtype, order)
        with fastconv.config(isa=isa, exact=exact):
            y, dx, dw = run_all(case, x, w, dy)
            bounds = [bound(case, op, (x, w, dy), result)
                      for op, result in zip(case.reduction, (y, dx, dw), strict=True)]
        products = dot(y, dy), dot(x, dx), dot(w, dw)
        # Elements err by at most tolerance * rms, with any sign; the dot product weighs them by
        # independent normal values, so it errs by that times the root of their number (five times
        # as much at the very most). The product itself is about rms * the root of their number:
        # leaving out one element in 1000 changes it by 3 %, which is far outside this bound.
        bounds = [5 * most * result.size**0.5 for most, result in zip(bounds, (y, dx, dw), strict=True)]
        for (a, bound_a), (b, bound_b) in itertools.combinations(zip(products, bounds, strict=True), 2):
            assert abs(a - b) <= bound_a + bound_b, (isa, products, bounds)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "exact"), VARIANTS)
def test_conv_is_linear(name, exact, order):
    """In x, in w and in dy: op(2 a - 3 b) = 2 op(a) - 3 op(b), up to rounding."""
    case = LARGE[name]
    a, b = (operands(case, np.float32, order, seed) for seed in (1, 2))
    with fastconv.config(exact=exact):
        of_a = run_all(case, *a)
        for i, uses in enumerate(({0, 2}, {0, 1}, {1, 2})):
            other = [b[j] if j == i else a[j] for j in range(3)]
            mixed = [2 * a[j] - 3 * b[j] if j == i else a[j] for j in range(3)]
            of_other, of_mixed = run_all(case, *other), run_all(case, *mixed)
            for r in uses:
                expected = 2 * of_a[r].astype(np.float64) - 3 * of_other[r]
                # the mixed operand is sqrt(13) times as large; then the two terms
                op = list(case.reduction)[r]
                most = (13**0.5 + 2 + 3) * bound(case, op, mixed, of_mixed[r])
                assert np.max(np.abs(of_mixed[r] - expected)) <= most, (op, i)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "exact"), VARIANTS)
def test_conv_commutes_with_shifts(name, exact, order):
    """Shifting x by one stride along an axis shifts y by one, bit for bit, away from the edges.

    Where exactness is not asked for, the tiles of Winograd's algorithm, which do not shift, show.
    """
    case = LARGE[name]
    x, w, dy = operands(case, np.float32, order)
    with fastconv.config(exact=exact):
        y = functional.conv(x, w, None, *case.arguments)
    for a in range(2, x.ndim):
        s, d, (lo, _) = case.stride[a - 2], case.dilation[a - 2], case.padding[a - 2]
        with fastconv.config(exact=exact):
            shifted = functional.conv(np.roll(x, s, a), w, None, *case.arguments)
        # outputs whose window touches neither the padding nor what the roll brought in
        first = -(-(lo + s) // s)
        last = (x.shape[a] + lo - d * (w.shape[a] - 1) - 1) // s - 1
        assert last > first
        inner = [slice(None)] * x.ndim
        inner[a] = slice(first, last)
        after = list(inner)
        after[a] = slice(first + 1, last + 1)
        error = np.abs(shifted[tuple(after)].astype(np.float64) - y[tuple(inner)])
        assert error.max() <= (0 if exact else 2 * bound(case, "conv", (x, w, dy), y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "exact"), VARIANTS)
def test_bits_do_not_depend_on_threads(name, exact, order, dtype):
    case = LARGE[name]
    arrays = operands(case, dtype, order)
    for algorithm in ("auto", "im2col") if exact else ("auto",):
        with fastconv.config(algorithm=algorithm, exact=exact):
            results = []
            for threads in (1, 2, 4):
                with fastconv.config(threads=threads):
                    results.append(run_all(case, *arrays))
        for other in results[1:]:
            for one, many in zip(results[0], other, strict=True):
                np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "exact"), VARIANTS)
def test_bits_do_not_depend_on_the_batch(name, exact, order):
    """Under ``config(batch_invariant=True)`` a sample has the same y and dx in any company."""
    case = LARGE[name]
    x, w, dy = operands(case, np.float32, order)
    # so that choices by size, if there were any, would differ
    x, dy = (np.concatenate([array] * 3) for array in (x, dy))
    if order == "channels_last":
        x, dy = fastconv.to_channels_last(x), fastconv.to_channels_last(dy)
    with fastconv.config(batch_invariant=True, exact=exact):
        y = functional.conv(x, w, None, *case.arguments)
        dx = functional.conv_input_grad(x.shape, w, dy, *case.arguments)
        for n in (0, len(x) - 1):
            alone = slice(n, n + 1)
            one = functional.conv(x[alone], w, None, *case.arguments)
            np.testing.assert_array_equal(one, y[alone])
            one = functional.conv_input_grad(x[alone].shape, w, dy[alone], *case.arguments)
            np.testing.assert_array_equal(one, dx[alone])


@pytest.mark.parametrize("channels", [3, 6, 20])
def test_bits_of_pools_do_not_depend_on_the_batch(channels):
    """Short rows of contiguous memory, of which a batch has enough planes for a vector, and a sample may not."""
    x = np.random.default_rng(0).standard_normal((8, channels, 9, 11), np.float32)
    with fastconv.config(batch_invariant=True):
        y = functional.avg_pool(x, 3, 2, 1)
        dx = functional.avg_pool_grad(y, x.shape, 3, 2, 1)
        up = functional.max_pool_input_grad(y, x, functional.max_pool(x, 3, 2, 1), 3, 2, 1)
        for n in (0, 7):
            one, dy = x[n:n + 1], y[n:n + 1]
            np.testing.assert_array_equal(functional.avg_pool(one, 3, 2, 1), y[n:n + 1])
            np.testing.assert_array_equal(functional.avg_pool_grad(dy, one.shape, 3, 2, 1), dx[n:n + 1])
            maximum = functional.max_pool(one, 3, 2, 1)
            np.testing.assert_array_equal(functional.max_pool_input_grad(dy, one, maximum, 3, 2, 1), up[n:n + 1])
