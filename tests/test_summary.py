"""Summaries: shapes of real runs, receptive fields by following NaN, published numbers."""

import functools

import numpy as np
import pytest

from fastconv import models, nn
from fastconv.models import WithCovariates
from fastconv.nn import blocks
from fastconv.summary import Axis, summarize


def small(name, ndim, **options):
    return models.create(name, 2, 3, (64,) * ndim, rng=0, **options)


NETWORKS = {
    "resnet18": functools.partial(small, "resnet18", width=1 / 16),
    "resnet50": functools.partial(small, "resnet50", width=1 / 16),
    "densenet121": functools.partial(small, "densenet121", width=1 / 16),
    "googlenet": functools.partial(small, "googlenet", width=1 / 16),
    "vgg11": functools.partial(small, "vgg11", width=1 / 32, pool_size=1),
    "nin": functools.partial(small, "nin", width=1 / 16),
    "lenet5": functools.partial(small, "lenet5"),
    "lenet5, paper": functools.partial(small, "lenet5", variant="paper"),
    "mlp": functools.partial(small, "mlp"),
}


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_those_of_a_run(name, ndim, monkeypatch):
    """Each leaf layer's output in a real run, by name."""
    net = NETWORKS[name](ndim)
    names = {id(layer): key for key, layer in net.named_layers() if not list(layer.children())}
    shapes = {}

    def spy(cls):
        original = cls.__call__

        def wrapped(self, *args, **kwargs):
            y = original(self, *args, **kwargs)
            if id(self) in names:
                shapes[names[id(self)]] = y.shape[1:]
            return y

        monkeypatch.setattr(cls, "__call__", wrapped)

    classes = {type(layer) for _, layer in net.named_layers() if id(layer) in names}
    for cls in {next(base for base in cls.__mro__ if "__call__" in vars(base)) for cls in classes}:
        spy(cls)
    net(np.zeros((1, 2, *(64,) * ndim), np.float32))
    rows = {row.name: row.shape for row in summarize(net, (2, *(64,) * ndim)).rows}
    # the sums of LeNet's subsampling run as a part of it
    assert all(key.endswith(".sum") for key in set(names.values()) - shapes.keys())
    assert {key: rows[key] for key in shapes} == shapes


def until_pool(net):
    """The part of a network whose output still has positions."""
    names = [name for name, _ in net.children()]
    return net[:names.index("score" if "score" in names else "avgpool")]


# Network, input length that the field of the middle output fits into.
FIELDS = {
    "resnet18": (functools.partial(models.resnet18, width=1 / 16), 1024),
    "resnet50": (functools.partial(models.resnet50, width=1 / 16), 1024),
    "plain18": (functools.partial(models.resnet18, width=1 / 16, residual=False), 1024),
    "densenet121": (functools.partial(models.densenet121, width=1 / 16), 4096),
    "googlenet": (functools.partial(models.googlenet, width=1 / 16), 1500),
    "nin": (functools.partial(models.nin, width=1 / 16), 128),
    "vgg16": (functools.partial(models.vgg16, width=1 / 32, pool_size=1), 512),
    "alexnet": (functools.partial(models.alexnet, width=1 / 32, pool_size=1), 512),
}


@pytest.mark.parametrize("name", FIELDS)
def test_receptive_fields_by_following_nan(name):
    """A NaN in the input reaches exactly the outputs whose field holds it, whatever the branches."""
    build, length = FIELDS[name]
    net = until_pool(build(in_channels=1, ndim=1, rng=0))
    (axis,) = summarize(net, (1, length)).rows[-1].field
    outputs = summarize(net, (1, length)).rows[-1].shape[1]
    middle = outputs // 2
    lo, hi = (round(end + middle * axis.jump) for end in (axis.lo, axis.hi))
    assert 0 < lo < hi < length - 1
    inside = [lo - 1, lo, hi, hi + 1]
    x = np.random.default_rng(0).standard_normal((4, 1, length)).astype(np.float32)
    x[range(4), 0, inside] = np.nan
    reached = np.isnan(net(x)[:, :, middle]).any(1)
    assert reached.tolist() == [False, True, True, False]


@pytest.mark.parametrize(("net", "layer", "size", "expected"), [
    # Araujo, Norris and Sim 2019, table of classical networks
    (functools.partial(models.alexnet, width=1 / 32), "features.12", 224, 195),
    (functools.partial(models.vgg16, width=1 / 32), "features.30", 224, 212),
    # 7 + 2 * 2 (pool), then 2 * jump for each 3x3: 4 * 2 * 4 + (1 * 4 + 3 * 8) * 2 + ...
    (functools.partial(models.resnet18, width=1 / 32), "layer4.1.relu", 224, 435),
])
def test_published_receptive_fields(net, layer, size, expected):
    rows = {row.name: row for row in summarize(net(), (3, size, size)).rows}
    assert rows[layer].receptive_field == (expected, expected)


def test_receptive_field_of_branches_is_their_union():
    net = nn.Concat(nn.Conv1d(1, 1, 3, padding=((0, 2),)), nn.Conv1d(1, 1, 2, padding=((1, 0),)), nn.Identity())
    assert summarize(net, (1, 9)).rows[-1].field == (Axis(1, -1, 2),)
    assert Axis(2, -1, 2).size == 4
    assert Axis(2, -1, 2).centre == 0.5


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), (2, 2, 0, 1), (4, 2, 1, 1),
                                                                       (3, 3, 0, 2), (1, 3, 0, 1), (5, 1, 2, 1)])
