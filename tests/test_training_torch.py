"""The same networks from the same weights on the same batches in fastconv and in PyTorch: the same loss curves."""

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


def torch_curve(net, shape, lr, seed=None):
    """In float64; with a seed from weights that are off by a relative error of `OFF`."""
    net = torch_of(net).train().double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in net.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter *= 1 + OFF * noise
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for x, target in batches(shape):
        loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x).double()), torch.from_numpy(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return np.array(losses)


@pytest.mark.parametrize("name", NETS)
def test_loss_curves(name):
    """Rounding grows from step to step, by leaps where it decides the sign of a ReLU: perturbed weights show how much.

    A curve may be ten times as far from PyTorch's in float64 as its curves from weights that are off by `OFF` are at
    that step or were before, and 1e-4 where these are exact by chance. A weight gradient that is wrong by five percent
    is further away.
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
