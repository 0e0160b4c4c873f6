"""The same networks from the same weights on the same batches in fastconv and in PyTorch: gradients and loss curves.

What rounding may change is measured in the same test, by gradients and curves in float64 from weights that are off by a
given relative error: a computation whose rounding amounts to less than that (whose backward error is smaller) is no
further away. One percent in the weight gradient of one layer is, by far, and that is tested too.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

import fastconv
from fastconv import models, nn
from fastconv.training import SGD

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parent.parent / "bench"))
from training_nets import torch_of  # noqa: E402

STEPS = 25
OFF = 1e-6  # the rms error of Winograd's results, see docs/accuracy.md
NETS = {
    "lenet5": (lambda: models.lenet5(rng=0), (16, 1, 28, 28), 0.005),
    "resnet_small": (lambda: models.resnet_small(8, rng=0), (16, 3, 32, 32), 0.02),
    "3d": (lambda: models.resnet_small(8, in_channels=1, width=0.5, ndim=3, rng=0), (4, 1, 12, 12, 12), 0.02),
}


def batches(shape):
    """Five batches, again and again: noise around a pattern for each of ten classes."""
    rng = np.random.default_rng(0)
    patterns = rng.standard_normal((10, *shape[1:]), np.float32)
    for step in range(STEPS):
        draw = np.random.default_rng(step % 5)
        target = draw.integers(0, 10, shape[0])
        yield patterns[target] + draw.standard_normal(shape, np.float32), target


def fastconv_curve(net, shape, lr, order):
    optimizer = SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for x, target in batches(shape):
        logits, backward = net.forward(fastconv.to_channels_last(x) if order == "channels_last" else x)
        loss, gradient = nn.cross_entropy(logits, target)
        backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return np.array(losses)


def torch_net(net, off=0.0, seed=0):
    """In float64; weights off by a relative error of `off`."""
    net = torch_of(net).train().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 1 + off * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def torch_curve(net, shape, lr, seed=None):
    """In float64; with a seed, from weights that are off by a relative error of `OFF`."""
    net = torch_net(net, 0.0 if seed is None else OFF, seed or 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for x, target in batches(shape):
        loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x).double()), torch.from_numpy(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


def torch_gradients(net, shape, off=0.0, seed=0):
    net = torch_net(net, off, seed)
    x, target = next(batches(shape))
    loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x).double()), torch.from_numpy(target))
    loss.backward()
    return [parameter.grad.numpy() for parameter in net.parameters()]


def fastconv_gradients(net, shape, order, dtype):
    """Of float32 weights, computed in `dtype`."""
    for parameter in net.parameters():
        parameter._array = parameter._array.astype(dtype)
    for _, buffer in net.named_buffers():
        if buffer.dtype.kind == "f":
            buffer._array = buffer._array.astype(dtype)
    x, target = next(batches(shape))
    x = x.astype(dtype)
    logits, backward = net.forward(fastconv.to_channels_last(x) if order == "channels_last" else x)
    backward(nn.cross_entropy(logits, target)[1])
    return [parameter.grad for parameter in net.parameters()]


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


SEEDS = 4
# A backward error that no summation order exceeds: 4500 units of float64's last place, and what Winograd's float32 has.
BACKWARD_ERROR = {"float64": 1e-12, "float32": 2 * OFF}


def furthest(name, dtype, order, exact=True):
    """Largest distance of a gradient, in units of that of perturbed weights; (name of the parameter, distance, noise).

    In rms over each parameter: a ReLU whose input changes its sign moves few elements by much.
    """
    build, shape, _ = NETS[name]
    right = torch_gradients(build(), shape)
    perturbed = [torch_gradients(build(), shape, BACKWARD_ERROR[dtype], seed) for seed in range(SEEDS)]
    with fastconv.config(exact=exact):
        ours = fastconv_gradients(build(), shape, order, np.dtype(dtype))
    rows = []
    for i, (label, _) in enumerate(build().named_parameters()):
        assert ours[i].shape == right[i].shape
        noise = max(rms(other[i] - right[i]) for other in perturbed)
        # Biases before a normalisation have no gradient but rounding: the size of what is added up counts there.
        floor = BACKWARD_ERROR[dtype] * max(rms(right[i]), 1e-3 * max(map(rms, right)))
        rows.append((rms(ours[i] - right[i]) / (noise + floor), label, (noise + floor) / (rms(right[i]) + floor)))
    return max(rows)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", NETS)
def test_gradients(name, dtype):
    for order in ("contiguous", "channels_last"):
        for exact in (True, False):
            distance, label, _ = furthest(name, dtype, order, exact)
            assert distance <= 1, (order, exact, label, distance)


@pytest.mark.parametrize(("dtype", "share"), [("float64", 0.01), ("float32", 0.02)])
@pytest.mark.parametrize("name", NETS)
def test_one_percent_in_one_layer_is_seen(name, dtype, share, monkeypatch):
    """Whichever convolution it is; two percent in float32, whose own noise hides 0.9 % in a first layer of 27 taps."""
    from fastconv.nn import conv

    right = conv.conv_weight_grad
    parameters = NETS[name][0]().named_parameters()
    weights = [p.shape for label, p in parameters if label.endswith("weight") and len(p.shape) > 2]
    for wrong in range(len(weights)):
        calls = iter(range(len(weights) - 1, -1, -1))  # backward: the last layer comes first

        def planted(x, size, dy, *options, wrong=wrong, calls=calls, **more):
            dw = right(x, size, dy, *options, **more)
            if next(calls) == wrong:
                dw *= 1 + share
            return dw

        monkeypatch.setattr(conv, "conv_weight_grad", planted)
        distance, _, _ = furthest(name, dtype, "contiguous")
        assert distance > 1, (wrong, weights[wrong], distance)


@pytest.mark.parametrize("name", NETS)
def test_loss_curves(name):
    """Rounding grows from step to step, by leaps where it decides the sign of a ReLU: perturbed weights show how much.

    A curve may be ten times as far from PyTorch's in float64 as its curves from weights that are off by `OFF`, once,
    are at that step or were before, and 1e-4 where these are exact by chance: it rounds at every step, and leaps come
    when they come. Small errors of gradients are for the tests above; this one sees what only many steps show.
    """
    build, shape, lr = NETS[name]
    exact = torch_curve(build(), shape, lr)
    assert exact[-5:].mean() < 0.8 * exact[:5].mean()  # it learns
    noise = np.max([np.abs(torch_curve(build(), shape, lr, seed) - exact) for seed in range(5)], axis=0)
    bound = 10 * np.maximum.accumulate(noise) + 1e-4
    assert bound.max() < 0.1
    for winograd in (True, False):
        for order in ("contiguous", "channels_last"):
            with fastconv.config(exact=not winograd):
                curve = fastconv_curve(build(), shape, lr, order)
            assert np.all(np.abs(curve - exact) <= bound), (winograd, order, curve - exact, bound)
