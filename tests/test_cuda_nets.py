"""Layers and networks on the GPU backend, run by the emulator: the same as on the CPU, up to rounding.

What NumPy does on the CPU, CuPy does on the GPU, through NumPy's own dispatch; here a stand-in that can do no more.
"""

import copy
from functools import partial

import numpy as np
import pytest
from cuda_emulator import DeviceArray, device, emulated, host

from fastconv import functional, models, nn
from fastconv.functional import prepare_conv, prepare_conv_transpose, prepare_linear
from fastconv.models.googlenet import googlenet_loss
from fastconv.training import optim

RTOL = {"float64": 1e-9, "float32": 1e-4}


def close(actual, expected, dtype="float64", least=0.0):
    """Compare relative to the largest value, or to `least` if all are smaller."""
    if isinstance(expected, tuple):
        for a, b in zip(actual, expected, strict=True):
            close(a, b, dtype)
        return
    values = host(actual) if isinstance(actual, DeviceArray) else np.asarray(actual)
    scale = max(float(np.abs(expected).max(initial=0)), least) or 1.0
    assert values.shape == np.shape(expected)
    np.testing.assert_allclose(values / scale, expected / scale, rtol=0, atol=RTOL[dtype])


def normal(*shape, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---- functions ---------------------------------------------------------------------------------------------------

POINTWISE = {
    "relu": (), "leaky_relu": (0.1,), "sigmoid": (), "tanh": (), "softmax": (), "log_softmax": (), "clip": (-1, 1),
    "relu6": (), "elu": (0.5,), "silu": (), "hardsigmoid": (), "hardswish": (), "gelu": (), "local_response_norm": (5,),
}
OF_OUTPUT = {"relu", "sigmoid", "tanh", "softmax", "log_softmax"}


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name, order):
    x = normal(2, 7, 5, 4) * 3
    if order == "channels_last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    dy, arguments = normal(*x.shape, seed=1), POINTWISE[name]
    function, gradient = getattr(functional, name), getattr(functional, f"{name}_grad")
    y = function(x, *arguments)
    dx = gradient(dy, y if name in OF_OUTPUT else x, *arguments)
    with emulated():
        there = function(device(x), *arguments)
        assert there.strides == y.strides
        close(there, y)
        close(gradient(device(dy), there if name in OF_OUTPUT else device(x), *arguments), dx)


def test_gelu_by_tanh_and_mixed_gradients():
    x = normal(3, 4)
    with emulated():
        close(functional.gelu(device(x), "tanh"), functional.gelu(x, "tanh"))
        close(functional.gelu_grad(device(x), device(x), "tanh"), functional.gelu_grad(x, x, "tanh"))
        with pytest.raises(TypeError, match="grad_output is on the GPU and the output in host memory"):
            functional.relu_grad(device(x), x)


