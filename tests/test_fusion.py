"""Inference that runs several layers as one gives what the layers give one by one."""

import copy
import pickle

import numpy as np
import pytest
from tolerance import assert_close

import fastconv
from fastconv import nn
from fastconv.nn.blocks import basic_block, bottleneck


@pytest.fixture(autouse=True)
def exact():
    """The tolerance of the plain sum is for the plain sum."""
    with fastconv.config(exact=True):
        yield


def shake(net, seed=0):
    """Give normalisations statistics and factors that are not those of the identity."""
    rng = np.random.default_rng(seed)
    for _, layer in net.named_layers():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            n = layer.num_features
            for part, low, high in ((layer.running_mean, -1, 1), (layer.running_var, 0.3, 2), (layer.weight, -2, 2),
                                    (layer.bias, -1, 1)):
                if part is not None:
                    part.assign(rng.uniform(low, high, n).astype(part.dtype))
    return net


def one_by_one(layers, x):
    for layer in layers:
        x = layer(x)
    return x


ENDINGS = [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.ELU(), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(),
           nn.GELU("tanh"), nn.Hardsigmoid(), nn.Hardswish()]

NETS = {
    **{repr(ending): (lambda ending=ending: nn.Sequential(
        nn.Conv2d(6, 8, 3, padding=1, rng=0), nn.BatchNorm2d(8), ending, nn.Conv2d(8, 5, 1, rng=1), ending),
        (2, 6, 9, 7)) for ending in ENDINGS},
    "no affine": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, bias=False, rng=0), nn.BatchNorm1d(6, affine=False)),
                  (3, 4, 11)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 2, stride=2, rng=0), nn.BatchNorm3d(4, eps=0.1), nn.ReLU()),
           (1, 3, 5, 6, 7)),
    "circular": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", rng=0),
                                       nn.BatchNorm2d(4), nn.Tanh()), (2, 3, 5, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, rng=0), nn.BatchNorm2d(4),
                                         nn.ReLU()), (2, 6, 4, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(12, 7, rng=0), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3, rng=1)),
               (5, 12)),
    "linear over rows": (lambda: nn.Sequential(nn.Linear(12, 7, rng=0), nn.ReLU()), (2, 3, 12)),
    "linear, norm over rows": (lambda: nn.Sequential(nn.Linear(12, 7, rng=0), nn.BatchNorm1d(7), nn.ReLU()),
                               (2, 7, 12)),
    "no batch, but the norm takes it for one": (lambda: nn.Sequential(
        nn.Conv1d(4, 6, 3, rng=0), nn.BatchNorm1d(6), nn.ReLU()), (4, 8)),
    "activation twice": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, rng=0), nn.ReLU(), nn.Sigmoid()), (2, 3, 5, 6)),
    "norm twice": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, rng=0), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
                   (2, 3, 5, 6)),
    "norm of the batch": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, rng=0),
                                                nn.BatchNorm2d(4, track_running_stats=False)), (2, 3, 5, 6)),
    "pool between": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, rng=0), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU()),
                     (2, 3, 6, 6)),
}


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NETS)
def test_a_fused_sequence_is_its_layers(name, order):
    make, shape = NETS[name]
    net = shake(make())
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    if order == "channels_last" and x.ndim > 2:
        x = fastconv.to_channels_last(x)
    expected = one_by_one(net, x)
    for _ in range(2):
        assert_close(net(x), expected.astype(np.float64), 200)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("make", [basic_block, bottleneck])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_fused_residual_block_is_its_formula(make, stride, ndim, dtype):
    channels = 8 if make is basic_block else 2
    block = shake(make(8, channels, stride, ndim=ndim, dtype=dtype, rng=0))
    x = np.random.default_rng(1).standard_normal((2, 8, *[6] * ndim)).astype(dtype)
    shortcut = one_by_one([block.shortcut], x)
    expected = np.maximum(one_by_one(block.branch, x) + shortcut, 0)
    for array in (x, fastconv.to_channels_last(x)):
        assert_close(block(array), expected.astype(np.float64), 200)


@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.GELU(), nn.Softmax()])
@pytest.mark.parametrize("ending", [None, nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(1)])
def test_residuals_with_other_endings(ending, activation):
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, rng=0), *([ending] if ending else []))
    net = shake(nn.Residual(branch, activation=activation))
    x = np.random.default_rng(1).standard_normal((2, 4, 5, 6), np.float32)
    expected = one_by_one(branch, x) + x
    if activation is not None:
        expected = activation(expected)
    assert_close(net(x), expected.astype(np.float64), 40)
    np.testing.assert_array_equal(x, np.random.default_rng(1).standard_normal((2, 4, 5, 6), np.float32))


def test_writes_are_seen():
    """Whatever the folded weights came from may change; the next inference uses the new values."""
    conv, norm = nn.Conv2d(3, 4, 3, rng=0), nn.BatchNorm2d(4)
    net = nn.Sequential(conv, norm, nn.ReLU())
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6), np.float32)

    def check():
        assert_close(net(x), one_by_one(net, x).astype(np.float64), 30)

    check()
    for parameter in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        with parameter.write() as value:
            value += 0.5
        check()
    net.forward(x)  # moves the running statistics
    check()
    norm.eps = 0.5
    check()


def test_layers_of_the_users_own_classes_run():
    calls = []

    class Norm(nn.BatchNorm2d):
        def __call__(self, x):
            calls.append("norm")
            return super().__call__(x) + 1

    class Activation(nn.ReLU):
        def __call__(self, x):
            calls.append("activation")
            return super().__call__(x) + 1

    class Conv(nn.Conv2d):
        def __call__(self, x, out=None):
            calls.append("conv")
            return super().__call__(x, out) + 1

    x = np.random.default_rng(1).standard_normal((2, 4, 6, 6), np.float32)
    net = nn.Sequential(Conv(4, 4, 1, rng=0), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, rng=1), Norm(4),
                        nn.Conv2d(4, 4, 1, rng=2), Activation())
    y = net(x)
    assert calls == ["conv", "norm", "activation"]
    np.testing.assert_array_equal(y, one_by_one(net, x))
    calls.clear()
    nn.Residual(nn.Sequential(Conv(4, 4, 1)))(x)
    assert calls == ["conv"]


def test_errors_stay_those_of_the_layers():
    x = np.zeros((3, 6, 6), np.float32)
    with pytest.raises(ValueError, match="BatchNorm2d: input has shape"):
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))(x)
    with pytest.raises(ValueError, match=r"BatchNorm2d: .* C = 5"):
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5))(x[None])
    with pytest.raises(ValueError, match="Residual: the branch gives shape"):
        nn.Residual(nn.Sequential(nn.Conv2d(3, 4, 3)), activation=nn.ReLU())(x[None])
    with pytest.raises(ValueError, match="conv: weight has 3 input channels"):
        nn.Residual(nn.Sequential(nn.Conv2d(3, 4, 3)))(x[None, :2])


def test_copies_are_their_own():
    net = shake(nn.Sequential(nn.Conv2d(3, 4, 3, rng=0), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                              nn.Linear(64, 3, rng=0), nn.ReLU()))
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6), np.float32)
    y = net(x)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        np.testing.assert_array_equal(other(x), y)
        with other[0].weight.write() as value:
            value *= 2
        assert not np.array_equal(other(x), y)
        np.testing.assert_array_equal(net(x), y)
