"""Convolutions with fixed weights: packed once, ended by an activation, with a residual sum."""

import math
import sys
import threading

import numpy as np
import pytest
from cases import CONVS
from tolerance import assert_close

import fastconv
from fastconv import functional, nn, prepare_conv, prepare_conv_transpose
from fastconv.plan import plan_for
from fastconv.problem import conv_problem


@pytest.fixture(autouse=True)
def exact():
    """The tolerance of the plain sum is for the plain sum."""
    with fastconv.config(exact=True):
        yield


def normal(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype) for shape in shapes]


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def normal_cdf(y):
    return np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)), otypes=[float])(y)


# By hand, in float64.
ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.minimum(np.maximum(y, 0), 6),
    ("clip", -1, 2.5): lambda y: np.minimum(np.maximum(y, -1), 2.5),
    "leaky_relu": lambda y: np.where(y > 0, y, 0.01 * y),
    ("leaky_relu", 0.2): lambda y: np.where(y > 0, y, 0.2 * y),
    "elu": lambda y: np.where(y > 0, y, np.exp(np.minimum(y, 0)) - 1),
    ("elu", 0.5): lambda y: np.where(y > 0, y, 0.5 * (np.exp(np.minimum(y, 0)) - 1)),
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "silu": lambda y: y * sigmoid(y),
    "hardsigmoid": lambda y: np.minimum(np.maximum(y + 3, 0), 6) / 6,
    "hardswish": lambda y: y * np.minimum(np.maximum(y + 3, 0), 6) / 6,
    "gelu": lambda y: y * normal_cdf(y),
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["2 groups", "depthwise", "kernel 3", "3d stride 2", "1d kernel 9"])
def test_prepared_convolution_is_the_convolution(name, activation):
    case = CONVS[name]
    x, w, b, residual = normal(0, case.x, case.w, case.w[:1], case.y)
    prepared = prepare_conv(w, b, *case.arguments, activation=activation)
    plain = functional.conv(*(array.astype(np.float64) for array in (x, w, b)), *case.arguments)
    function = ACTIVATIONS[activation]
    n = case.reduction["conv"]
    # twice, from fewer samples, and in the other order
    for array in (x, x, x[:1], fastconv.to_channels_last(x)):
        for _ in range(2):
            assert_close(prepared(array), function(plain[: len(array)]), n, magnitude=n**0.5)
    last = fastconv.to_channels_last(residual)
    for added in (residual, residual, last, residual.repeat(2, axis=1)[:, ::2]):
        assert_close(prepared(x, residual=added), function(plain + residual), n, magnitude=n**0.5)
    assert_close(prepared(x[0], residual=residual[0]), function(plain + residual)[0], n, magnitude=n**0.5)
    assert_close(prepared(fastconv.to_channels_last(x), residual=last), function(plain + residual), n,
                 magnitude=n**0.5)
    out = np.full(case.y, np.nan, np.float32)
    assert prepared(x, out=out) is out
    assert_close(out, function(plain), n, magnitude=n**0.5)
    prepared(x, residual=residual, out=out)
    assert_close(out, function(plain + residual), n, magnitude=n**0.5)
    assert prepared.nbytes >= w.nbytes or case.groups > 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
@pytest.mark.parametrize(
    "shapes",
    [  # x, w, stride, padding, output_padding, groups, dilation; the third leaves pixels that meet no tap
        ((2, 6, 5, 7), (6, 4, 3, 3), 1, 1, 0, 1, 1),
        ((1, 4, 6, 5), (4, 3, 4, 4), 2, 1, 0, 2, 1),
        ((2, 3, 4, 4), (3, 5, 1, 1), 2, 0, 1, 1, 1),
        ((1, 8, 3, 4, 5), (8, 4, 2, 2, 2), 2, 0, 0, 1, 1),
        ((2, 4, 9), (4, 2, 3), 1, 0, 0, 2, 2),
    ],
)
def test_prepared_transposed_convolution(shapes, activation, dtype):
    x_shape, w_shape, stride, padding, output_padding, groups, dilation = shapes
    arguments = (stride, padding, output_padding, groups, dilation)
    x, w, b = normal(0, x_shape, w_shape, (w_shape[1] * groups,), dtype=dtype)
    prepared = prepare_conv_transpose(w, b, *arguments, activation=activation)
    with fastconv.config(algorithm="reference"):
        plain = functional.conv_transpose(*(array.astype(np.float64) for array in (x, w, b)), *arguments)
    n = math.prod(w_shape) // w_shape[1]
    function = ACTIVATIONS[activation]
    for array in (x, x, fastconv.to_channels_last(x)):
        assert_close(prepared(array), function(plain), n, magnitude=n**0.5)
    assert_close(prepared(x[0]), function(plain[0]), n, magnitude=n**0.5)
    (residual,) = normal(1, plain.shape, dtype=dtype)
    out = np.full(plain.shape, np.nan, dtype)
    assert prepared(x, residual=residual, out=out) is out
    assert_close(out, function(plain + residual), n, magnitude=n**0.5)
    assert prepared.nbytes >= w.nbytes