def test_field_of_a_transposed_convolution_covers_all_that_reaches_it(kernel, stride, padding, dilation):
    layer = nn.ConvTranspose1d(1, 1, kernel, stride=stride, padding=padding, dilation=dilation, rng=0)
    (axis,) = summarize(layer, (1, 12)).rows[0].field
    reached = np.stack([np.isnan(layer(np.where(np.arange(12) == i, np.nan, 1).astype(np.float32)[None, None]))[0, 0]
                        for i in range(12)])
    offsets = [i - o * axis.jump for i, o in np.argwhere(reached) if 4 * stride < o < 8 * stride]
    assert min(offsets) == pytest.approx(axis.lo)
    assert max(offsets) == pytest.approx(axis.hi)


def test_a_row_counts_its_own():
    net = nn.Sequential(conv=nn.Conv2d(2, 4, 3, padding=1), bn=nn.BatchNorm2d(4), relu=nn.ReLU(), pool=nn.MaxPool2d(2),
                        flatten=nn.Flatten(), fc=nn.Linear(4 * 3 * 3, 5, bias=False))
    summary = summarize(net, (2, 6, 7))
    rows = {row.name: row for row in summary.rows}
    macs = 4 * 6 * 7 * 2 * 9
    assert (rows["conv"].parameters, rows["conv"].macs, rows["conv"].flops) == (76, macs, 2 * macs)
    assert (rows["bn"].parameters, rows["bn"].flops) == (8, 2 * 4 * 42)
    assert (rows["relu"].flops, rows["pool"].flops) == (4 * 42, 4 * 9 * 4)
    assert rows["flatten"].activation_bytes == 0
    assert (rows["fc"].macs, rows["fc"].flops) == (180, 360 - 5)
    assert rows["conv"].activation_bytes == 4 * 4 * 42
    assert summary.macs == macs + 180
    assert rows["fc"].receptive_field == (8, 8)  # 3 rows of windows of 4 with jump 2


def test_shared_layers_count_once():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    summary = summarize(nn.Sequential(conv, nn.ReLU(), conv), (2, 5, 5))
    assert summary.parameters == 38
    assert summary.macs == 2 * 2 * 2 * 9 * 25


def test_groups_add_up():
    net = models.resnet_small(8, rng=0)
    summary = summarize(net, (3, 32, 32))
    groups = summary.grouped(1)
    assert [row.name for row in groups] == ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "flatten",
                                            "fc"]
    assert sum(row.parameters for row in groups) == summary.parameters == net.num_parameters()
    assert sum(row.macs for row in groups) == summary.macs
    assert groups[4].shape == (32, 16, 16)


def test_table():
    text = summarize(models.lenet5(), (1, 28, 28), "LeNet-5").table().splitlines()
    assert text[0] == "LeNet-5, input 1x28x28"
    assert text[2].split() == ["layer", "kind", "output", "field", "parameters", "MACs", "FLOPs", "memory"]
    assert text[3].split() == ["c1", "Conv2d", "6x28x28", "5x5", "156", "117,600", "235,200", "0.019", "MB"]
    assert text[-1].split()[:2] == ["sum", "61,706"]
    assert all(line == line.rstrip() for line in text)


def test_several_inputs():
    net = WithCovariates(models.resnet_small(8, 1, 2, rng=0), 3, hidden=5, rng=0)
    summary = summarize(net, ((1, 16, 16), (3,)))
    rows = {row.name: row for row in summary.rows}
    assert rows["join.concat"].shape == (64 + 6,)
    assert summary.rows[-1].shape == (2,)
    assert summary.parameters == net.num_parameters()


def test_a_layer_without_a_rule_is_run_for_its_shape():
    class Twice(nn.Layer):
        def __init__(self):
            self.conv = nn.Conv2d(2, 3, 3)

        def __call__(self, x):
            return self.conv(x) * 2

    summary = summarize(nn.Sequential(twice=Twice(), relu=nn.ReLU()), (2, 6, 6))
    assert [row.shape for row in summary.rows] == [(3, 4, 4)] * 2
    assert summary.parameters == 57
    assert summary.rows[1].receptive_field is None
    assert "?" in summary.table()


@pytest.mark.parametrize(("net", "shape", "message"), [
    (nn.Sequential(fc=nn.Linear(4, 2)), (5,), "fc: the input has shape .5,., but Linear needs 4"),
    (nn.Sequential(conv=nn.Conv2d(3, 2, 3)), (4, 8, 8), "conv: .*channels"),
    (models.resnet_small(8, rng=0), (1, 8, 8), "conv1: .*channels"),
])
def test_what_does_not_fit_is_named(net, shape, message):
    with pytest.raises(ValueError, match=message):
        summarize(net, shape)


def test_every_block_has_rules():
    kind = {"ndim": 3, "rng": 0}
    for block in (blocks.basic_block(4, 8, 2, **kind), blocks.DenseBlock(4, 2, 3, **kind),
                  blocks.inception(4, 2, (2, 2), (2, 2), 2, **kind), blocks.mlpconv(4, (2, 3), 3, **kind),
                  nn.Residual(nn.Conv3d(4, 4, 3, padding=1), activation=nn.ReLU())):
        summary = summarize(block, (4, 8, 8, 8))
        assert summary.rows[-1].field is not None
        assert summary.rows[-1].shape == block(np.zeros((1, 4, 8, 8, 8), np.float32)).shape[1:]
        assert summary.parameters == block.num_parameters()
