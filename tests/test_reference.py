"""The NumPy references: against loops over elements, against PyTorch, with NaN and infinity.

The references are what every other test compares with, so nothing here may come from them.
"""

import numpy as np
import pytest
from tolerance import assert_close

from fastconv.backends import reference
from fastconv.problem import (
    conv_input_grad_problem,
    conv_problem,
    conv_transpose_problem,
    conv_weight_grad_problem,
)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


# --------------------------------------------------------------------------------------------------
# Convolution against loops over every product
# --------------------------------------------------------------------------------------------------


class LoopConv:
    """Convolution and its gradients by scalar products, in the words of docs/architecture.md."""

    def __init__(self, x_shape, w_shape, stride, pad_lo, pad_hi, dilation, groups):
        self.x_shape, self.w_shape = x_shape, w_shape
        self.stride, self.pad_lo, self.dilation = stride, pad_lo, dilation
        self.k_per_group = w_shape[0] // groups
        self.axes = range(len(x_shape) - 2)
        padded = [x_shape[2 + a] + pad_lo[a] + pad_hi[a] for a in self.axes]
        self.out_size = [
            (padded[a] - dilation[a] * (w_shape[2 + a] - 1) - 1) // stride[a] + 1 for a in self.axes
        ]
        self.y_shape = (x_shape[0], w_shape[0], *self.out_size)
        self.arguments = (stride, tuple(zip(pad_lo, pad_hi, strict=True)), dilation, groups)

    def filters(self):
        """Yield (n, k, c, c_in_group, tap)."""
        for n, k, c, *tap in np.ndindex(self.x_shape[0], *self.w_shape):
            yield n, k, k // self.k_per_group * self.w_shape[1] + c, c, tuple(tap)

    def position(self, o, t):
        return tuple(
            o[a] * self.stride[a] + t[a] * self.dilation[a] - self.pad_lo[a] for a in self.axes
        )

    def y(self, x, w):
        y = np.zeros(self.y_shape)
        for n, k, c, c_in_group, t in self.filters():
            for o in np.ndindex(*self.out_size):
                y[(n, k, *o)] += w[(k, c_in_group, *t)] * at(x[n, c], self.position(o, t))
        return y

    def dw(self, x, dy):
        dw = np.zeros(self.w_shape)
        for n, k, c, c_in_group, t in self.filters():
            for o in np.ndindex(*self.out_size):
                dw[(k, c_in_group, *t)] += dy[(n, k, *o)] * at(x[n, c], self.position(o, t))
        return dw

    def dx(self, w, dy):
        dx = np.zeros(self.x_shape)
        for n, k, c, c_in_group, t in self.filters():
            for i in np.ndindex(*self.x_shape[2:]):
                scaled = self.position((0,) * len(i), t)
                o, rest = zip(
                    *[divmod(i[a] - scaled[a], self.stride[a]) for a in self.axes], strict=True
                )
                if not any(rest):
                    dx[(n, c, *i)] += w[(k, c_in_group, *t)] * at(dy[n, k], o)
        return dx


def at(plane, position):
    """Return plane[position], or the zero that lies outside it."""
    inside = all(0 <= p < n for p, n in zip(position, plane.shape, strict=True))
    return plane[position] if inside else 0.0


