"""Activations against the functions of the mathematics library, their gradients against differences."""

import math

import numpy as np
import pytest

from fastconv import functional, nn

INF = math.inf


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def bounded(x, low, high):
    return min(max(x, low), high)


# name: function, gradient, parameters, by hand, where it has no derivative
TABLE = {
    "clip": (functional.clip, functional.clip_grad, (-1.5, 2.0), lambda x: bounded(x, -1.5, 2), (-1.5, 2)),
    "relu6": (functional.relu6, functional.relu6_grad, (), lambda x: bounded(x, 0, 6), (0, 6)),
    "elu": (functional.elu, functional.elu_grad, (0.7,), lambda x: x if x > 0 else 0.7 * math.expm1(x), (0,)),
    "silu": (functional.silu, functional.silu_grad, (), lambda x: x * sigmoid(x), ()),
    "hardsigmoid": (functional.hardsigmoid, functional.hardsigmoid_grad, (), lambda x: bounded(x + 3, 0, 6) / 6,
                    (-3, 3)),
    "hardswish": (functional.hardswish, functional.hardswish_grad, (), lambda x: x * bounded(x + 3, 0, 6) / 6, (-3, 3)),
    "gelu": (functional.gelu, functional.gelu_grad, (), lambda x: x * phi(x), ()),
    "gelu tanh": (functional.gelu, functional.gelu_grad, ("tanh",), lambda x: 0.5 * x * (
        1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), ()),
}

POINTS = np.concatenate([np.linspace(-12, 12, 1201), [0.0, 1e-6, -1e-6, 40.0, -40.0]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", TABLE)
def test_values(name, dtype):
    function, _, parameters, by_hand, _ = TABLE[name]
    x = POINTS.astype(dtype)
    y = function(x, *parameters)
    assert y.dtype == dtype
    expected = np.array([by_hand(float(v)) for v in x])
    # a few roundings of numbers of the size of x
    assert np.all(np.abs(y - expected) <= 4 * np.finfo(dtype).eps * np.maximum(np.abs(x), 1))


@pytest.mark.parametrize("name", TABLE)
def test_gradients(name):
    _, gradient, parameters, by_hand, corners = TABLE[name]
    x, h = POINTS, 1e-5
    expected = np.array([(by_hand(v + h) - by_hand(v - h)) / (2 * h) for v in x])
    smooth = np.all([np.abs(x - corner) > 2 * h for corner in corners], axis=0)
    dx = gradient(np.ones_like(x), x, *parameters)
    np.testing.assert_allclose(dx[smooth], expected[smooth], atol=1e-8)
    dy = np.random.default_rng(0).standard_normal(x.shape)
    np.testing.assert_allclose(gradient(dy, x, *parameters), dy * dx, rtol=1e-15)
    with pytest.raises(ValueError, match="grad_output has shape"):
        gradient(dy[:3], x, *parameters)


@pytest.mark.parametrize("name", TABLE)
def test_nan_and_memory_order_are_kept(name):
    function, _, parameters, _, _ = TABLE[name]
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 3)).transpose(0, 3, 1, 2)
    x[1, 2, 3, 1] = np.nan
    y = function(x, *parameters)
    assert y.strides == x.strides
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))


def test_bad_parameters():
    x = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="low is 2 and high is 1"):
        functional.clip(x, 2, 1)
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        functional.gelu(x, "erf")


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.ReLU6(), "relu6"), (nn.ELU(0.7), "elu"), (nn.SiLU(), "silu"), (nn.GELU(), "gelu"),
     (nn.GELU("tanh"), "gelu tanh"), (nn.Hardsigmoid(), "hardsigmoid"), (nn.Hardswish(), "hardswish")],
)
def test_layers(layer, name):
    function, gradient, parameters, _, _ = TABLE[name]
    x, dy = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32) * 4, np.ones((2, 3, 4, 5), np.float32)
    y, backward = layer.forward(x)
    np.testing.assert_array_equal(y, function(x, *parameters))
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(backward(dy), gradient(dy, x, *parameters))
