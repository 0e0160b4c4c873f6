"""The NumPy references of pools and normalisation: against loops over windows, and PyTorch."""

import numpy as np
import pytest
from tolerance import assert_close

from fastconv.backends import reference
from fastconv.problem.pool import (
    adaptive_pool_problem,
    indexed_grad_problem,
    pool_problem,
    unpool_grad_problem,
    unpool_problem,
)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


# --------------------------------------------------------------------------------------------------
# Against a loop over windows
# --------------------------------------------------------------------------------------------------

WINDOW_CASES = {
    # name: (in_size, kernel, stride, pairs of padding, dilation)
    "1d": ((9,), (3,), (2,), ((1, 1),), (1,)),
    "1d dilated": ((9,), (3,), (1,), ((2, 0),), (3,)),
    "2d": ((6, 7), (2, 3), (2, 2), ((0, 0), (1, 1)), (1, 1)),
    "2d stride above kernel": ((8, 7), (2, 1), (3, 2), ((1, 0), (0, 0)), (1, 2)),
    "2d asymmetric": ((5, 5), (3, 3), (1, 2), ((2, 0), (0, 2)), (1, 2)),
    "2d global": ((4, 5), (4, 5), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    "3d": ((4, 5, 3), (2, 3, 2), (1, 2, 2), ((1, 0), (1, 1), (0, 1)), (2, 1, 1)),
}


def windows(in_size, kernel, stride, padding, dilation):
    """Yield (output position, its input positions inside, how many lie inside the padded input)."""
    ndim = len(in_size)
    out_size = [
        (in_size[a] + sum(padding[a]) - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
        for a in range(ndim)
    ]
    for o in np.ndindex(*out_size):
        taken = [
            tuple(o[a] * stride[a] + t[a] * dilation[a] - padding[a][0] for a in range(ndim))
            for t in np.ndindex(*kernel)
        ]
        inside = [i for i in taken if all(0 <= i[a] < in_size[a] for a in range(ndim))]
        yield o, inside, len(taken)


@pytest.mark.parametrize("case", WINDOW_CASES)
def test_pools_are_what_they_say_of_every_window(case):
    in_size, *parameters = WINDOW_CASES[case]
    (x,) = normal(0, (2, 3, *in_size))
    problem = pool_problem(x, *parameters, ndim=len(in_size), op="test")
    without_pad = pool_problem(x, *parameters, include_pad=False, ndim=len(in_size), op="test")
    highest, where = reference.max_pool(problem, x)
    average, average_inside = reference.avg_pool(problem, x), reference.avg_pool(without_pad, x)
    divided = reference.avg_pool(problem, x, 7)
    root = reference.lp_pool(without_pad, np.abs(x), 2.5)
    (dy,) = normal(1, average.shape)
    dx = {key: np.zeros(x.shape) for key in ("max", "average", "inside", "divided")}
    for n, c in np.ndindex(2, 3):
        count = 0
        for o, inside, full in windows(in_size, *parameters):
            count += 1
            values = [x[(n, c, *i)] for i in inside]
            best = inside[int(np.argmax(values))]
            assert highest[(n, c, *o)] == max(values)
            assert where[(n, c, *o)] == np.ravel_multi_index(best, in_size)
            for pooled, divisor in (
                (average, full),
                (average_inside, len(values)),
                (divided, 7),
            ):
                mean = sum(values) / divisor
                np.testing.assert_allclose(pooled[(n, c, *o)], mean, rtol=1e-12, atol=1e-14)
            powers = sum(abs(v) ** 2.5 for v in values) * full / len(values)
            np.testing.assert_allclose(root[(n, c, *o)], powers**0.4, rtol=1e-12)
            grad = dy[(n, c, *o)]
            dx["max"][(n, c, *best)] += grad
            for i in inside:
                dx["average"][(n, c, *i)] += grad / full
                dx["inside"][(n, c, *i)] += grad / len(inside)
                dx["divided"][(n, c, *i)] += grad / 7
        assert count == average[n, c].size
    assert_close(reference.max_pool_grad(problem, dy, where), dx["max"], 9)
    assert_close(reference.avg_pool_grad(problem, dy), dx["average"], 9)
    assert_close(reference.avg_pool_grad(without_pad, dy), dx["inside"], 9)
    assert_close(reference.avg_pool_grad(problem, dy, 7), dx["divided"], 9)


# --------------------------------------------------------------------------------------------------
# Against PyTorch
# --------------------------------------------------------------------------------------------------


def random_pool(seed, max_dilation):
    """Draw (x shape, kernel, stride, padding, dilation, ceil_mode) that PyTorch accepts."""
    rng = np.random.default_rng(seed)
    ndim = 1 + seed % 3
    kernel, stride = (tuple(rng.integers(1, 5, ndim).tolist()) for _ in range(2))
    padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
    dilation = tuple(rng.integers(1, max_dilation + 1, ndim).tolist())
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [n + int(rng.integers(0, 7)) for n in extent]
    return (2, 3, *size), kernel, stride, padding, dilation, bool(rng.integers(2))


def backward(torch, y, x, dy):
    (dx,) = torch.autograd.grad(y, x, torch.from_numpy(dy))
    return dx.numpy()


@pytest.mark.parametrize("block", range(6))
def test_max_pool_agrees_with_torch(block):
    torch = pytest.importorskip("torch")
    for seed in range(block * 30, block * 30 + 30):
        x_shape, *parameters = random_pool(seed, 3)
        ndim = len(x_shape) - 2
        (x,) = normal(seed, x_shape)
        tx = torch.from_numpy(x).requires_grad_()
        max_pool = getattr(torch.nn.functional, f"max_pool{ndim}d")
        ty, tindices = max_pool(tx, *parameters, return_indices=True)
        (dy,) = normal(seed + 1, tuple(ty.shape))

        y, indices = reference.max_pool(pool_problem(x, *parameters, ndim=ndim, op="test"), x)
        np.testing.assert_array_equal(y, ty.detach().numpy())
        np.testing.assert_array_equal(indices, tindices.numpy())
        problem = indexed_grad_problem(x_shape, dy, ndim=ndim, op="test")
        dx = reference.max_pool_grad(problem, dy, indices)
        assert_close(dx, backward(torch, ty, tx, dy), 9)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_max_unpool_agrees_with_torch(ndim):
    torch = pytest.importorskip("torch")
    x, dy = normal(0, (2, 3, *(4, 5, 3)[:ndim]), (2, 3, *(8, 10, 6)[:ndim]))
    plane = np.arange(np.prod(dy.shape[2:]))
    rng = np.random.default_rng(0)
    indices = np.array([rng.permutation(plane)[: x[0, 0].size] for _ in range(6)]).reshape(x.shape)
    tx = torch.from_numpy(x).requires_grad_()
    ty = getattr(torch.nn.functional, f"max_unpool{ndim}d")(tx, torch.from_numpy(indices), 2)
    y = reference.max_unpool(unpool_problem(x, 2, ndim=ndim, op="test"), x, indices)
    np.testing.assert_array_equal(y, ty.detach().numpy())
    problem = unpool_grad_problem(dy, x.shape, ndim=ndim, op="test")
    dx = reference.max_unpool_grad(problem, dy, indices)
    np.testing.assert_array_equal(dx, backward(torch, ty, tx, dy))


@pytest.mark.parametrize("block", range(6))
def test_avg_pool_agrees_with_torch(block):
    torch = pytest.importorskip("torch")
    for seed in range(block * 30, block * 30 + 30):
        x_shape, kernel, stride, padding, dilation, ceil_mode = random_pool(seed, 1)
        ndim, include_pad = len(x_shape) - 2, bool(seed // 3 % 2)
        # PyTorch's 1D average pool takes no divisor
        divisor = None if ndim == 1 or seed % 4 else 5
        (x,) = normal(seed, x_shape)
        tx = torch.from_numpy(x).requires_grad_()
        avg_pool = getattr(torch.nn.functional, f"avg_pool{ndim}d")
        arguments = (kernel, stride, padding, ceil_mode, include_pad)
        ty = avg_pool(tx, *arguments, *[divisor] * (ndim > 1))
        (dy,) = normal(seed + 1, tuple(ty.shape))

        problem = pool_problem(
            x, kernel, stride, padding, dilation, ceil_mode, include_pad, ndim=ndim, op="test"
        )
        assert_close(reference.avg_pool(problem, x, divisor), ty.detach().numpy(), 64)
        dx = reference.avg_pool_grad(problem, dy, divisor)
        assert_close(dx, backward(torch, ty, tx, dy), 64)


@pytest.mark.parametrize("p", [1, 2, 3, 2.5, 4, 0.5])
@pytest.mark.parametrize("block", range(2))
def test_lp_pool_agrees_with_torch(block, p):
    torch = pytest.importorskip("torch")
    for seed in range(block * 15, block * 15 + 15):
        x_shape, kernel, stride, _, dilation, ceil_mode = random_pool(seed, 1)
        ndim = len(x_shape) - 2
        (x,) = normal(seed, x_shape)
        if seed % 5 == 0 and p >= 1:
            x[0] = 0  # PyTorch's gradient of an all-zero window is zero
        if seed % 3 == 0:
            x = np.abs(x)
        tx = torch.from_numpy(x).requires_grad_()
        if ndim == 1:
            kernel, stride = kernel[0], stride[0]
        lp_pool = getattr(torch.nn.functional, f"lp_pool{ndim}d")
        ty = lp_pool(tx, p, kernel, stride, ceil_mode)
        (dy,) = normal(seed + 1, tuple(ty.shape))

        problem = pool_problem(x, kernel, stride, 0, dilation, ceil_mode, ndim=ndim, op="test")
        y = reference.lp_pool(problem, x, p)
        # A sum of odd powers may almost cancel, which its root and the gradient of that amplify.
        np.testing.assert_allclose(y, ty.detach().numpy(), rtol=1e-9)
        dx = reference.lp_pool_grad(problem, x, y, dy, p)
        np.testing.assert_allclose(dx, backward(torch, ty, tx, dy), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_adaptive_pools_agree_with_torch(ndim):
    torch = pytest.importorskip("torch")
    for seed in range(30):
        rng = np.random.default_rng(seed)
        in_size, out_size = rng.integers(1, 8, (2, ndim)).tolist()
        (x,) = normal(seed, (2, 3, *in_size))
        tx = torch.from_numpy(x).requires_grad_()
        problem = adaptive_pool_problem(x, tuple(out_size), ndim=ndim, op="test")
        (dy,) = normal(seed + 1, (2, 3, *out_size))

        ty = getattr(torch.nn.functional, f"adaptive_avg_pool{ndim}d")(tx, out_size)
        assert_close(reference.avg_pool(problem, x), ty.detach().numpy(), 64)
        assert_close(reference.avg_pool_grad(problem, dy), backward(torch, ty, tx, dy), 64)

        max_pool = getattr(torch.nn.functional, f"adaptive_max_pool{ndim}d")
        ty, tindices = max_pool(tx, out_size, return_indices=True)
        y, indices = reference.max_pool(problem, x)
        np.testing.assert_array_equal(y, ty.detach().numpy())
        np.testing.assert_array_equal(indices, tindices.numpy())
        dx = reference.max_pool_grad(problem, dy, indices)
        assert_close(dx, backward(torch, ty, tx, dy), 64)


# --------------------------------------------------------------------------------------------------
# NaN, infinity, ties
# --------------------------------------------------------------------------------------------------


def test_max_pool_of_special_values():
    inf, nan = np.inf, np.nan
    x = np.array([[[1, 1, nan, nan, -inf, -inf, inf, inf]]])
    y, indices = reference.max_pool(pool_problem(x, 2, ndim=1, op="test"), x)
    np.testing.assert_array_equal(y, [[[1, nan, -inf, inf]]])
    np.testing.assert_array_equal(indices, [[[0, 3, 4, 6]]])


def test_max_pool_ignores_padding():
    x = np.full((1, 1, 3, 3), -5.0)
    y, indices = reference.max_pool(pool_problem(x, 3, 2, 1, ndim=2, op="test"), x)
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), -5.0))
    np.testing.assert_array_equal(indices, [[[[0, 1], [3, 4]]]])


def test_avg_pool_keeps_special_values_in_their_windows():
    inf, nan = np.inf, np.nan
    x = np.array([[[1, 3, nan, 2, -inf, 2, inf, -inf]]])
    y = reference.avg_pool(pool_problem(x, 2, ndim=1, op="test"), x)
    np.testing.assert_array_equal(y, [[[2, nan, -inf, nan]]])
    problem = adaptive_pool_problem(x, 3, ndim=1, op="test")  # windows 0:3, 2:6, 5:8
    np.testing.assert_array_equal(
        reference.avg_pool_grad(problem, np.array([[[3, inf, 6]]])),
        [[[1, 1, inf, inf, inf, inf, 2, 2]]],
    )


def test_results_have_dtype_and_order_of_the_input():
    x = np.ones((2, 6, 7, 3), np.float32).transpose(0, 3, 1, 2)
    problem = pool_problem(x, 2, ndim=2, op="test")
    y, indices = reference.max_pool(problem, x)
    for array, dtype in [
        (y, np.float32),
        (indices, np.int64),
        (reference.avg_pool(problem, x), np.float32),
        (reference.lp_pool(problem, x, 2), np.float32),
    ]:
        assert array.dtype == dtype
        assert array.shape == (2, 3, 3, 3)
        assert array.transpose(0, 2, 3, 1).flags.c_contiguous


# --------------------------------------------------------------------------------------------------
# Normalisation
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_batch_norm_agrees_with_torch(shape, training):
    torch = pytest.importorskip("torch")
    x, dy, weight, bias, mean = normal(0, shape, shape, (3,), (3,), (3,))
    variance = np.abs(mean) + 0.5
    leaves = [torch.from_numpy(array).requires_grad_() for array in (x, weight, bias)]
    running = [torch.from_numpy(array) for array in (mean, variance)]
    ty = torch.nn.functional.batch_norm(leaves[0], *running, *leaves[1:], training, 0.0, 1e-3)
    gradients = torch.autograd.grad(ty, leaves, torch.from_numpy(dy))

    if training:
        mean, variance = reference.batch_statistics(x)
    y = reference.batch_norm(x, mean, variance, weight, bias, 1e-3)
    assert_close(y, ty.detach().numpy(), x.size)
    ours = reference.batch_norm_grad(x, dy, mean, variance, weight, 1e-3, training=training)
    for actual, expected in zip(ours, gradients, strict=True):
        assert_close(actual, expected.numpy(), x.size)


def test_batch_norm_without_weight_is_with_ones():
    x, dy = normal(0, (4, 3, 6), (4, 3, 6))
    statistics = reference.batch_statistics(x)
    np.testing.assert_array_equal(
        reference.batch_norm(x, *statistics),
        reference.batch_norm(x, *statistics, np.ones(3), np.zeros(3)),
    )
    with_ones = reference.batch_norm_grad(x, dy, *statistics, np.ones(3), training=True)
    for actual, expected in zip(
        reference.batch_norm_grad(x, dy, *statistics, training=True), with_ones, strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("shape", [(4, 3, 6), (2, 7, 4, 5), (2, 5, 2, 3, 4)])
def test_local_response_norm_agrees_with_torch(shape, size):
    torch = pytest.importorskip("torch")
    x, dy = normal(size, shape, shape)
    tx = torch.from_numpy(x).requires_grad_()
    parameters = (size, 0.7, 0.6, 1.5)
    ty = torch.nn.functional.local_response_norm(tx, *parameters)
    assert_close(reference.local_response_norm(x, *parameters), ty.detach().numpy(), size)
    dx = reference.local_response_norm_grad(x, dy, *parameters)
    assert_close(dx, backward(torch, ty, tx, dy), size)