LOOP_CASES = {
    # name: (x shape, w shape, stride, pad_lo, pad_hi, dilation, groups)
    "1d": ((2, 3, 7), (2, 3, 3), (1,), (1,), (1,), (1,), 1),
    "1d strided": ((1, 2, 9), (3, 2, 2), (3,), (0,), (2,), (2,), 1),
    "1d stride above kernel": ((2, 2, 8), (2, 1, 1), (3,), (0,), (0,), (1,), 2),
    "2d": ((1, 2, 5, 4), (3, 2, 3, 2), (1, 1), (1, 0), (1, 1), (1, 1), 1),
    "2d groups": ((2, 4, 4, 5), (6, 2, 2, 3), (2, 1), (0, 2), (1, 1), (1, 2), 2),
    "2d depthwise": ((1, 3, 5, 5), (6, 1, 3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 3),
    "2d padding beyond kernel": ((1, 1, 2, 3), (1, 1, 2, 2), (2, 3), (4, 3), (3, 5), (1, 1), 1),
    "2d one pixel": ((1, 2, 1, 1), (2, 2, 1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 1),
    "3d": ((1, 2, 3, 4, 3), (2, 2, 2, 3, 2), (1, 2, 1), (1, 1, 0), (0, 1, 1), (1, 1, 2), 1),
    "3d groups": ((1, 2, 3, 3, 4), (2, 1, 2, 1, 3), (2, 1, 2), (0, 1, 2), (1, 0, 2), (2, 1, 1), 2),
}


def check_against_loops(loop, x, w, dy):
    products = loop.w_shape[0] * np.prod(loop.w_shape[1:]) * np.prod(loop.y_shape)
    problem = conv_problem(x, w, *loop.arguments)
    assert_close(reference.conv(problem, x, w), loop.y(x, w), products)
    problem = conv_input_grad_problem(x.shape, w, dy, *loop.arguments)
    assert_close(reference.conv_input_grad(problem, dy, w), loop.dx(w, dy), products)
    problem = conv_weight_grad_problem(x, w.shape, dy, *loop.arguments)
    assert_close(reference.conv_weight_grad(problem, x, dy), loop.dw(x, dy), products)


@pytest.mark.parametrize("case", LOOP_CASES)
def test_conv_is_the_sum_of_its_products(case):
    loop = LoopConv(*LOOP_CASES[case])
    check_against_loops(loop, *normal(0, loop.x_shape, loop.w_shape, loop.y_shape))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("case", LOOP_CASES)
def test_conv_multiplies_zeros_with_infinity(case, value):
    """One special value in each operand; padded zeros meet it and make NaN of infinity."""
    loop = LoopConv(*LOOP_CASES[case])
    for special in range(3):
        operands = normal(special, loop.x_shape, loop.w_shape, loop.y_shape)
        operands[special].flat[operands[special].size // 2] = value
        with np.errstate(invalid="ignore"):
            check_against_loops(loop, *operands)


def test_conv_of_infinite_weight_is_nan_where_numpy_pad_says():
    x, w = np.ones((1, 1, 4)), np.array([[[1.0, np.inf, 1.0]]])
    y = reference.conv(conv_problem(x, w, padding=2), x, w)
    # padded: 0 0 1 1 1 1 0 0; the middle tap meets a zero in the first and last output
    np.testing.assert_array_equal(y, [[[np.nan, np.inf, np.inf, np.inf, np.inf, np.nan]]])


def test_conv_adds_bias():
    x, w, b = normal(0, (2, 3, 5, 4), (4, 3, 2, 2), (4,))
    problem = conv_problem(x, w)
    expected = reference.conv(problem, x, w) + b[:, None, None]
    np.testing.assert_array_equal(reference.conv(problem, x, w, b), expected)


# --------------------------------------------------------------------------------------------------
# Convolution against PyTorch
# --------------------------------------------------------------------------------------------------


def random_conv(seed):
    """Draw (x shape, w shape, stride, pairs of padding, dilation, groups)."""
    rng = np.random.default_rng(seed)
    ndim = 1 + seed % 3
    groups = int(rng.choice([1, 1, 2, 3]))
    kernel, stride, dilation = (tuple(rng.integers(1, 4, ndim).tolist()) for _ in range(3))
    padding = tuple(map(tuple, rng.integers(0, 4, (ndim, 2)).tolist()))
    size = [
        max(d * (k - 1) + 1 - lo - hi, 1) + int(rng.integers(0, 5))
        for k, d, (lo, hi) in zip(kernel, dilation, padding, strict=True)
    ]
    c_per_group, k_per_group, batch = rng.integers(1, 5, 3).tolist()
    x_shape = (batch, groups * c_per_group, *size)
    return x_shape, (groups * k_per_group, c_per_group, *kernel), stride, padding, dilation, groups


@pytest.mark.parametrize("block", range(10))
def test_conv_agrees_with_torch(block):
    torch = pytest.importorskip("torch")
    for seed in range(block * 36, block * 36 + 36):
        x_shape, w_shape, stride, padding, dilation, groups = random_conv(seed)
        x, w, b = normal(seed, x_shape, w_shape, w_shape[:1])
        tx, tw = (torch.from_numpy(array).requires_grad_() for array in (x, w))
        tb = torch.from_numpy(b)
        padded = torch.nn.functional.pad(tx, [p for pair in reversed(padding) for p in pair])
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[len(stride) - 1]
        ty = conv(padded, tw, tb, stride, 0, dilation, groups)
        (dy,) = normal(seed + 1, tuple(ty.shape))
        tdx, tdw = torch.autograd.grad(ty, (tx, tw), torch.from_numpy(dy))

        arguments = (stride, padding, dilation, groups)
        n = np.prod(w_shape) * np.prod(ty.shape)
        y = reference.conv(conv_problem(x, w, *arguments), x, w, b)
        assert_close(y, ty.detach().numpy(), n)
        problem = conv_input_grad_problem(x_shape, w, dy, *arguments)
        assert_close(reference.conv_input_grad(problem, dy, w), tdx.numpy(), n)
        problem = conv_weight_grad_problem(x, w_shape, dy, *arguments)
        assert_close(reference.conv_weight_grad(problem, x, dy), tdw.numpy(), n)


@pytest.mark.parametrize("block", range(5))
def test_transposed_conv_agrees_with_torch(block):
    torch = pytest.importorskip("torch")
    for seed in range(block * 36, block * 36 + 36):
        rng = np.random.default_rng(seed)
        ndim, groups = 1 + seed % 3, int(rng.choice([1, 1, 2, 3]))
        kernel, stride, dilation = (tuple(rng.integers(1, 4, ndim).tolist()) for _ in range(3))
        extra = tuple(
            int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True)
        )
        padding = tuple(
            int(rng.integers(0, d * (k - 1) // 2 + 1))
            for k, d in zip(kernel, dilation, strict=True)
        )
        c, k_per_group, batch = rng.integers(1, 5, 3).tolist()
        x, w = normal(
            seed, (batch, groups * c, *rng.integers(1, 6, ndim)), (groups * c, k_per_group, *kernel)
        )
        transposed = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[
            ndim - 1
        ]
        expected = transposed(
            torch.from_numpy(x), torch.from_numpy(w), None, stride, padding, extra, groups, dilation
        )
        problem = conv_transpose_problem(x, w, stride, padding, extra, groups, dilation)
        assert_close(reference.conv_input_grad(problem, x, w), expected.numpy(), w.size)


# --------------------------------------------------------------------------------------------------
# Results: dtype, memory order, out
# --------------------------------------------------------------------------------------------------


def test_results_have_dtype_and_order_of_the_input():
    x = np.zeros((2, 6, 7, 3), np.float32).transpose(0, 3, 1, 2)
    w = np.zeros((4, 3, 2, 2), np.float32)
    y = reference.conv(conv_problem(x, w), x, w)
    assert y.dtype == np.float32
    assert y.shape == (2, 4, 5, 6)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    dx = reference.conv_input_grad(conv_input_grad_problem(x.shape, w, y), y, w)
    assert dx.dtype == np.float32
    assert dx.shape == x.shape
    assert dx.strides == x.strides
    x = np.ascontiguousarray(x)
    assert reference.conv(conv_problem(x, w), x, w).flags.c_contiguous


def test_result_is_rounded_once():
    """float32 results are those of float64, rounded: 2**24 + 1 + ... + 1 keeps its ones."""
    x = np.ones((1, 9, 1), np.float32)
    w = np.full((1, 9, 1), 1, np.float32)
    x[0, 0, 0] = 2**24
    y = reference.conv(conv_problem(x, w), x, w)
    assert y.item() == 2**24 + 8


def test_out_is_written_through_any_view():
    x, w = normal(0, (2, 3, 6, 5), (4, 3, 3, 3))
    problem = conv_problem(x, w)
    buffer = np.full((2, 9, 4, 6), 7.0)
    out = buffer[:, 8:0:-2, :, ::-2]
    assert reference.conv(problem, x, w, out=out) is out
    np.testing.assert_array_equal(out, reference.conv(problem, x, w))
    out[...] = 7.0
    np.testing.assert_array_equal(buffer, 7.0)
