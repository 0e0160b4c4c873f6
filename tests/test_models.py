"""Networks: numbers of parameters and operations as published, heads, settings, training."""

from functools import partial

import numpy as np
import pytest
from networks import no_dropout, zeros

from fastconv import models, nn
from fastconv.models import MODELS, create
from fastconv.summary import summarize
from fastconv.training.optim import AdamW

# Published numbers of parameters.
PARAMETERS = {
    "logistic_regression": (models.logistic_regression, 7_850),
    "mlp": (models.mlp, 101_770),
    "lenet5": (models.lenet5, 61_706),
    "lenet5-paper": (partial(models.lenet5, variant="paper"), 60_000),
    "cnn3d": (models.cnn3d, 17_674),
    "alexnet": (models.alexnet, 61_100_840),
    "alexnet-paper": (partial(models.alexnet, variant="paper"), 60_965_224),
    "nin": (models.nin, 966_986),
    "googlenet": (models.googlenet, 6_998_552),
    "googlenet with auxiliary classifiers": (partial(models.googlenet, auxiliary=True), 13_378_280),
    "googlenet-torchvision": (partial(models.googlenet, variant="torchvision"), 6_624_904),
    **{f"vgg{depth}": (partial(models.vgg, depth), count) for depth, count in (
        (16, 138_357_544), (19, 143_667_240))},
    **{f"resnet{depth}": (partial(models.resnet, depth), count) for depth, count in (
        (18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808))},
    **{f"densenet{depth}": (partial(models.densenet, depth), count) for depth, count in (
        (121, 7_978_856), (161, 28_681_000), (169, 14_149_480), (201, 20_013_928))},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_as_published(name):
    build, count = PARAMETERS[name]
    with zeros():
        assert build().num_parameters() == count


@pytest.mark.parametrize(("depth", "macs"), [(18, 1.8e9), (34, 3.6e9), (50, 3.8e9), (101, 7.6e9), (152, 11.3e9)])
def test_operations_of_residual_networks_are_those_of_the_papers_table(depth, macs):
    """Table 1, last row: "FLOPs", of which a multiply-add counts as one."""
    with zeros():
        net = models.resnet(depth, variant="paper")
    assert abs(summarize(net, (3, 224, 224)).macs - macs) < 0.06e9


def test_parameters_of_the_papers_small_residual_networks():
    """Table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 million with 20, 32, 44, 56 and 110 layers."""
    for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)):
        count = models.resnet_small(depth, shortcut="padding", rng=0).num_parameters()
        assert abs(count / 1e6 - millions) < (0.005 if millions < 1 else 0.05)


@pytest.mark.parametrize(("channels", "size", "out", "kernel", "inside", "direct", "through"), [
    (192, 28, 32, 5, 16, 120_422_400, 12_443_648),
    (480, 14, 48, 5, 16, 112_896_000, 5_268_480),
])
def test_what_a_bottleneck_saves(channels, size, out, kernel, inside, direct, through):
    plain = nn.Conv2d(channels, out, kernel, padding=2)
    narrow = nn.Sequential(nn.Conv2d(channels, inside, 1), nn.Conv2d(inside, out, kernel, padding=2))
    assert summarize(plain, (channels, size, size)).macs == direct
    assert summarize(narrow, (channels, size, size)).macs == through


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_heads_take_part_in_training_alone():
    net = no_dropout(models.googlenet(1, 3, variant="torchvision", auxiliary=True, width=1 / 16, dtype=np.float64,
                                      rng=0))
    x = np.random.default_rng(0).standard_normal((2, 1, 64, 64))
    outputs, backward = net.forward(x)
    assert [y.shape for y in outputs] == [(2, 3)] * 3
    assert net(x).shape == (2, 3)
    dy = np.ones((2, 3))
    alone = backward((dy, None, None))
    assert all(p.grad is None for name, p in net.named_parameters() if name.startswith("aux"))
    head = net.forward(x)[1]((None, dy, None))
    both = net.forward(x)[1]((dy, dy, None))
    assert np.any(head)
    np.testing.assert_allclose(both, alone + head, rtol=1e-12, atol=1e-12 * np.abs(both).max())