def test_prepared_convolution_runs_the_reference():
    x, w, b, residual = normal(0, (2, 3, 5, 5), (4, 3, 3, 3), (4,), (2, 4, 3, 3))
    expected = np.maximum(functional.conv(x, w, b, algorithm="im2col") + residual, 0)
    prepared = prepare_conv(w, b, activation="relu", algorithm="reference")
    assert_close(prepared(x, residual=residual), expected.astype(np.float64), 27)
    assert np.min(prepared(x)) == 0


@pytest.mark.parametrize(
    ("activation", "error", "pattern"),
    [
        ("swish", ValueError, "'silu'"),
        (("clip",), ValueError, "with 0 parameters, but clip takes 2"),
        (("clip", 3, 2), ValueError, "low <= high"),
        (("relu", 1), ValueError, "relu takes 0"),
        (("elu", "a"), TypeError, "numbers"),
        ((), ValueError, "activation is"),
        (np.tanh, ValueError, "activation is"),
    ],
)
def test_activations_are_checked(activation, error, pattern):
    (w,) = normal(0, (4, 3, 3, 3))
    with pytest.raises(error, match=pattern):
        prepare_conv(w, activation=activation)


def test_residuals_and_outputs_are_checked():
    x, w, residual = normal(0, (1, 3, 5, 5), (4, 3, 3, 3), (1, 4, 3, 3))
    prepared = prepare_conv(w)
    prepared(x, residual=residual)
    with pytest.raises(ValueError, match=r"residual has shape \(1, 4, 3, 1\)"):
        prepared(x, residual=residual[..., :1])
    with pytest.raises(ValueError, match=r"residual has shape \(4, 3, 3\)"):
        prepared(x, residual=residual[0])
    with pytest.raises(TypeError, match="residual has dtype float64"):
        prepared(x, residual=residual.astype(np.float64))
    with pytest.raises(ValueError, match="shares memory"):
        prepared(x, residual=residual, out=residual)
    with pytest.raises(ValueError, match="spatial axes"):
        prepare_conv(np.zeros((3, 4), np.float32))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_residuals_that_are_not_finite(activation):
    """inf - inf is NaN, silently, and NaN passes every activation."""
    x, w = normal(0, (1, 3, 6, 6), (4, 3, 3, 3))
    x[0, 0, 0, 0] = np.inf
    y = functional.conv(x, w)
    y = prepare_conv(w, activation=activation)(x, residual=-y)
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(np.eye(1, 16).reshape(4, 4) > 0, (1, 4, 4, 4)))


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_repeated_calls_are_not_checked_again(monkeypatch, order):
    """What keeps small calls cheap: the second call finds the first one's plan without making its problem."""
    x, w, b = normal(0, (1, 6, 14, 14), (16, 6, 5, 5), (16,))
    if order == "channels_last":
        x = fastconv.to_channels_last(x)
    layer = nn.Conv2d(6, 16, 5, rng=0)
    up = nn.ConvTranspose2d(6, 4, 2, stride=2, rng=0)
    prepared = prepare_conv(w, b, activation="relu")
    runs = [lambda: functional.conv2d(x, w, b), lambda: prepared(x), lambda: prepared(x[0]), lambda: layer(x),
            lambda: up(x)]
    before = [run() for run in runs]
    for module, names in (("conv", ("conv_problem",)), ("prepared", ("conv_problem", "conv_transpose_problem"))):
        for name in names:
            monkeypatch.setattr(sys.modules[f"fastconv.functional.{module}"], name, None)
    for run, expected in zip(runs, before, strict=True):
        np.testing.assert_array_equal(run(), expected)
    with pytest.raises(TypeError):  # another layout is
        prepared(x[:, :, 1:])


