"""Networks: numbers of parameters and operations, names, and values against PyTorch and a NumPy reference."""

import contextlib
import math
import os
from functools import partial

import numpy as np
import pytest
from numpy_nets import Reference
from tolerance import assert_close, rms

import fastconv
from fastconv import models, nn
from fastconv.arrays import memory_order, to_channels_last
from fastconv.models import MODELS, WithCovariates, create
from fastconv.summary import summarize
from fastconv.training.optim import AdamW

torch = pytest.importorskip("torch")
import torch_nets  # noqa: E402

LARGE_NIN = [(11, 4, 0, 96, 96, 96), (5, 1, 2, 256, 256, 256), (3, 1, 1, 384, 384, 384), (3, 1, 1, 1024, 1024, 1000)]
SMALL_NIN = [(5, 1, 2, 192, 160, 96), (5, 1, 2, 192, 192, 192), (3, 1, 1, 192, 192, 10)]
VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
RESNET = {18: ((2, 2, 2, 2), (3, 3)), 34: ((3, 4, 6, 3), (3, 3)), 50: ((3, 4, 6, 3), (1, 3, 1)),
          101: ((3, 4, 23, 3), (1, 3, 1)), 152: ((3, 8, 36, 3), (1, 3, 1))}
DENSENET = {121: ((6, 12, 24, 16), 32, 64), 161: ((6, 12, 36, 24), 48, 96), 169: ((6, 12, 32, 32), 32, 64),
            201: ((6, 12, 48, 32), 32, 64)}
SMALL_RESNET = (3, 3, 3), (3, 3), (16, 32, 64), "small"

