"""Summaries: shapes of real runs, receptive fields by following NaN, published numbers."""

import copy
import functools

import numpy as np
import pytest

from fastconv import models, nn
from fastconv.bottlenecks import find_bottlenecks
from fastconv.cli.network import Zeros
from fastconv.models import WithCovariates
from fastconv.nn import blocks
from fastconv.summary import Axis, summarize
from fastconv.tables import human


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
def test_shapes_are_those_of_a_run(name, ndim):
    """Each leaf layer's output in a real run, by name."""
    net = NETWORKS[name](ndim)
    shapes = {}

    def spied(cls, key):
        """A class of its own, which inference does not fuse with its neighbours."""
        def call(self, *args, **kwargs):
            y = cls.__call__(self, *args, **kwargs)
            shapes[key] = y.shape[1:]
            return y

        return type(cls.__name__, (cls,), {"__call__": call})

    run = copy.deepcopy(net)
    leaves = {key: layer for key, layer in run.named_layers() if not list(layer.children())}
    for key, layer in leaves.items():
        layer.__class__ = spied(type(layer), key)
    run(np.zeros((1, 2, *(64,) * ndim), np.float32))
    rows = {row.name: row.shape for row in summarize(net, (2, *(64,) * ndim)).rows}
    # the sums of LeNet's subsampling run as a part of it
    assert all(key.endswith(".sum") for key in leaves.keys() - shapes.keys())
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
    assert text[3].split() == ["c1", "Conv2d", "6x28x28", "5²", "156", "118", "k", "235", "k", "18.8", "kB"]
    assert text[-4].split()[:2] == ["sum", "61,706"]
    assert text[-2].startswith("61,706 parameters (247 kB); for one image ")
    assert text[-1] == "receptive field of s4, the last layer with positions: 16x16"
    assert all(line == line.rstrip() for line in text)


def test_the_outline_adds_up():
    summary = summarize(models.resnet_small(8, rng=0), (3, 32, 32))
    deep, flat = summary.table().splitlines(), summary.table(depth=1).splitlines()
    layer2 = ["layer2", "32x16x16", "13²", "14,528", "3.67", "M"]
    for lines in (deep, flat):
        line = next(line for line in lines if line.startswith("layer2"))
        assert line.split()[:len(layer2)] == layer2
    assert any(line.startswith("    conv1 ") for line in deep)
    assert not any(line.startswith(" ") for line in flat[:-3])
    assert flat[-1] == "(layers below 1 level of names are added up)"
    assert "added up" not in deep[-1]


@pytest.mark.parametrize(("number", "text"), [
    (0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (1000, "1.00 kB"), (18816, "18.8 kB"), (999_499, "999 kB"),
    (999_500, "1.00 MB"), (1_849_688_064, "1.85 GB"), (3.46e12, "3.46 TB"), (7e15, "7000 TB"), (2.5, "2.50 B")])
def test_numbers_have_three_digits(number, text):
    assert human(number, "B") == text
    assert human(number) == text[:-1].rstrip()


@pytest.mark.parametrize("name", ["cnn3d", "densenet161", "googlenet", "resnet50", "vgg11"])
def test_tables_fit_100_columns(name):
    net = models.create(name, 1, 10, (64,) * 3, rng=Zeros(np.random.PCG64(0)))
    for depth in (1, None):
        assert max(map(len, summarize(net, (1, 64, 64, 64)).table(depth).splitlines())) <= 100
    assert max(map(len, str(find_bottlenecks(net, (1, 64, 64, 64))).splitlines())) <= 100


def test_bottlenecks_of_inception():
    """The two 5x5 convolutions that courses work out, and the module without reductions."""
    kind = {"rng": 0}
    for channels, reduced, full, size, direct, through in ((192, 16, 32, 28, 120_422_400, 12_443_648),
                                                           (480, 16, 48, 14, 112_896_000, 5_268_480)):
        module = blocks.inception(channels, 64, (96, 128), (reduced, full), 32, **kind)
        small, large = find_bottlenecks(module, (channels, size, size)).items
        assert (small.name, small.kernel, small.channels) == ("branch2.1", "3²", (channels, 96, 128))
        assert (large.name, large.kernel, large.channels) == ("branch3.1", "5²", (channels, reduced, full))
        assert (large.macs, large.direct_macs) == (through, direct)
        assert large.direct_parameters == channels * full * 25 + full

    naive = blocks.naive_inception(192, 64, 128, 32, **kind)
    projection = 192 * 32 * 28 * 28  # behind the pool; the naive module has none
    shape = (192, 28, 28)
    found = find_bottlenecks(blocks.inception(192, 64, (96, 128), (16, 32), 32, **kind), shape)
    assert found.direct_macs == summarize(naive, shape).macs + projection
    assert found.direct_parameters == naive.num_parameters() + 192 * 32 + 32
    assert find_bottlenecks(naive, shape).items == ()
    assert "no 1x1" in str(find_bottlenecks(naive, shape))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("residual", [True, False])
def test_bottlenecks_of_resnet(ndim, residual):
    """Without reductions ResNet-50 is made of basic blocks of the same channels."""
    size = (16,) * ndim

    def basic_macs(block, before, after, stride):
        net = block(before, after, stride, ndim=ndim, residual=residual, rng=0)
        return sum(row.macs for row in summarize(net, (before, *size)).rows if "downsample" not in row.name)

    for before, inside, stride in ((256, 64, 1), (64, 32, 2)):
        net = blocks.bottleneck(before, inside, stride, ndim=ndim, residual=residual, rng=0)
        (item,) = find_bottlenecks(net, (before, *size)).items
        assert item.channels == (before, inside, inside, 4 * inside)
        assert item.direct_macs == basic_macs(blocks.basic_block, before, 4 * inside, stride)
        conv = [row for row in summarize(net, (before, *size)).rows if row.macs and "downsample" not in row.name]
        assert item.macs == sum(row.macs for row in conv)
    assert len(find_bottlenecks(models.resnet50(width=1 / 16, ndim=ndim, residual=residual, rng=0),
                                (3, *(32,) * ndim)).items) == 16


def test_what_is_no_bottleneck():
    conv = nn.Conv2d
    for net in (models.resnet_small(8, 8, rng=0),  # the 1x1 shortcut is beside the 3x3
                nn.Sequential(conv(8, 2, 1), nn.MaxPool2d(2), conv(2, 8, 3)),
                nn.Sequential(conv(8, 2, 1, groups=2), conv(2, 8, 3)),
                nn.Sequential(conv(8, 2, 3), conv(2, 8, 1)),
                nn.Concat(conv(8, 2, 1), conv(8, 8, 3, padding=1))):
        assert find_bottlenecks(net, (8, 8, 8)).items == ()


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
