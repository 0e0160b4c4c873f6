"""Pointwise operations and normalisation as functions: float32 against the reference, odd views, NaN, errors."""

import numpy as np
import pytest
from tolerance import assert_close

from fastconv.arrays import memory_order, to_channels_last
from fastconv.backends import reference
from fastconv.functional import norm, pointwise

SHAPES = [(4, 3), (2, 5, 7), (3, 4, 5, 6), (2, 6, 3, 4, 5), (1, 1, 4, 4), (0, 3, 2)]
ORDERS = ["contiguous", "channels_last"]


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def ordered(x, order):
    return to_channels_last(x) if order == "channels_last" and x.ndim > 2 else x


# ---- Normalisation -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_against_the_reference(shape, training, order):
    x, dy = (ordered(a, order) for a in normal(2, *shape))
    channels = shape[1]
    weight, bias, running_mean = normal(3, channels)
    running_var = normal(channels) ** 2 + np.float32(0.5)
    if not x.size:
        mean, var = running_mean, running_var
    elif training:
        mean, var = reference.batch_statistics(x)
    else:
        mean, var = running_mean, running_var
    exact = [a.astype(np.float64) for a in (x, dy, mean, var, weight, bias)]
    x64, dy64, mean64, var64, weight64, bias64 = exact
    n = max(x.size // channels, 1)
    y = norm.batch_norm(x, running_mean.copy(), running_var.copy(), weight, bias, training)
    assert y.dtype == np.float32
    assert_close(y, reference.batch_norm(x64, mean64, var64, weight64, bias64), n)
    grads = norm.batch_norm_grad(dy, x, running_mean, running_var, weight, training)
    expected = reference.batch_norm_grad(x64, dy64, mean64, var64, weight64, training=training)
    if x.size:
        for grad, right in zip(grads, expected, strict=True):
            assert_close(grad, right, n, magnitude=1.0)
    assert [grad.shape for grad in grads] == [shape, (channels,), (channels,)]
    assert {grad.dtype for grad in grads} == {np.dtype(np.float32)}
    if order == "channels_last" and x.ndim > 2 and channels > 1 and x.size:
        assert memory_order(y) == memory_order(grads[0]) == "channels_last"


def test_batch_norm_moves_running_statistics_in_place():
    x = normal(6, 3, 4, dtype=np.float64)
    mean, var = np.array([1.0, 2, 3]), np.array([4.0, 5, 6])
    norm.batch_norm(x, mean, var, training=True, momentum=0.25)
    np.testing.assert_allclose(mean, 0.75 * np.array([1, 2, 3]) + 0.25 * x.mean((0, 2)))
    np.testing.assert_allclose(var, 0.75 * np.array([4, 5, 6]) + 0.25 * x.var((0, 2), ddof=1))
    before = mean.copy(), var.copy()
    norm.batch_norm(x, mean, var)
    norm.batch_norm(x[:0], mean, var, training=True)
    np.testing.assert_array_equal((mean, var), before)
    norm.batch_norm(x, None, None, training=True)
    norm.batch_norm(x, mean, None, training=True)
    assert not np.array_equal(mean, before[0])


def test_statistics_of_the_forward_pass_may_be_handed_on():
    x, dy = normal(2, 5, 3, 4, dtype=np.float64)
    handed = norm.batch_norm_grad(dy, x, None, None, None, True, statistics=norm.batch_statistics(x))
    for a, b in zip(handed, norm.batch_norm_grad(dy, x, None, None, None, True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_variance_of_values_far_from_zero():
    """E[x**2] - E[x]**2 in float32 would be off by more than the variance itself."""
    x = (np.random.default_rng(0).standard_normal((1000, 2, 50)) + 3000).astype(np.float32)
    mean, var = norm.batch_statistics(x)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(var, x.astype(np.float64).var((0, 2)), rtol=1e-6)
    # the mean lies between two neighbouring float32 numbers, and so do all values around it
    x = np.tile(np.array([1e6, 1e6 + 0.0625, 1e6 + 0.0625], np.float32), 20)[:, None]
    np.testing.assert_allclose(norm.batch_statistics(x)[1], x.astype(np.float64).var(0), rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 2])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_local_response_norm_against_the_reference(shape, size, order):
    x, dy = (ordered(a, order) for a in normal(2, *shape))
    constants = (size, 0.3, 0.75, 1.5)
    x64, dy64 = x.astype(np.float64), dy.astype(np.float64)
    y, dx = norm.local_response_norm(x, *constants), norm.local_response_norm_grad(dy, x, *constants)
    # powers and quotients of float32: a few roundings each, as a sum of 9 terms at most
    assert_close(y, reference.local_response_norm(x64, *constants), 9)
    assert_close(dx, reference.local_response_norm_grad(x64, dy64, *constants), 9)
    if order == "channels_last" and shape[1] > 1 and x.size:
        assert memory_order(y) == memory_order(dx) == "channels_last"


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda x: norm.batch_norm(x, None, None), ValueError, "running_mean is None, but training=False"),
    (lambda x: norm.batch_norm(x, np.ones(3), None), ValueError, "running_var is None"),
    (lambda x: norm.batch_norm(x, np.ones(4), np.ones(3)), ValueError, r"running_mean has shape \(4,\)"),
    (lambda x: norm.batch_norm(x, np.ones(3), np.ones(3), np.ones(2)), ValueError, r"weight has shape \(2,\)"),
    (lambda x: norm.batch_norm(x, np.ones(3), np.ones(3), None, np.ones((3, 1))), ValueError, "bias has shape"),
    (lambda x: norm.batch_norm(x[0, :, 0], np.ones(3), np.ones(3)), ValueError, "at least 2 axes"),
    (lambda x: norm.batch_norm(x[:1, :, :1], None, None, training=True), ValueError, "1 value per channel"),
    (lambda x: norm.batch_norm(x, np.ones(3), np.ones(3), eps=0), ValueError, "eps is 0"),
    (lambda x: norm.batch_norm(x.astype(np.float16), np.ones(3), np.ones(3)), TypeError, "float16"),
    (lambda x: norm.batch_norm_grad(x[:1], x, None, None, training=True), ValueError, "grad_output has shape"),
    (lambda x: norm.local_response_norm(x[:, :, 0], 2), ValueError, "at least 3 axes"),
    (lambda x: norm.local_response_norm(x, 0), ValueError, "size is 0"),
    (lambda x: norm.local_response_norm_grad(x.astype(np.float32), x, 2), TypeError, "grad_output has dtype float32"),
])
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(normal(4, 3, 2, dtype=np.float64))
    assert "Hint: " in str(caught.value)