# fastconv's network, PyTorch's, size of an image with three channels or the whole shape, and parameters as published
# (None: PyTorch's count alone).
NETWORKS = {
    "logistic_regression": (models.logistic_regression, partial(torch_nets.mlp, 784, 10), (1, 28, 28), 7_850),
    "mlp": (models.mlp, partial(torch_nets.mlp, 784, 128, 10), (1, 28, 28), 101_770),
    "lenet5": (models.lenet5, torch_nets.LeNet, (1, 28, 28), 61_706),
    "lenet5-paper": (partial(models.lenet5, variant="paper"), torch_nets.LeNet1998, (1, 28, 28), 60_000),
    "cnn3d": (models.cnn3d, torch_nets.cnn3d, (1, 28, 28, 28), 17_674),
    "alexnet-paper": (partial(models.alexnet, variant="paper"), partial(torch_nets.alexnet, True), 227, 60_965_224),
    "alexnet": (models.alexnet, partial(torch_nets.alexnet, False), 224, 61_100_840),
    "nin": (models.nin, partial(torch_nets.NIN, SMALL_NIN), 32, 966_986),
    "nin-large": (partial(models.nin, num_classes=1000, images="large"), partial(torch_nets.NIN, LARGE_NIN), 224, None),
    **{f"vgg{depth}": (partial(models.vgg, depth), partial(torch_nets.vgg, rows), 224,
                       {16: 138_357_544, 19: 143_667_240}.get(depth)) for depth, rows in VGG.items()},
    "vgg11-bn": (partial(models.vgg, 11, batch_norm=True), partial(torch_nets.vgg, VGG[11], True), 224, None),
    "googlenet-paper": (partial(models.googlenet, auxiliary=True), partial(torch_nets.GoogLeNet, False), 224,
                        13_378_280),
    "googlenet": (partial(models.googlenet, variant="torchvision", auxiliary=True),
                  partial(torch_nets.GoogLeNet, True), 224, None),
    **{f"resnet{depth}": (partial(models.resnet, depth), partial(torch_nets.ResNet, *row), 224,
                          {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}[depth])
       for depth, row in RESNET.items()},
    **{f"resnet{depth}-paper": (partial(models.resnet, depth, variant="paper"),
                                partial(torch_nets.ResNet, *row, paper=True), 224, None)
       for depth, row in RESNET.items()},
    "plain34": (partial(models.resnet, 34, residual=False), partial(torch_nets.ResNet, *RESNET[34], residual=False),
                224, None),
    "resnet_small": (models.resnet_small, partial(torch_nets.ResNet, *SMALL_RESNET, classes=10), 32, None),
    "resnet_small-paper": (partial(models.resnet_small, shortcut="padding"),
                           partial(torch_nets.ResNet, *SMALL_RESNET, classes=10, paper=True), 32, None),
    **{f"densenet{depth}": (partial(models.densenet, depth), partial(torch_nets.DenseNet, *row), 224,
                            {121: 7_978_856, 161: 28_681_000, 169: 14_149_480, 201: 20_013_928}[depth])
       for depth, row in DENSENET.items()},
    # Volumes at full width. Where there is batch normalisation the last maps have 2x2x2 positions: the statistics of
    # fewer values enlarge rounding errors by what differs wildly from channel to channel.
    "resnet18-3d": (partial(models.resnet, 18, 1, 2, ndim=3),
                    partial(torch_nets.ResNet, *RESNET[18], in_channels=1, classes=2, ndim=3), (1, 40, 36, 38), None),
    "resnet50-3d": (partial(models.resnet, 50, 1, 2, ndim=3),
                    partial(torch_nets.ResNet, *RESNET[50], in_channels=1, classes=2, ndim=3), (1, 40, 36, 38), None),
    "densenet121-3d": (partial(models.densenet, 121, 1, 2, ndim=3),
                       partial(torch_nets.DenseNet, *DENSENET[121], 1, 2, ndim=3), (1, 64, 64, 64), None),
    "googlenet-3d": (partial(models.googlenet, 1, 2, variant="torchvision", auxiliary=True, ndim=3),
                     partial(torch_nets.GoogLeNet, True, 1, 2, ndim=3), (1, 40, 36, 38), None),
    "vgg11-3d": (partial(models.vgg, 11, 1, 2, ndim=3),
                 partial(torch_nets.vgg, VGG[11], in_channels=1, classes=2, pool_size=2, ndim=3), (1, 32, 32, 32),
                 None),
    "alexnet-3d": (partial(models.alexnet, 1, 2, ndim=3),
                   partial(torch_nets.alexnet, False, 1, 2, pool_size=2, ndim=3), (1, 64, 64, 64), None),
    "nin-3d": (partial(models.nin, 1, ndim=3), partial(torch_nets.NIN, SMALL_NIN, 1, 3), (1, 20, 16, 18), None),
    "lenet5-3d": (partial(models.lenet5, 1, 2, (28, 28, 28)), partial(torch_nets.LeNet, 1, 2, 125, 3),
                  (1, 28, 28, 28), None),
    "lenet5-paper-3d": (partial(models.lenet5, 1, 2, (28, 28, 28), "paper"),
                        partial(torch_nets.LeNet1998, 1, 2, (5, 5, 5)), (1, 28, 28, 28), None),
}


def shape_of(size):
    return size if isinstance(size, tuple) else (3, size, size)