def test_several_heads_on_one_layer():
    net = models.WithHeads({"a": nn.Linear(3, 4, dtype=np.float64, rng=0), "b": nn.ReLU()}, {
        "one": ("a", nn.Linear(4, 2, dtype=np.float64, rng=1)), "two": ("a", nn.Linear(4, 5, dtype=np.float64, rng=2))})
    x = np.random.default_rng(0).standard_normal((6, 3))
    (y, one, two), backward = net.forward(x)
    hidden = net["a"](x)
    for output, expected in ((y, np.maximum(hidden, 0)), (one, net.heads["one"][1](hidden)),
                             (two, net.heads["two"][1](hidden))):
        np.testing.assert_allclose(output, expected, rtol=1e-12)
    weights = {name: net.heads[name][1].weight.value for name in net.heads}
    expected = ((hidden > 0) + np.ones((6, 2)) @ weights["one"] + np.ones((6, 5)) @ weights["two"]) @ net[
        "a"].weight.value
    np.testing.assert_allclose(backward((np.ones_like(y), np.ones_like(one), np.ones_like(two))), expected, rtol=1e-12)


@pytest.mark.parametrize("heads", [{"one": ("c", nn.ReLU())}, {"b": ("a", nn.ReLU())}])
def test_heads_fit_their_trunk(heads):
    with pytest.raises(ValueError, match=r"WithHeads: head '(one|b)' is on the layer '[ca]', but the layers are a, b;"):
        models.WithHeads({"a": nn.ReLU(), "b": nn.ReLU()}, heads)


def test_auxiliary_loss_weights_are_those_of_the_paper():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, target = [rng.standard_normal((4, 3)) for _ in range(3)], np.array([0, 2, 1, 1])
    tensors = [torch.tensor(y, requires_grad=True) for y in logits]
    losses = [torch.nn.functional.cross_entropy(y, torch.tensor(target)) for y in tensors]
    expected = losses[0] + 0.3 * losses[1] + 0.3 * losses[2]
    expected.backward()
    loss, gradients = models.googlenet_loss(tuple(logits), target)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-12)
    assert models.googlenet_loss(logits[0], target)[0] == pytest.approx(losses[0].item())


# ---- making and training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_every_network_is_made_by_its_name(name, ndim):
    row = MODELS[name]
    size = (row.size,) * ndim
    if ndim not in row.ndims:
        with pytest.raises(ValueError, match=f"{name} has 3 spatial axes"):
            create(name, row.in_channels, 7, size)
        return
    takes_width = not row.fixed_size and name != "cnn3d"
    net = create(name, row.in_channels, 7, size, rng=0, **({"width": 1 / 32} if takes_width else {}))
    assert summarize(net, (row.in_channels, *size)).rows[-1].shape == (7,)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: create("resnet19", 3, 10, (32, 32)), "'resnet19' is no network, but one of .*resnet18"),
    (lambda: models.resnet(20), r"depth is 20, but one of \(10, 18, 34, 50, 101, 152\)"),
    (lambda: models.resnet(18, stem="tiny"), "resnet: stem is 'tiny', but 'large' or 'small'"),
    (lambda: models.densenet(stem="tiny"), "densenet: stem is 'tiny'"),
    (lambda: models.googlenet(stem="tiny"), "googlenet: stem is 'tiny'"),
    (lambda: models.resnet_small(21), r"depth is 21, but 6 n \+ 2"),
    (lambda: models.vgg(12), "depth is 12"),
    (lambda: models.densenet(100), "depth is 100"),
    (lambda: models.nin(images="huge"), "images is 'huge'"),
    (lambda: models.alexnet(variant="caffe"), "variant is 'caffe'"),
    (lambda: models.googlenet(variant="caffe"), "variant is 'caffe'"),
    (lambda: models.resnet18(ndim=4), "ndim is 4"),
])
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_seeds_decide_the_weights():
    first, same, other = (models.resnet_small(8, rng=seed).state_dict() for seed in (1, 1, 2))
    assert all(np.array_equal(first[key], same[key]) for key in first)
    assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("build", [
    partial(models.resnet, 18, width=1 / 8),
    partial(models.densenet, 121, width=1 / 8),
    partial(models.googlenet, variant="torchvision", width=1 / 8),
    partial(models.vgg, 11, batch_norm=True, width=1 / 8),
], ids=["resnet", "densenet", "googlenet", "vgg"])
def test_volumes_are_learnt(build):
    """Eight noise volumes of random classes are learnt by heart."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 1, 32, 32, 32)).astype(np.float32)
    target = np.arange(8) % 2
    net = no_dropout(build(1, 2, ndim=3, rng=0))
    optimizer = AdamW(net.parameters(), lr=1e-3)
    for _ in range(30):
        logits, backward = net.forward(x)
        loss, dlogits = nn.cross_entropy(logits, target)
        if loss < 0.1:
            return
        backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()
    pytest.fail(f"the loss is still {loss} after 30 steps")