# ---- Pointwise -----------------------------------------------------------------------------------------------------

FUNCTIONS = [
    ("relu", lambda x, dy: pointwise.relu(x)),
    ("leaky_relu", lambda x, dy: pointwise.leaky_relu(x, 0.1)),
    ("sigmoid", lambda x, dy: pointwise.sigmoid(x)),
    ("tanh", lambda x, dy: pointwise.tanh(x)),
    ("softmax", lambda x, dy: pointwise.softmax(x)),
    ("log_softmax", lambda x, dy: pointwise.log_softmax(x)),
    ("relu_grad", lambda x, dy: pointwise.relu_grad(dy, x)),
    ("leaky_relu_grad", lambda x, dy: pointwise.leaky_relu_grad(dy, x, 0.1)),
    ("sigmoid_grad", lambda x, dy: pointwise.sigmoid_grad(dy, x)),
    ("tanh_grad", lambda x, dy: pointwise.tanh_grad(dy, x)),
    ("softmax_grad", lambda x, dy: pointwise.softmax_grad(dy, x)),
    ("log_softmax_grad", lambda x, dy: pointwise.log_softmax_grad(dy, x)),
    ("dropout", lambda x, dy: pointwise.dropout(x, 0.5, dy > 0)),
]
VIEWS = {
    "reversed": lambda a: a[:, ::-1, :, ::-1],
    "transposed": lambda a: a.transpose(3, 1, 0, 2),
    "channel slice": lambda a: a[:, 1:3],
    "every other": lambda a: a[::2, :, ::2],
    "repeated": lambda a: np.broadcast_to(a[:1], a.shape),
    "empty": lambda a: a[:0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_any_view_gives_what_a_copy_gives(name, function, view):
    x, dy = (VIEWS[view](a) for a in normal(2, 4, 4, 6, 5, dtype=np.float64))
    before = x.copy(), dy.copy()
    y = function(x, dy)
    np.testing.assert_allclose(y, function(*before), rtol=1e-14, atol=1e-15)
    np.testing.assert_array_equal((x, dy), before)
    assert y.flags.writeable
    # gradients and views in different orders
    np.testing.assert_allclose(function(x, before[1]), y, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(("name", "function"), FUNCTIONS)
def test_channels_last_stays(name, function):
    x, dy = (to_channels_last(a) for a in normal(2, 2, 3, 4, 5))
    y = function(x, dy)
    assert memory_order(y) == "channels_last"
    assert y.dtype == np.float32


def test_masks_stop_infinities():
    x = np.array([np.inf, -np.inf, np.nan, 1.0])
    keep = np.array([False, False, False, True])
    np.testing.assert_array_equal(pointwise.dropout(x, 0.5, keep), [0, 0, 0, 2])
    np.testing.assert_array_equal(pointwise.dropout(x, 0.5, ~keep), [np.inf, -np.inf, np.nan, 0])
    np.testing.assert_array_equal(pointwise.dropout(x[3:], 1.0, np.array([False])), [0])
    np.testing.assert_array_equal(pointwise.relu_grad(x, np.array([0.0, -1, 0, 3])), [0, 0, 0, 1])
    np.testing.assert_array_equal(pointwise.relu_grad(x, np.array([1.0, np.nan, 1, 0])), [np.inf, -np.inf, np.nan, 0])
    np.testing.assert_array_equal(pointwise.leaky_relu_grad(x, np.array([1.0, 1, 1, -1]), 0.5),
                                  [np.inf, -np.inf, np.nan, 0.5])


def test_sigmoid_is_accurate_on_both_sides():
    x = np.linspace(-80, 80, 2001).astype(np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.longdouble)))
    np.testing.assert_allclose(pointwise.sigmoid(x), exact.astype(np.float64), rtol=4e-7)


def test_no_warning_escapes():
    """The whole suite runs with warnings as errors; here every function meets values that overflow."""
    x = np.array([[-np.inf, -1e38, -1e-40, 0, 1e38, np.inf, np.nan]], np.float32)
    for _, function in FUNCTIONS:
        function(x, x)
    norm.batch_norm(x.T, None, None, training=True)
    norm.batch_norm_grad(x.T, x.T, None, None, training=True)
    norm.local_response_norm(x[:, :, None], 3)
    norm.local_response_norm_grad(x[:, :, None], x[:, :, None], 3)