def arithmetic(net, x):
    """MACs of PyTorch's network, and the length of the longest sum in its forward and backward pass."""
    macs, longest = 0, 1

    def count(module, inputs, output):
        nonlocal macs, longest
        fan_in = getattr(module, "fan_in", module.weight[0].numel())
        fan_out = module.weight.numel() // module.weight.shape[1]
        macs += output.numel() * fan_in
        longest = max(longest, fan_in, fan_out, output.numel() // len(module.weight))

    hooks = [m.register_forward_hook(count) for m in net.modules()
             if getattr(m, "weight", None) is not None and m.weight.ndim > 1]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return macs, longest


@contextlib.contextmanager
def zeros():
    """Networks of zeros: 100 million random numbers take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("_uniform", "_normal"):
            patch.setattr(nn.init, draw, lambda shape, scale, rng, dtype: np.zeros(shape, dtype))
        yield


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_names_and_operations_at_full_size(name):
    build, build_torch, size, parameters = NETWORKS[name]
    shape = shape_of(size)
    with torch.device("meta"):
        theirs = build_torch().eval()
        macs, _ = arithmetic(theirs, torch.zeros(1, *shape))
        outputs = outputs_of(theirs(torch.zeros(1, *shape)))
    with zeros():
        ours = build(rng=0)
    assert {key: value.shape for key, value in ours._state()} == {
        key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    count = sum(p.numel() for p in theirs.parameters())
    summary = summarize(ours, shape)
    assert ours.num_parameters() == summary.parameters == count == (parameters or count)
    assert summary.macs == macs
    assert summary.rows[-1].shape == tuple(outputs[0].shape[1:])


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


def test_heads_are_the_only_difference_of_the_two_googlenets():
    assert models.googlenet().num_parameters() == 6_998_552
    assert models.googlenet(variant="torchvision").num_parameters() == 6_624_904


@pytest.mark.parametrize(("channels", "size", "out", "kernel", "inside", "direct", "through"), [
    (192, 28, 32, 5, 16, 120_422_400, 12_443_648),
    (480, 14, 48, 5, 16, 112_896_000, 5_268_480),
])
def test_what_a_bottleneck_saves(channels, size, out, kernel, inside, direct, through):
    plain = nn.Conv2d(channels, out, kernel, padding=2)
    narrow = nn.Sequential(nn.Conv2d(channels, inside, 1), nn.Conv2d(inside, out, kernel, padding=2))
    assert summarize(plain, (channels, size, size)).macs == direct
    assert summarize(narrow, (channels, size, size)).macs == through


# ---- values ----------------------------------------------------------------------------------------------------------


def randomise(net, seed=0):
    """He's weights, and normalisations and biases that are not ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.ndim > 1:
                value.normal_(0, math.sqrt(2 / value[0].numel()), generator=generator)
            elif name.endswith(("weight", "running_var")):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point():
                value.normal_(0, 0.1, generator=generator)
    return net


def no_dropout(net):
    for _, layer in net.named_layers():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return net


def outputs_of(y):
    return y if isinstance(y, tuple) else (y,)


def everything(net, x, dy=None):
    """What PyTorch's network gives for x: inference, outputs and, for dy, gradients, and the state afterwards."""
    x = torch.tensor(x, requires_grad=True)
    with torch.no_grad():
        results = {"inference": outputs_of(net.eval()(x))[0]}
    net.zero_grad()
    y = outputs_of(net.train()(x))
    torch.autograd.backward(y, [torch.tensor(d) for d in dy])
    results |= {f"output{i}": value.detach() for i, value in enumerate(y)} | {"input": x.grad}
    results |= {name: parameter.grad for name, parameter in net.named_parameters()}
    results |= {name: value for name, value in net.named_buffers() if value.is_floating_point()}
    return {name: value.numpy().copy() for name, value in results.items()}


@contextlib.contextmanager
def noise(net, share):
    """Change what each layer of PyTorch's network gives, and each gradient that comes back, by about `share`.

    As rounding does: every element by a share of itself, and all elements of a channel together by a share of their
    size (a rounded mean, for one).
    """
    generator = torch.Generator().manual_seed(2)

    def random(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def shake(x):
        channels = (1, x.shape[1], *[1] * (x.ndim - 2))
        return x + share * (random(x.shape) * x + random(channels) * x.square().mean().sqrt()).detach()

    def disturb(module, inputs, output):
        if output.requires_grad:
            output.register_hook(shake)
        return shake(output)

    hooks = [m.register_forward_hook(disturb) for m in net.modules() if not list(m.children())]
    yield
    for hook in hooks:
        hook.remove()


def compare(ours, theirs, shape, *, channels_last=False, single=None):
    """Inference, outputs, all gradients and running statistics in training mode, against PyTorch in float64.

    What rounding may do is measured on PyTorch's network, by `noise`: a result that moves by 1e-8 times m if the share
    is 1e-8 is held to the shared tolerance of a sum of rms m, since that is what each layer's sums may be wrong by.

    `single` is the network in float32. Some of its ReLUs and maxima, those within rounding of a kink, fall on the other
    side: of 1e7 units about one in 1e6, each wrong by all that it is, which makes sqrt(1e-6) of the gradient's rms, and
    ten times that where rounding errors have grown tenfold twice. One such unit is all of a bias on a map of one pixel:
    one of n elements, which makes sqrt(1 / n) of their rms. Inference has no such jumps.
    """
    theirs = randomise(theirs.double())
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    assert not any(ours.load_state_dict(state))
    no_dropout(ours)
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape)
    _, length = arithmetic(theirs.eval(), torch.tensor(x))
    with torch.no_grad():
        dy = tuple(rng.standard_normal(tuple(y.shape)) for y in outputs_of(theirs(torch.tensor(x))))
    expected = everything(theirs, x, dy)
    share = 1e-8
    theirs.load_state_dict(state)
    with noise(theirs, share):
        moved = everything(theirs, x * (1 + share * rng.standard_normal(shape)), dy)

    actual = {"inference": ours(x)}
    y, backward = ours.forward(to_channels_last(x) if channels_last else x)
    actual |= {f"output{i}": value for i, value in enumerate(outputs_of(y))}
    actual["input"] = backward(dy if isinstance(y, tuple) else dy[0])
    if channels_last:
        assert memory_order(actual["input"]) == "channels_last"
    actual |= {name: parameter.grad for name, parameter in ours.named_parameters()}
    actual |= {name: buffer.value for name, buffer in ours.named_buffers() if buffer.dtype == np.float64}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # output channels differ in what the layers behind them make of an error
        moves = ((moved[name] - value) / share) ** 2
        moves = np.maximum(moves.mean(), moves.mean(axis=tuple(range(1, moves.ndim)), keepdims=True))
        assert_close(actual[name], value, length, magnitude=np.sqrt(moves))
    if single is None:
        return
    no_dropout(single).load_state_dict(state)
    inference = single(x.astype(np.float32))
    assert inference.dtype == np.float32
    magnitude = rms(moved["inference"] - expected["inference"]) / share
    assert_close(inference, expected["inference"], length, magnitude=magnitude)
    y, backward = single.forward(x.astype(np.float32))
    gradients = tuple(d.astype(np.float32) for d in dy)
    dx = backward(gradients if isinstance(y, tuple) else gradients[0])
    for name, value in [("input", dx), *((name, p.grad) for name, p in single.named_parameters())]:
        size = max(rms(expected[name]), rms(moved[name] - expected[name]) / share)
        assert rms(value - expected[name]) < (1e-2 + value.size**-0.5) * size, name


# One of each kind; FASTCONV_LONG=1 adds the others, which take minutes and up to 10 GB.
ALWAYS = (
    "logistic_regression", "mlp", "lenet5", "lenet5-paper", "cnn3d", "alexnet-paper", "alexnet", "nin", "nin-large",
    "vgg16", "googlenet-paper", "googlenet", "resnet18", "resnet50-paper", "plain34", "resnet50", "resnet_small",
    "resnet_small-paper", "densenet121", "resnet18-3d", "googlenet-3d", "lenet5-3d", "lenet5-paper-3d",
)
LONG = pytest.mark.skipif(not os.environ.get("FASTCONV_LONG"), reason="takes minutes; FASTCONV_LONG=1 runs it")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ALWAYS else LONG) for name in NETWORKS])
def test_values_and_gradients_at_full_size(name):
    build, build_torch, size, _ = NETWORKS[name]
    shape = shape_of(size)
    compare(build(dtype=np.float64, rng=0), build_torch(), (2 if len(shape) == 4 else 1, *shape), single=build(rng=0))


