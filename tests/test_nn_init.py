"""Initial weights: their distributions, fans with groups and transposed convolutions, and PyTorch's bounds."""

import math

import numpy as np
import pytest

from fastconv import nn
from fastconv.nn import init


@pytest.mark.parametrize(("shape", "groups", "transposed", "expected"), [
    ((10, 4), 1, False, (4, 10)),
    ((8, 6, 3, 3), 1, False, (54, 72)),
    ((8, 3, 3, 3), 2, False, (27, 36)),  # 6 input channels in 2 groups
    ((8, 1, 5), 8, False, (5, 5)),  # depthwise
    ((6, 8, 2, 2, 2), 1, True, (48, 64)),
    ((6, 4, 3), 2, True, (9, 12)),  # 8 output channels in 2 groups
])
def test_fans(shape, groups, transposed, expected):
    assert init.fans(shape, groups, transposed) == expected


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (2, False), (1, True), (2, True)])
def test_fans_count_the_connections_of_a_layer(groups, transposed):
    """Count what one output in the middle depends on, and what one input in the middle reaches, by experiment."""
    cls = nn.ConvTranspose1d if transposed else nn.Conv1d
    layer = cls(4, 6, 3, padding=1, groups=groups, bias=False, dtype=np.float64)
    layer.weight.assign(np.ones(layer.weight.shape))
    x = np.zeros((4, 11))
    x[1, 5] = 1
    y, backward = layer.forward(x)
    dy = np.zeros_like(y)
    dy[2, 5] = 1
    counted = int(backward(dy).sum()), int(y.sum())
    assert init.fans(layer.weight.shape, groups, transposed) == counted


SHAPE = (64, 40, 5, 5)
FAN_IN, FAN_OUT = 40 * 25, 64 * 25


@pytest.mark.parametrize(("function", "options", "variance", "uniform"), [
    (init.he_normal, {}, 2 / FAN_IN, False),
    (init.he_normal, {"negative_slope": 0.5}, 2 / 1.25 / FAN_IN, False),
    (init.he_uniform, {}, 2 / FAN_IN, True),
    (init.he_normal, {"transposed": True}, 2 / FAN_OUT, False),
    (init.glorot_normal, {}, 2 / (FAN_IN + FAN_OUT), False),
    (init.glorot_uniform, {}, 2 / (FAN_IN + FAN_OUT), True),
    (init.glorot_uniform, {"groups": 2}, 2 / (FAN_IN + FAN_OUT / 2), True),
    (init.torch_default, {}, 1 / (3 * FAN_IN), True),
])
def test_distributions(function, options, variance, uniform):
    w = function(SHAPE, 0, **options)
    assert w.shape == SHAPE
    assert w.dtype == np.float32
    # 64,000 values: the standard error of the mean is 0.4 % of the deviation, that of the variance 0.6 %
    assert abs(w.mean()) < 0.02 * math.sqrt(variance)
    assert w.var() == pytest.approx(variance, rel=0.03)
    bound = math.sqrt(3 * variance)
    assert (np.abs(w).max() <= bound * (1 + 1e-6)) == uniform
    if uniform:
        assert np.abs(w).max() > 0.999 * bound
    else:
        assert (np.abs(w) < math.sqrt(variance)).mean() == pytest.approx(0.6827, abs=0.01)
    np.testing.assert_array_equal(w, function(SHAPE, np.random.default_rng(0), **options))
    assert not np.array_equal(w, function(SHAPE, 1, **options))
    assert function(SHAPE, 0, **options, dtype=np.float64).dtype == np.float64


def test_he_keeps_the_variance_through_relu_layers():
    net = nn.Sequential(*(layer for i in range(20) for layer in (nn.Linear(256, 256), nn.ReLU())))
    init.initialize(net, init.he_normal, rng=0)
    y = net(np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32))
    assert 0.3 < np.mean(y**2) < 3


@pytest.mark.parametrize(("name", "args"), [
    ("Linear", (30, 40)), ("Conv1d", (30, 40, 7)), ("Conv2d", (30, 40, 3)), ("Conv3d", (30, 40, 2, 1, 0, 1, 2)),
    ("ConvTranspose2d", (30, 40, 3)), ("ConvTranspose1d", (30, 40, 3, 1, 0, 0, 2)),
])
def test_layers_start_as_pytorchs(name, args):
    torch = pytest.importorskip("torch")
    ours, theirs = getattr(nn, name)(*args, rng=0), getattr(torch.nn, name)(*args)
    for mine, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert mine.shape == tuple(other.shape)
    # both uniform: the largest of thousands of values is the bound, nearly
    largest = np.abs(ours.weight.value).max()
    assert largest == pytest.approx(theirs.weight.abs().max().item(), rel=5e-3)
    assert np.abs(ours.bias.value).max() == pytest.approx(largest, rel=0.15)
    assert np.abs(ours.bias.value).max() <= largest * 1.005


def test_initialize_knows_the_layer():
    net = nn.Sequential(nn.Conv2d(32, 64, 3, groups=4, dtype=np.float64), nn.BatchNorm2d(64),
                        nn.ConvTranspose2d(64, 32, 3, groups=2), nn.Linear(500, 100))
    assert init.initialize(net, init.he_normal, rng=0) is net
    for layer, fan_in in ((net[0], 8 * 9), (net[2], 32 * 9), (net[3], 500)):
        assert layer.weight.value.var() == pytest.approx(2 / fan_in, rel=0.05)
        assert not layer.bias.value.any()
    assert net[0].weight.dtype == np.float64
    np.testing.assert_array_equal(net[1].weight.value, np.ones(64))


def test_layers_of_one_seed_are_equal():
    a, b, c = (nn.Conv2d(3, 4, 3, rng=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.weight.value, b.weight.value)
    assert not np.array_equal(a.weight.value, c.weight.value)
    rng = np.random.default_rng(0)
    assert not np.array_equal(nn.Linear(3, 3, rng=rng).weight.value, nn.Linear(3, 3, rng=rng).weight.value)


def test_fans_need_two_axes():
    with pytest.raises(ValueError, match="Hint: biases have no fan"):
        init.he_normal((3,))