@pytest.mark.parametrize("loss", ["classes", "smoothed", "ignored", "weighted", "probabilities", "single"])
def test_cross_entropy(loss):
    x, labels = normal(6, 5), np.arange(6) % 5
    options = {"smoothed": {"label_smoothing": 0.1}, "ignored": {"ignore_index": 2},
               "weighted": {"weight": np.arange(1.0, 6)}}.get(loss, {})
    if loss == "probabilities":
        labels = np.abs(normal(6, 5, seed=1))
    elif loss == "single":
        x, labels = x[0], np.array(3)
    value, grad = nn.cross_entropy(x, labels, **options)
    with emulated():
        there = {k: device(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        value_there, grad_there = nn.cross_entropy(device(x), device(labels), **there)
        assert isinstance(value_there, float)
        np.testing.assert_allclose(value_there, value)
        close(grad_there, grad)
        with pytest.raises(TypeError, match="in one place"):
            nn.cross_entropy(device(x), labels, **there)


def test_other_losses():
    x, t = normal(6, 5), np.abs(normal(6, 5, seed=1)) % 1
    for function in (nn.mse_loss, nn.binary_cross_entropy_with_logits):
        value, grad = function(x, t)
        with emulated():
            value_there, grad_there = function(device(x), device(t))
        np.testing.assert_allclose(value_there, value)
        close(grad_there, grad)


def test_prepared_with_activation_and_residual():
    x, w, b = normal(2, 3, 7, 8), normal(4, 3, 3, 3), normal(4)
    residual = normal(2, 4, 7, 8, seed=1)
    for activation in (None, "relu", "silu", ("clip", 0, 1)):
        here = prepare_conv(w, b, padding=1, activation=activation)
        with emulated():
            there = prepare_conv(device(w), device(b), padding=1, activation=activation)
            for _ in range(2):  # the second call is recognised
                close(there(device(x)), here(x))
                close(there(device(x), residual=device(residual)), here(x, residual=residual))
            close(there(device(x[0])), here(x[0]))
            with pytest.raises(TypeError, match="in one place"):
                there(x)
            there(device(x), residual=device(residual))
            close(there(device(x[0]), residual=device(residual[0])), here(x[0], residual=residual[0]))
            moved = np.moveaxis(np.ascontiguousarray(np.moveaxis(residual, 1, -1)), -1, 1)
            close(there(device(x), residual=device(moved)), here(x, residual=residual))
    up, rows = normal(3, 2, 2, 2), normal(5, 3)
    linear = prepare_linear(w[:, :, 0, 0], b)
    with emulated():
        there = prepare_conv_transpose(device(up), device(normal(2)), stride=3, activation="relu")  # with gaps
        here = prepare_conv_transpose(up, normal(2), stride=3, activation="relu")
        enlarged = normal(*here(x).shape, seed=2)
        close(there(device(x)), here(x))
        close(there(device(x), residual=device(enlarged)), here(x, residual=enlarged))
        deep = prepare_conv(device(normal(3, 1, 3, 3)), padding=1, groups=3)
        close(deep(device(x), residual=device(x)), functional.conv(x, normal(3, 1, 3, 3), padding=1, groups=3) + x)
        close(prepare_linear(device(w[:, :, 0, 0]), device(b))(device(rows)), linear(rows))


# ---- layers ------------------------------------------------------------------------------------------------------

LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1, dtype=np.float64), (2, 3, 6, 7)),
    "conv of depth": (lambda: nn.Conv3d(2, 4, 3, stride=2, padding=1, dtype=np.float64), (2, 2, 5, 6, 7)),
    "reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", dtype=np.float64), (2, 3, 6, 7)),
    "conv transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, dtype=np.float64), (2, 3, 4, 5)),
    "linear": (lambda: nn.Linear(6, 5, dtype=np.float64), (3, 6)),
    "batch norm": (lambda: nn.BatchNorm2d(3, dtype=np.float64), (4, 3, 5, 6)),
    "frozen batch norm": (lambda: nn.BatchNorm2d(3, frozen=True, dtype=np.float64), (4, 3, 5, 6)),
    "lrn": (lambda: nn.LocalResponseNorm(3), (2, 5, 4, 4)),
    "relu": (nn.ReLU, (2, 3, 4)),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1), (2, 3, 7, 8)),
    "average pool": (lambda: nn.AvgPool3d(2), (1, 2, 4, 6, 5)),
    "lp pool": (lambda: nn.LPPool2d(2.0, 2), (2, 3, 6, 6)),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d(3), (2, 3, 7, 8)),
    "global": (nn.GlobalMaxPool, (2, 3, 7, 8)),
    "dropout": (lambda: nn.Dropout(0.5, rng=0), (4, 5)),
    "dropout of channels": (lambda: nn.Dropout2d(0.5, rng=0), (4, 5, 3, 3)),
    "flatten": (nn.Flatten, (2, 3, 4, 5)),
    "concat": (lambda: nn.Concat(nn.Conv2d(3, 2, 1, dtype=np.float64), nn.MaxPool2d(3, 1, 1)), (2, 3, 5, 5)),
    "residual": (lambda: nn.Residual(nn.Conv2d(3, 3, 3, padding=1, dtype=np.float64), activation=nn.ReLU()),
                 (2, 3, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    make, shape = LAYERS[name]
    nn.init.seed(0)
    here, x = make(), np.abs(normal(*shape)) + 0.1
    there = copy.deepcopy(here)
    y, backward = here.forward(x)
    dy = normal(*y.shape, seed=1)
    dx = backward(dy)
    with emulated():
        assert there.to("cuda") is there
        y_there, backward_there = there.forward(device(x))
        close(y_there, y)
        close(backward_there(device(dy)), dx)
        for a, b in zip(there.parameters(), here.parameters(), strict=True):
            close(a.grad, b.grad)
        close(there(device(x)), here(x))
        for key, value in there.state_dict().items():
            assert type(value) is np.ndarray
            close(value, here.state_dict()[key])


def test_moving_there_and_back():
    layer = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = layer.state_dict()
    x = normal(1, 2, 5, 5, dtype=np.float32)
    y = layer(x)
    with emulated():
        layer.to("cuda")
        assert isinstance(layer[0].weight.value, DeviceArray)
        close(layer(device(x)), y, "float32")
        with pytest.raises(TypeError, match="in one place"):
            layer(x)
        layer.load_state_dict({k: v * 2 for k, v in before.items()})
        layer.load_state_dict(before)
        layer.to("cpu")
    np.testing.assert_array_equal(layer(x), y)
    with pytest.raises(ValueError, match="'cuda' or 'cpu' is needed"):
        layer.to("tpu")


@pytest.mark.parametrize("make", [
    partial(optim.SGD, lr=0.1), partial(optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True), optim.Adam,
    partial(optim.AdamW, weight_decay=0.1)], ids=["sgd", "nesterov", "adam", "adamw"])
def test_optimisers(make):
    here = nn.Linear(4, 3, rng=0, dtype=np.float64)
    there = copy.deepcopy(here)
    with emulated():
        there.to("cuda")
        a, b = make(here.parameters()), make(there.parameters())
        for step in range(3):
            for p, q in zip(here.parameters(), there.parameters(), strict=True):
                p.grad = normal(*p.shape, seed=step)
                q.grad = device(p.grad)
            a.step()
            b.step()
            b.load_state_dict(b.state_dict())
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            close(q.value, p.value)


# ---- networks ----------------------------------------------------------------------------------------------------

kinds = {"num_classes": 3, "dtype": np.float64, "rng": 0}
NETWORKS = {
    "lenet5": (partial(models.lenet5, in_channels=1, **kinds), (2, 1, 28, 28)),
    "lenet5-paper": (partial(models.lenet5, in_channels=1, variant="paper", **kinds), (2, 1, 28, 28)),
    "resnet18": (partial(models.resnet, 18, 3, width=1 / 16, **kinds), (2, 3, 33, 40)),
    "resnet18-3d": (partial(models.resnet, 10, 1, width=1 / 16, ndim=3, **kinds), (2, 1, 17, 18, 20)),
    "densenet121": (partial(models.densenet, 121, 3, width=1 / 16, **kinds), (2, 3, 32, 36)),
    "densenet121-3d": (partial(models.densenet, 121, 1, width=1 / 16, ndim=3, **kinds), (3, 1, 32, 32, 32)),
    "googlenet": (partial(models.googlenet, 3, variant="torchvision", auxiliary=True, width=1 / 16, dropout=0,
                          **kinds), (2, 3, 64, 64)),
    "googlenet-paper": (partial(models.googlenet, 3, width=1 / 16, **kinds), (2, 3, 32, 32)),
    "googlenet-paper-3d": (partial(models.googlenet, 1, width=1 / 16, ndim=3, **kinds), (1, 1, 32, 33, 34)),
}


def step(net, x, labels):
    """One training step; returns the logits and the loss."""
    nn.init.seed(0)
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    outputs, backward = net.forward(x)
    loss, gradient = (googlenet_loss if isinstance(outputs, tuple) else nn.cross_entropy)(outputs, labels)
    backward(gradient)
    optimizer.step()
    return outputs, loss


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step(name):
    make, shape = NETWORKS[name]
    here, there, x, labels = make(), make(), normal(*shape), np.arange(shape[0]) % 3
    outputs, loss = step(here, x, labels)
    with emulated():
        outputs_there, loss_there = step(there.to("cuda"), device(x), device(labels))
        close(outputs_there, outputs)
        np.testing.assert_allclose(loss_there, loss, rtol=1e-9)
        # Some gradients are zero but for rounding, such as those of a bias before a normalisation.
        least = 1e-5 * max(np.abs(p.grad).max() for p in here.parameters())
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            close(q.grad, p.grad, least=least)
            close(q.value, p.value, least=least)
        close(there(device(x)), here(x))