# The same networks at a size at which three axes and memory orders can be tried: layers, PyTorch's, input.
REDUCED = {
    "resnet18": (partial(models.resnet, 18, width=1 / 8),
                 partial(torch_nets.ResNet, *RESNET[18], (8, 16, 32, 64)), (64, 70), (33, 48, 34)),
    "resnet18-paper": (partial(models.resnet, 18, width=1 / 8, variant="paper"),
                       partial(torch_nets.ResNet, *RESNET[18], (8, 16, 32, 64), paper=True), (64, 70), (33, 48, 34)),
    "resnet50-small": (partial(models.resnet, 50, width=1 / 16, stem="small"),
                       partial(torch_nets.ResNet, *RESNET[50], (4, 8, 16, 32), "small"), (16, 18),
                       (17, 11, 10)),
    "densenet121": (partial(models.densenet, 121, width=1 / 8),
                    partial(torch_nets.DenseNet, DENSENET[121][0], 4, 8), (64, 70), (48, 64, 64)),
    "googlenet": (partial(models.googlenet, variant="torchvision", auxiliary=True, width=1 / 8),
                  partial(torch_nets.GoogLeNet, True, width=8), (64, 70), (64, 48, 65)),
    "alexnet-paper": (partial(models.alexnet, variant="paper", width=1 / 16, pool_size=2),
                      partial(torch_nets.alexnet, True, width=16, pool_size=2), (67, 99), (67, 67, 83)),
    "vgg11-bn": (partial(models.vgg, 11, batch_norm=True, width=1 / 16, pool_size=1),
                 partial(torch_nets.vgg, VGG[11], True, width=16, pool_size=1), (64, 70), (32, 64, 35)),
    "nin": (partial(models.nin, width=1 / 16),
            partial(torch_nets.NIN, [(5, 1, 2, 12, 10, 6), (5, 1, 2, 12, 12, 12), (3, 1, 1, 12, 12, 10)]),
            (20, 17), (9, 10, 11)),
}