def test_a_prepared_convolution_obeys_the_settings():
    x, w = normal(0, (1, 64, 24, 24), (64, 64, 3, 3))
    prepared = prepare_conv(w, padding=1)
    with fastconv.config(exact=False):
        fast = [prepared(x) for _ in range(2)]
    plain = [prepared(x) for _ in range(2)]
    assert not np.array_equal(fast[0], plain[0])
    np.testing.assert_array_equal(*fast)
    np.testing.assert_array_equal(*plain)


def test_prepared_convolution_keeps_its_own_weights():
    x, w, b = normal(0, (2, 8, 6, 6), (4, 8, 3, 3), (4,))
    prepared = prepare_conv(w, b, padding=1)
    before = prepared(x)
    w[...], b[...] = 0, 0
    np.testing.assert_array_equal(prepared(x), before)
    # also for layouts that it has not packed for yet
    assert_close(prepared(fastconv.to_channels_last(x)), before.astype(np.float64), 72)


def test_prepared_convolution_pads_by_mode():
    x, w = normal(0, (2, 8, 6, 6), (4, 8, 3, 3))
    prepared = prepare_conv(w, padding="same", padding_mode="circular")
    expected = functional.conv(x, w, padding="same", padding_mode="circular")
    np.testing.assert_array_equal(prepared(x), expected)


def test_prepared_convolution_serves_many_threads():
    w, b = normal(0, (16, 8, 3, 3), (16,))
    sizes = range(5, 25)
    inputs = [normal(size, (1, 8, size, size))[0] for size in sizes]
    inputs += [fastconv.to_channels_last(x) for x in inputs]
    alone = [prepare_conv(w, b, padding=1)(x) for x in inputs]
    prepared = prepare_conv(w, b, padding=1)
    start, wrong = threading.Barrier(8), []

    def work():
        start.wait()
        for x, expected in zip(inputs, alone, strict=True):
            if not np.array_equal(prepared(x), expected):
                wrong.append(x.shape)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("algorithm", ["direct", "im2col", "auto"])
def test_relu_passes_nan_on(algorithm):
    """max(NaN, 0) is NaN in NumPy and PyTorch, and not in C."""
    x, w = normal(0, (1, 16, 9, 20), (16, 16, 3, 3))
    x[0, 0, 4, 10] = np.nan
    x = fastconv.to_channels_last(x)
    y = prepare_conv(w, padding=1, activation="relu", algorithm=algorithm)(x)
    expected = np.zeros(y.shape, bool)
    expected[:, :, 3:6, 9:12] = True
    np.testing.assert_array_equal(np.isnan(y), expected)


@pytest.mark.parametrize(("x_shape", "w_shape", "stride", "op"), [
    ((1, 96, 14, 14), (256, 96, 1, 1), 1, "conv"),
    ((3, 40, 9, 9), (200, 40, 1, 1), 1, "conv"),
    ((1, 200, 14, 14), (96, 200, 1, 1), 1, "conv_input_grad"),
    ((2, 129, 15, 13), (48, 129, 3, 3), 2, "conv_input_grad"),
    ((1, 256, 6, 7, 8), (40, 128, 2, 3, 1), 2, "conv_input_grad"),
    ((1, 260, 90), (24, 260, 5), 3, "conv_input_grad"),
])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_used_once_are_packed_in_tasks_with_the_same_bits(x_shape, w_shape, stride, op, dtype):
    groups = x_shape[1] // w_shape[1]
    x, w = normal(5, x_shape, w_shape, dtype=dtype)
    problem = conv_problem(fastconv.to_channels_last(x), w, stride=stride, padding=w_shape[-1] // 2, groups=groups)
    shape = {"conv": problem.y_shape, "conv_input_grad": problem.x_shape}
    given, = normal(6, shape["conv_input_grad" if op == "conv" else "conv"], dtype=dtype)
    given = fastconv.to_channels_last(given)
    results = []
    for threads in (1, 2):
        with fastconv.config(threads=threads):
            once = plan_for(problem, op, "direct").engine
            with pytest.raises(ValueError, match="as they are"):
                once.pack(w, threads)
            often = plan_for(problem, op, "direct", packed=True).engine
            for engine, weights in ((once, w), (once, fastconv.to_channels_last(w)), (often, often.pack(w, threads))):
                if weights is not w and engine is once:
                    engine = plan_for(conv_problem(fastconv.to_channels_last(x), weights, stride=stride,
                                                   padding=w_shape[-1] // 2, groups=groups), op, "direct").engine
                out = fastconv.to_channels_last(np.full(shape[op], np.nan, dtype))
                assert engine.run(given, weights, None, out, threads)
                results.append(out)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
