"""What single layers of a network give, and figures of that."""

from __future__ import annotations

import numpy as np
import pytest

from fastconv import models, nn
from fastconv.gradcam import gradcam
from fastconv.watch import layer_outputs


def images(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("ndim", [2, 3])
def test_layer_outputs_are_those_of_inference(ndim):
    net = models.resnet_small(8, 1, 3, ndim=ndim, rng=0)
    x = images(2, 1, *(10,) * ndim)
    net.forward(x)  # moves the running statistics
    state = net.state_dict()
    outputs = layer_outputs(net, x, ["relu", "layer1", "layer2.0.conv1", "layer2.0.relu", "fc"])
    assert list(outputs) == ["relu", "layer1", "layer2.0.conv1", "layer2.0.relu", "fc"]
    within = {"rtol": 1e-4, "atol": 1e-4}  # inference folds the normalisation into weights
    np.testing.assert_allclose(outputs["relu"], net[:3](x), **within)
    np.testing.assert_allclose(outputs["layer1"], net[:4](x), **within)
    block = dict(net["layer2"].children())["0"]
    np.testing.assert_allclose(outputs["layer2.0.conv1"], dict(block.children())["conv1"](outputs["layer1"]), **within)
    np.testing.assert_array_equal(outputs["layer2.0.relu"], layer_outputs(net, x, ["layer2.0"])["layer2.0"])
    np.testing.assert_allclose(outputs["fc"], net(x), **within)
    assert all(np.array_equal(value, net.state_dict()[name]) for name, value in state.items())
    assert all("forward" not in vars(layer) for _, layer in net.named_layers())


def test_layer_outputs_in_dense_blocks_and_without_dropout():
    net = models.densenet121(in_channels=1, num_classes=2, width=1 / 8, dropout=0.5, rng=0)
    x = images(1, 1, 64, 64)
    outputs = layer_outputs(net, x, ["features.denseblock1", "features.denseblock1.denselayer2"])
    np.testing.assert_array_equal(outputs["features.denseblock1"][:, 12:16],
                                  outputs["features.denseblock1.denselayer2"])
    np.testing.assert_array_equal(outputs["features.denseblock1"],
                                  layer_outputs(net, x, ["features.denseblock1"])["features.denseblock1"])


def test_missing_layers_are_named():
    with pytest.raises(ValueError, match=r"layer_outputs: layer is 'conv9', which the network does not have.*conv1, "):
        layer_outputs(models.resnet_small(8, rng=0), images(1, 3, 8, 8), ["conv1", "conv9"])


@pytest.mark.parametrize("ndim", [2, 3])
def test_figures(ndim, tmp_path):
    """They come back, and are files only where a path is given."""
    pytest.importorskip("matplotlib")
    from fastconv import plots

    net = nn.Sequential(nn.CONV[ndim](1, 3, 3, padding=1, rng=0), nn.ReLU(), nn.GlobalAvgPool(), nn.Flatten(),
                        nn.Linear(3, 2, rng=1))
    x = images(1, 1, *(6, 7, 8)[:ndim])
    maps = layer_outputs(net, x, ["0", "1"])
    for draw in (lambda *path: plots.feature_maps(x[0, 0], {name: y[0] for name, y in maps.items()}, *path),
                 lambda *path: plots.filters(net["0"].weight.value, *path),
                 lambda *path: plots.heatmaps({"a": x[0, 0]}, {"a": gradcam(net, x)[0]}, *path)):
        assert type(draw()).__name__ == "Figure"
        assert not list(tmp_path.iterdir())
        draw(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "picture.png").unlink()