@pytest.mark.parametrize(("ndim", "channels_last"), [(2, True), (3, False)])
@pytest.mark.parametrize("name", REDUCED)
def test_values_and_gradients_at_reduced_size(name, ndim, channels_last):
    build, build_torch, *sizes = REDUCED[name]
    compare(build(2, ndim=ndim, dtype=np.float64, rng=0), build_torch(in_channels=2, ndim=ndim),
            (2, 2, *sizes[ndim - 2]), channels_last=channels_last)


# Settings, the reference's forward pass, the input: checked without PyTorch.
BY_REFERENCE = {
    "logistic_regression": (models.logistic_regression, lambda net, x: net.mlp(x), (7, 8), (4, 5, 6)),
    "mlp": (partial(models.mlp, hidden=(9, 11)), lambda net, x: net.mlp(x), (7, 8), (4, 5, 6)),
    "lenet5": (models.lenet5, lambda net, x: net.lenet(x), (28, 20), (12, 16, 14)),
    "lenet5-paper": (partial(models.lenet5, variant="paper"), lambda net, x: net.lenet_1998(x), (28, 20), (12, 16, 14)),
    "cnn3d": (models.cnn3d, lambda net, x: net.cnn3d(x), None, (9, 8, 17)),
    "resnet18": (partial(models.resnet, 18, width=1 / 16),
                 lambda net, x: net.resnet(x, (2, 2, 2, 2), 2), (33, 40), (20, 17, 24)),
    "resnet18-paper": (partial(models.resnet, 18, width=1 / 16, variant="paper"),
                       lambda net, x: net.resnet(x, (2, 2, 2, 2), 2, paper=True), (33, 40), (20, 17, 24)),
    "resnet50-paper": (partial(models.resnet, 50, width=1 / 16, stem="small", variant="paper"),
                       lambda net, x: net.resnet(x, (3, 4, 6, 3), 3, stem="small", paper=True), (16, 18), (9, 8, 10)),
    "resnet50": (partial(models.resnet, 50, width=1 / 16, stem="small"),
                 lambda net, x: net.resnet(x, (3, 4, 6, 3), 3, stem="small"), (16, 18), (9, 8, 10)),
    "plain18": (partial(models.resnet, 18, width=1 / 16, residual=False),
                lambda net, x: net.resnet(x, (2, 2, 2, 2), 2, residual=False), (33, 40), (20, 17, 24)),
    "resnet_small": (partial(models.resnet_small, 14, width=1 / 4),
                     lambda net, x: net.resnet(x, (2, 2, 2), 2, stem="small"), (12, 13), (8, 7, 6)),
    "densenet121": (partial(models.densenet, 121, width=1 / 16), lambda net, x: net.densenet(x), (64, 70),
                    (34, 32, 64)),
    "googlenet-paper": (partial(models.googlenet, width=1 / 16), lambda net, x: net.googlenet(x), (64, 70),
                        (40, 34, 33)),
    "googlenet": (partial(models.googlenet, width=1 / 16, variant="torchvision", auxiliary=True),
                  lambda net, x: net.googlenet(x), (64, 70), (40, 34, 33)),
    "alexnet-paper": (partial(models.alexnet, variant="paper", width=1 / 32, pool_size=1),
                      lambda net, x: net.alexnet(x, True), (67, 99), (67, 67, 83)),
    "alexnet": (partial(models.alexnet, width=1 / 32, pool_size=1), lambda net, x: net.alexnet(x, False),
                (67, 99), (67, 67, 83)),
    "vgg13": (partial(models.vgg, 13, width=1 / 16, pool_size=1), lambda net, x: net.vgg(x, VGG[13]),
              (32, 34), (32, 33, 34)),
    "vgg11-bn": (partial(models.vgg, 11, batch_norm=True, width=1 / 16, pool_size=1),
                 lambda net, x: net.vgg(x, VGG[11], True), (32, 34), (32, 33, 34)),
    "nin": (partial(models.nin, width=1 / 16), lambda net, x: net.nin(x), (20, 17), (9, 10, 11)),
}


