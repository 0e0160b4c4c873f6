"""The NumPy references: against loops over single elements, against PyTorch, and with NaN and infinity.

The references are what every other test compares with, so nothing here may come from them.
"""

import itertools

import numpy as np
import pytest

from fastconv.backends import reference
from fastconv.problem import conv_input_grad_problem, conv_problem, conv_weight_grad_problem
from tolerance import assert_close, tolerance

DTYPE = np.dtype(np.float64)


def arrays(seed, *shapes, dtype=DTYPE):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


# --------------------------------------------------------------------------------------------------
# Convolution against a loop over every element
# --------------------------------------------------------------------------------------------------


def loop_conv(x, w, stride, pad_lo, pad_hi, dilation, groups):
    """Return y, and a function of dy that returns dx and dw, by visiting each product once."""
    ndim = x.ndim - 2
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pad_lo, pad_hi, strict=True)])
    out_size = [
        (padded.shape[2 + a] - dilation[a] * (w.shape[2 + a] - 1) - 1) // stride[a] + 1
        for a in range(ndim)
    ]
    per_group_in, per_group_out = w.shape[1], w.shape[0] // groups

    def products():
        for n, k in itertools.product(range(x.shape[0]), range(w.shape[0])):
            for o in itertools.product(*map(range, out_size)):
                for c in range(per_group_in):
                    for t in itertools.product(*map(range, w.shape[2:])):
                        i = tuple(o[a] * stride[a] + t[a] * dilation[a] for a in range(ndim))
                        yield (n, k, *o), (n, k // per_group_out * per_group_in + c, *i), (k, c, *t)

    y = np.zeros((x.shape[0], w.shape[0], *out_size))
    for at_y, at_x, at_w in products():
        y[at_y] += padded[at_x] * w[at_w]

    def grads(dy):
        dpadded, dw = np.zeros(padded.shape), np.zeros(w.shape)
        for at_y, at_x, at_w in products():
            dpadded[at_x] += dy[at_y] * w[at_w]
            dw[at_w] += dy[at_y] * padded[at_x]
        inner = tuple(slice(lo, lo + n) for lo, n in zip(pad_lo, x.shape[2:], strict=True))
        return dpadded[(..., *inner)], dw

    return y, grads


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


@pytest.mark.parametrize("case", LOOP_CASES)
def test_conv_is_the_sum_of_its_products(case):
    x_shape, w_shape, stride, lo, hi, dilation, groups = LOOP_CASES[case]
    x, w = arrays(0, x_shape, w_shape)
    b = np.arange(1.0, w_shape[0] + 1)
    parameters = (stride, tuple(zip(lo, hi, strict=True)), dilation, groups)
    y, grads = loop_conv(x, w, stride, lo, hi, dilation, groups)
    (dy,) = arrays(1, y.shape)
    dx, dw = grads(dy)

    n = w[0].size
    problem = conv_problem(x, w, *parameters)
    assert_close(reference.conv(problem, x, w), y, n)
    assert_close(reference.conv(problem, x, w, b), y + b.reshape(-1, *[1] * (x.ndim - 2)), n)
    problem = conv_input_grad_problem(x.shape, w, dy, *parameters)
    assert_close(reference.conv_input_grad(problem, dy, w), dx, n * w.shape[0])
    problem = conv_weight_grad_problem(x, w.shape, dy, *parameters)
    assert_close(reference.conv_weight_grad(problem, x, dy), dw, y[:, 0].size)
