"""Networks at full size against PyTorch: names and shapes of weights, operations, values and gradients."""

import contextlib
import math
import os
from functools import partial

import numpy as np
import pytest
from networks import DENSENET, LARGE_NIN, RESNET, SMALL_NIN, SMALL_RESNET, VGG, no_dropout, outputs_of, zeros
from tolerance import assert_close, tolerance

from fastconv import models
from fastconv.arrays import memory_order, to_channels_last
from fastconv.summary import summarize

torch = pytest.importorskip("torch")
import torch_nets  # noqa: E402
from pieces import as_chosen, assert_same_piece, chosen_by_fastconv, sizes_of_errors  # noqa: E402

# fastconv's network, PyTorch's, and the size of an image with three channels or the whole shape.
NETWORKS = {
    "logistic_regression": (models.logistic_regression, partial(torch_nets.mlp, 784, 10), (1, 28, 28)),
    "mlp": (models.mlp, partial(torch_nets.mlp, 784, 128, 10), (1, 28, 28)),
    "lenet5": (models.lenet5, torch_nets.LeNet, (1, 28, 28)),
    "lenet5-paper": (partial(models.lenet5, variant="paper"), torch_nets.LeNet1998, (1, 28, 28)),
    "cnn3d": (models.cnn3d, torch_nets.cnn3d, (1, 28, 28, 28)),
    "alexnet-paper": (partial(models.alexnet, variant="paper"), partial(torch_nets.alexnet, True), 227),
    "alexnet": (models.alexnet, partial(torch_nets.alexnet, False), 224),
    "nin": (models.nin, partial(torch_nets.NIN, SMALL_NIN), 32),
    "nin-large": (partial(models.nin, num_classes=1000, images="large"), partial(torch_nets.NIN, LARGE_NIN), 224),
    **{f"vgg{depth}": (partial(models.vgg, depth), partial(torch_nets.vgg, rows), 224) for depth, rows in VGG.items()},
    "vgg11-bn": (partial(models.vgg, 11, batch_norm=True), partial(torch_nets.vgg, VGG[11], True), 224),
    "googlenet-paper": (partial(models.googlenet, auxiliary=True), partial(torch_nets.GoogLeNet, False), 224),
    "googlenet": (partial(models.googlenet, variant="torchvision", auxiliary=True),
                  partial(torch_nets.GoogLeNet, True), 224),
    **{f"resnet{depth}": (partial(models.resnet, depth), partial(torch_nets.ResNet, *row), 224)
       for depth, row in RESNET.items()},
    **{f"resnet{depth}-paper": (partial(models.resnet, depth, variant="paper"),
                                partial(torch_nets.ResNet, *row, paper=True), 224)
       for depth, row in RESNET.items()},
    "plain34": (partial(models.resnet, 34, residual=False), partial(torch_nets.ResNet, *RESNET[34], residual=False),
                224),
    "resnet_small": (models.resnet_small, partial(torch_nets.ResNet, *SMALL_RESNET, classes=10), 32),
    "resnet_small-paper": (partial(models.resnet_small, shortcut="padding"),
                           partial(torch_nets.ResNet, *SMALL_RESNET, classes=10, paper=True), 32),
    **{f"densenet{depth}": (partial(models.densenet, depth), partial(torch_nets.DenseNet, *row), 224)
       for depth, row in DENSENET.items()},
    # Volumes at full width. Where there is batch normalisation the last maps have 2x2x2 positions: the statistics of
    # fewer values enlarge rounding errors by what differs wildly from channel to channel.
    "resnet18-3d": (partial(models.resnet, 18, 1, 2, ndim=3),
                    partial(torch_nets.ResNet, *RESNET[18], in_channels=1, classes=2, ndim=3), (1, 40, 36, 38)),
    "resnet50-3d": (partial(models.resnet, 50, 1, 2, ndim=3),
                    partial(torch_nets.ResNet, *RESNET[50], in_channels=1, classes=2, ndim=3), (1, 40, 36, 38)),
    "densenet121-3d": (partial(models.densenet, 121, 1, 2, ndim=3),
                       partial(torch_nets.DenseNet, *DENSENET[121], 1, 2, ndim=3), (1, 64, 64, 64)),
    "googlenet-3d": (partial(models.googlenet, 1, 2, variant="torchvision", stem="small", auxiliary=True, ndim=3),
                     partial(torch_nets.GoogLeNet, True, 1, 2, ndim=3, stem="small"), (1, 20, 16, 18)),
    "vgg11-3d": (partial(models.vgg, 11, 1, 2, ndim=3),
                 partial(torch_nets.vgg, VGG[11], in_channels=1, classes=2, pool_size=2, ndim=3), (1, 32, 32, 32)),
    "alexnet-3d": (partial(models.alexnet, 1, 2, ndim=3),
                   partial(torch_nets.alexnet, False, 1, 2, pool_size=2, ndim=3), (1, 64, 64, 64)),
    "nin-3d": (partial(models.nin, 1, ndim=3), partial(torch_nets.NIN, SMALL_NIN, 1, 3), (1, 20, 16, 18)),
    "lenet5-3d": (partial(models.lenet5, 1, 2, (28, 28, 28)), partial(torch_nets.LeNet, 1, 2, 125, 3),
                  (1, 28, 28, 28)),
    "lenet5-paper-3d": (partial(models.lenet5, 1, 2, (28, 28, 28), "paper"),
                        partial(torch_nets.LeNet1998, 1, 2, (5, 5, 5)), (1, 28, 28, 28)),
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


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_names_and_operations_at_full_size(name):
    build, build_torch, size = NETWORKS[name]
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
    assert ours.num_parameters() == summary.parameters == count
    assert summary.macs == macs
    assert summary.rows[-1].shape == tuple(outputs[0].shape[1:])


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
            if value.is_floating_point():
                value.copy_(value.float())  # in float32 the same numbers
    return net


def everything(net, x, dy, chosen):
    """What PyTorch's network gives for x: inference, outputs, gradients for dy, and the statistics afterwards.

    The training pass is on the piece of `chosen`; the second result says how it was met.
    """
    x = torch.tensor(x, requires_grad=True)
    with torch.no_grad():
        results = {"inference": outputs_of(net.eval()(x))[0]}
    net.zero_grad()
    with as_chosen(chosen) as choices:
        y = outputs_of(net.train()(x))
    torch.autograd.backward(y, [torch.tensor(d) for d in dy])
    results |= {f"output{i}": value.detach() for i, value in enumerate(y)} | {"input": x.grad}
    results |= {name: parameter.grad for name, parameter in net.named_parameters()}
    results |= {name: value for name, value in net.named_buffers() if value.is_floating_point()}
    return {name: value.numpy().copy() for name, value in results.items()}, choices


def everything_of_ours(net, x, dy, channels_last):
    """The same of fastconv's network, and what its ReLUs and pools chose."""
    results = {"inference": net(x)}
    with chosen_by_fastconv() as chosen:
        y, backward = net.forward(to_channels_last(x) if channels_last else x)
    results |= {f"output{i}": value for i, value in enumerate(outputs_of(y))}
    results["input"] = backward(dy if isinstance(y, tuple) else dy[0])
    if channels_last:
        assert memory_order(results["input"]) == "channels_last"
    results |= {name: parameter.grad for name, parameter in net.named_parameters()}
    return results | {name: buffer.value for name, buffer in net.named_buffers() if buffer.dtype == x.dtype}, chosen


@contextlib.contextmanager
def noise(net, share, seed):
    """Change what each layer of PyTorch's network gives, and each gradient that comes back, by about `share`.

    As rounding does: every element by a share of itself, and all elements of a channel together by a share of their
    size (a rounded mean, for one).
    """
    generator = torch.Generator().manual_seed(seed)

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


def compare(ours, theirs, shape, *, channels_last=False, single=None, draws=2):
    """Inference, outputs, all gradients and running statistics in training mode, against PyTorch in float64.

    What rounding may do is measured on PyTorch's network, by `noise`: a result that moves by 1e-8 times m if the share
    is 1e-8 is held to the shared tolerance of a sum of rms m, since that is what each layer's sums may be wrong by. m
    is that of the whole result, or of an element's first axis, or of its first two, whichever is largest. Channels
    differ in it, since batch normalisation divides by a deviation that is a channel's own, and an element of a weight's
    gradient has the errors of an output channel and an input channel. What moves all of a channel together is one
    number for each of the `draws` of noise: the error over the m of k draws has Student's distribution with k degrees
    of freedom, whose tails are long for one draw, and which for 4 is 10 times too large, as much as the tolerance has
    room for, once in 2,000.

    `single` is the network in float32, held to the same with the epsilon of float32. Kinks are no excuse for either:
    PyTorch's network chooses as fastconv's does, see `pieces`.
    """
    theirs = randomise(theirs.double())
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    rng = np.random.default_rng(1)
    x = rng.standard_normal(shape, np.float32).astype(np.float64)  # in float32 the same numbers
    _, length = arithmetic(theirs.eval(), torch.tensor(x))
    with torch.no_grad():
        dy = tuple(rng.standard_normal(tuple(y.shape), np.float32).astype(np.float64)
                   for y in outputs_of(theirs(torch.tensor(x))))
    share, magnitudes, sizes = 1e-8, {}, []
    for net in (ours, single) if single else (ours,):
        assert not any(no_dropout(net).load_state_dict(state))
        dtype = next(iter(net.parameters())).dtype
        actual, chosen = everything_of_ours(net, x.astype(dtype), tuple(d.astype(dtype) for d in dy), channels_last)
        theirs.load_state_dict(state)
        expected, choices = everything(theirs, x, dy, chosen)
        if net is ours:
            squares = dict.fromkeys(expected, 0.0)
            for draw in range(draws):
                theirs.load_state_dict(state)
                with noise(theirs, share, draw):
                    moved, noisy = everything(theirs, x * (1 + share * rng.standard_normal(shape)), dy, chosen)
                for name, value in expected.items():
                    moves = ((moved[name] - value) / share) ** 2 / draws
                    squares[name] += moves.mean(axis=tuple(range(2, moves.ndim)), keepdims=True)
            magnitudes = {name: np.sqrt(np.maximum(np.maximum(m.mean(), m.mean(axis=tuple(range(1, m.ndim)),
                                                                               keepdims=True)), m))
                          for name, m in squares.items()}
            sizes = sizes_of_errors(choices, noisy, share)
        assert_same_piece(choices, sizes, tolerance(dtype, length))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert actual[name].dtype == dtype
            assert_close(actual[name], value, length, magnitude=magnitudes[name])


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
    build, build_torch, size = NETWORKS[name]
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
    "densenet121-small": (partial(models.densenet, 121, stem="small", width=1 / 8),
                          partial(torch_nets.DenseNet, DENSENET[121][0], 4, 8, stem="small"), (33, 30), (16, 19, 17)),
    "googlenet": (partial(models.googlenet, variant="torchvision", auxiliary=True, width=1 / 8),
                  partial(torch_nets.GoogLeNet, True, width=8), (64, 70), (64, 48, 65)),
    "googlenet-small": (partial(models.googlenet, variant="torchvision", stem="small", auxiliary=True, width=1 / 8),
                        partial(torch_nets.GoogLeNet, True, width=8, stem="small"), (33, 30), (20, 16, 18)),
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
            (2, 2, *sizes[ndim - 2]), channels_last=channels_last, draws=4)