BY_SIZE = ("logistic_regression", "mlp", "lenet5", "lenet5-paper")  # want the size of the image, not just its axes


@pytest.mark.parametrize(("name", "ndim"), [(name, ndim) for name, (*_, image, volume) in BY_REFERENCE.items()
                                            for ndim, size in ((2, image), (3, volume)) if size])
def test_values_and_gradients_by_the_numpy_reference(name, ndim):
    build, run, *sizes = BY_REFERENCE[name]
    size = sizes[ndim - 2]
    where = {"input_size": size} if name in BY_SIZE else {} if name == "cnn3d" else {"ndim": ndim}
    net = no_dropout(build(in_channels=2, num_classes=5, **where, dtype=np.float64, rng=0))
    rng = np.random.default_rng(3)
    for _, parameter in net.named_parameters():
        if len(parameter.shape) == 1:
            parameter.assign(rng.uniform(0.5, 1.5, parameter.shape))
    x = rng.standard_normal((2, 2, *size))
    state = net.state_dict()
    outputs, backward = net.forward(x)
    expected = outputs_of(run(Reference(state), x))
    for y, value in zip(outputs_of(outputs), expected, strict=True):
        assert_close(y, value, 64**2 * 2000)  # one sum of 64 layers of 2000 products

    dys = tuple(rng.standard_normal(y.shape) for y in expected)
    gradients = {"input": backward(dys if isinstance(outputs, tuple) else dys[0])}
    gradients |= {key: parameter.grad for key, parameter in net.named_parameters()}

    def loss(step, direction):
        moved = {key: state[key] + step * d for key, d in direction.items() if key != "input"}
        outputs = outputs_of(run(Reference(state | moved), x + step * direction["input"]))
        return sum(float(np.sum(dy * y)) for dy, y in zip(dys, outputs, strict=True))

    # Central differences along directions in which every array moves by a share of its size. Some of the 1e5 ReLUs and
    # maxima change sides between the two ends, each with an error as large as its own part.
    step = 1e-8
    for _ in range(3):
        direction = {key: rng.standard_normal(g.shape) * rms(x if key == "input" else state[key])
                     for key, g in gradients.items()}
        parts = [np.sum(d * gradients[key]) for key, d in direction.items()]
        quotient = (loss(step, direction) - loss(-step, direction)) / (2 * step)
        assert abs(quotient - sum(parts)) < 1e-4 * sum(map(abs, parts))


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
    (lambda: models.resnet(18, stem="tiny"), "stem is 'tiny'"),
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


# ---- covariates ------------------------------------------------------------------------------------------------------


def exclusive_or(count, rng):
    """Images that are bright on the left or on the right, a score that is high or low; the class is their XOR."""
    left, high = rng.integers(0, 2, (2, count))
    images = rng.standard_normal((count, 1, 8, 8)).astype(np.float32)
    for image, side in zip(images, left, strict=True):
        image[0, :, :4 if side else None] += side
        image[0, :, 4:] += 1 - side
    table = np.stack([100 + 15 * (2 * high - 1) + rng.standard_normal(count), 50 + rng.standard_normal(count)], 1)
    return images, table.astype(np.float32), left ^ high


