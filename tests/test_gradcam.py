"""Grad-CAM against its equations in PyTorch and against class activation maps, and that it leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
from tolerance import assert_close

import fastconv
from fastconv import models, nn
from fastconv.gradcam import gradcam, gradcam_layer
from fastconv.resize import resize


@pytest.fixture(autouse=True)
def exact():
    """Winograd has a bound of its own, tested with the kernels."""
    with fastconv.config(exact=True):
        yield


def images(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def small_net(ndim):
    """Batch normalisation with running statistics and dropout behind the layer that is looked at."""
    conv, norm = nn.CONV[ndim], nn.BATCH_NORM[ndim]
    net = nn.Sequential(
        conv(2, 4, 3, padding=1, rng=1), nn.ReLU(), nn.MAX_POOL[ndim](2), conv(4, 6, 3, padding=1, rng=2), norm(6),
        nn.ReLU(), nn.Dropout(0.5, rng=3), nn.GlobalAvgPool(), nn.Flatten(), nn.Linear(6, 3, rng=4))  # fmt: skip
    net.forward(images(8, 2, *(8,) * ndim))  # moves the running statistics
    return net


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("layer", ["1", "3"])
def test_equations_in_torch(ndim, layer):
    torch = pytest.importorskip("torch")
    net = small_net(ndim)
    size = {1: (13,), 2: (9, 12), 3: (8, 9, 7)}[ndim]
    x = images(3, 2, *size)
    d = f"{ndim}d"
    make = torch.nn
    theirs = make.Sequential(
        getattr(make, f"Conv{d}")(2, 4, 3, padding=1), make.ReLU(), getattr(make, f"MaxPool{d}")(2),
        getattr(make, f"Conv{d}")(4, 6, 3, padding=1), getattr(make, f"BatchNorm{d}")(6), make.ReLU(),
        make.Dropout(0.5), getattr(make, f"AdaptiveAvgPool{d}")(1), make.Flatten(), make.Linear(6, 3),
    ).double().eval()  # fmt: skip
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in net.state_dict().items()})
    split = int(layer) + 1
    maps = theirs[:split](torch.from_numpy(x.astype(np.float64))).detach().requires_grad_()
    logits = theirs[split:](maps)
    axes = tuple(range(2, ndim + 2))
    for target in (2, [0, 2, 1], None):
        classes = logits.argmax(1) if target is None else torch.tensor(target).expand(3)
        (gradient,) = torch.autograd.grad(logits[torch.arange(3), classes].sum(), maps, retain_graph=True)
        alpha = gradient.mean(axes, keepdim=True)
        heat = torch.relu((alpha * maps).sum(1, keepdim=True))
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[ndim]
        heat = torch.nn.functional.interpolate(heat, size, mode=mode, align_corners=False)[:, 0].detach().numpy()
        ours = gradcam(net, x, target, layer, normalise=False)
        assert ours.shape == (3, *size)
        assert ours.dtype == np.float32
        assert_close(ours, heat, 4 * 3**ndim)
        peak = heat.max(tuple(range(1, ndim + 1)), keepdims=True)
        scaled = gradcam(net, x, target, layer)
        np.testing.assert_allclose(scaled, np.where(peak > 0, heat / np.where(peak > 0, peak, 1), 0), atol=1e-4)
        assert scaled.min() >= 0
        assert scaled.max() == 1


def test_is_the_class_activation_map_before_global_average_pooling():
    """Zhou et al. 2016: there Z * alpha is a row of the last weight."""
    net = small_net(2)
    x = images(2, 2, 8, 8)
    maps = net[:6](x)
    row = net[-1].weight.value[1]
    expected = np.maximum(np.einsum("k,nkhw->nhw", row, maps) / maps[0, 0].size, 0)
    actual = gradcam(net, x, 1, "5", normalise=False)
    assert_close(actual, resize(expected[:, None], (8, 8))[:, 0], 6)
    assert gradcam_layer(net, (2, 8, 8)) == "6"  # dropout, which does nothing
    np.testing.assert_array_equal(actual, gradcam(net, x, 1, normalise=False))


@pytest.mark.parametrize(
    ("name", "ndim", "options", "layer"),
    [
        ("resnet18", 2, {"width": 1 / 16}, "layer4.1.relu"),
        ("resnet_small", 3, {"width": 1 / 4}, "layer3.2.relu"),
        ("densenet121", 2, {"width": 1 / 16}, "relu"),
        ("googlenet", 2, {"width": 1 / 16}, "inception5b"),
        # of 33x36x40 voxels inception5b has one position
        ("googlenet", 3, {"width": 1 / 16, "variant": "torchvision", "auxiliary": True}, "inception4e"),
        ("vgg11", 2, {"width": 1 / 32, "pool_size": 2}, "features.19"),
        ("nin", 2, {"width": 1 / 16}, "mlpconv3.5"),
        ("lenet5", 2, {}, "relu3"),
        ("lenet5", 2, {"variant": "paper"}, "tanh4"),
        ("cnn3d", 3, {}, "10"),
    ],
)
def test_networks_of_the_literature(name, ndim, options, layer):
    size = (64,) * ndim if ndim == 2 else (33, 36, 40)
    net = models.create(name, 1, 3, size, rng=0, **options)
    x = images(2, 1, *size)
    assert gradcam_layer(net, (1, *size)) == layer
    before = net.state_dict()
    states = [source.rng.bit_generator.state for _, source in net.named_layers() if getattr(source, "rng", None)]
    heat = gradcam(net, x)
    assert heat.shape == (2, *size)
    assert 0 <= heat.min() <= heat.max() <= 1
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(value.tobytes() == before[key].tobytes() for key, value in net.state_dict().items())
    assert states == [s.rng.bit_generator.state for _, s in net.named_layers() if getattr(s, "rng", None)]
    np.testing.assert_array_equal(heat, gradcam(net, x))


def test_image_with_a_table():
    net = models.WithCovariates(models.resnet_small(8, 1, 2, rng=0), 3, hidden=5, rng=0)
    inputs = images(2, 1, 16, 16), images(2, 3)
    assert gradcam(net, inputs, 1).shape == (2, 16, 16)


def test_a_map_without_evidence_is_zero():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.GlobalAvgPool(), nn.Flatten(), nn.Linear(1, 2))
    net.load_state_dict({"0.weight": np.ones((1, 1, 1, 1)), "4.weight": [[-1.0], [1.0]], "4.bias": [0.0, 0.0]})
    x = np.abs(images(1, 1, 5, 5))
    assert (gradcam(net, x, 0) == 0).all()
    np.testing.assert_allclose(gradcam(net, x, 1), x[:, 0] / x.max(), rtol=1e-6)


@pytest.mark.parametrize(
    ("target", "layer", "message"),
    [
        (3, None, "target is 3, but classes are 0 <= c < 3"),
        (-1, None, "target is -1, but classes are"),
        ([0, 1, 2], None, "an int or one for each of 2 images"),
        (0.5, None, "target is 0.5, but an int"),
        (None, "conv9", "layer is 'conv9', which the network does not have.* Hint: its layers are 0, 1, 2"),
        (None, "9", r"layer is '9', whose output has shape \(2, 3\)"),
    ],
)
def test_errors(target, layer, message):
    with pytest.raises(ValueError, match=message):
        gradcam(small_net(2), images(2, 2, 8, 8), target, layer)


def test_networks_without_positions():
    with pytest.raises(ValueError, match="no layer of Sequential has several positions"):
        gradcam(models.mlp(1, 3, (8, 8), rng=0), images(1, 1, 8, 8))