def test_image_and_scores_decide_together_what_neither_decides_alone():
    rng = np.random.default_rng(0)
    images, table, target = exclusive_or(512, rng)
    backbone = nn.Sequential(conv=nn.Conv2d(1, 4, 3, stride=2, padding=1, rng=0), relu=nn.ReLU(), flatten=nn.Flatten(),
                             fc=nn.Linear(64, 2, rng=0))
    net = WithCovariates(backbone, 2, hidden=16, rng=0)
    net.fit(table)
    optimizer = AdamW(net.parameters(), lr=1e-2)
    for _ in range(15):
        for rows in rng.permutation(512).reshape(8, 64):
            logits, backward = net.forward((images[rows], table[rows]))
            backward(nn.cross_entropy(logits, target[rows])[1])
            optimizer.step()
            optimizer.zero_grad()
    images, table, target = exclusive_or(256, rng)

    def accuracy(images, table):
        return np.mean(net((images, table)).argmax(1) == target)

    assert accuracy(images, table) > 0.95
    assert 0.35 < accuracy(rng.permutation(images), table) < 0.65
    assert 0.35 < accuracy(images, rng.permutation(table)) < 0.65


def test_covariates_are_standardised_and_missing_ones_marked():
    table = np.array([[1.0, 7, 3], [3, 7, np.nan], [np.nan, 7, 5]])
    net = WithCovariates(models.resnet_small(8, 1, 2, rng=0), 3)
    net.fit(table)
    layer = net["join"]._layers["covariates"]
    y = layer(table.astype(np.float32))
    np.testing.assert_allclose(y, [[-1, 0, -1, 0, 0, 0], [1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0]], atol=1e-6)
    state = net.state_dict()
    np.testing.assert_allclose(state["join.covariates.mean"], [2, 7, 4])
    np.testing.assert_allclose(state["join.covariates.std"], [1, 1, 1])
    other = WithCovariates(models.resnet_small(8, 1, 2, rng=1), 3)
    other.load_state_dict(state)
    images = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(other((images, table.astype(np.float32))), net((images, table.astype(np.float32))))
    assert np.isfinite(net((images, table.astype(np.float32)))).all()


def test_constant_covariates_stay_small():
    """In binary, the deviation of three times 0.1 is not zero."""
    net = WithCovariates(models.resnet_small(8, 1, 2, rng=0), 2)
    assert np.std([0.1] * 3) > 0
    net.fit(np.array([[0.1, 0.1], [0.1, 0.1], [0.1, np.nan]]))
    y = net["join"]._layers["covariates"](np.array([[0.1, 0.3]], np.float32))
    np.testing.assert_allclose(y, [[0, 0.2, 0, 0]], atol=1e-6)


def test_gradients_of_both_inputs():
    net = WithCovariates(models.resnet_small(8, 1, 2, width=1 / 4, ndim=3, dtype=np.float64, rng=0), 2, hidden=3, rng=0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 1, 6, 5, 4)), rng.standard_normal((3, 2))
    fastconv.gradcheck(net, x, max_entries=30, directions=2)


def test_the_backbones_own_layers_can_be_kept():
    backbone = models.vgg(11, 1, 3, width=1 / 32, pool_size=1, rng=0)
    images = np.random.default_rng(0).standard_normal((2, 1, 32, 32)).astype(np.float32)
    alone = backbone(images)
    net = WithCovariates(backbone, 4, hidden=None, rng=0)
    first = net["head"]["classifier"]["0"]
    with first.weight.write() as weight:
        weight[:, 16:] = 0
    table = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    np.testing.assert_allclose(net((images, table)), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: WithCovariates(nn.Sequential(nn.Conv2d(1, 2, 3)), 2), "a Flatten with linear layers behind it"),
    (lambda: WithCovariates(models.resnet_small(8, 1, 2), 3).fit(np.zeros((5, 2))), r"\(5, 2\), but \(N, 3\)"),
    (lambda: WithCovariates(models.resnet_small(8, 1, 2), 2).fit(np.array([[1, np.nan], [2, np.nan]])),
     r"columns \[1\]"),
    (lambda: WithCovariates(models.resnet_small(8, 1, 2), 2).fit(np.array([[1, np.inf], [2, 3]])), r"columns \[1\]"),
    (lambda: WithCovariates(models.resnet_small(8, 1, 2), 2).fit(np.array([[1, 1.7e9], [2, 1.7e9 + 20]])),
     r"columns \[1\] of covariates deviate by \[10\.0\], but float32 resolves \[202"),
])
def test_bad_covariates_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
