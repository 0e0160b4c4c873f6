"""Blocks: values by a NumPy reference, gradients by difference quotients, in 2D and 3D and both memory orders."""

import tracemalloc

import numpy as np
import pytest
from numpy_nets import Reference
from tolerance import assert_close

import fastconv
from fastconv.arrays import memory_order, to_channels_last
from fastconv.nn import BATCH_NORM, Dropout, blocks

SIZES = {2: (7, 6), 3: (5, 4, 6)}
AUXILIARY_SIZES = {2: (14, 15), 3: (14, 14, 15)}


def kind(ndim):
    return {"ndim": ndim, "dtype": np.float64, "rng": 0}


# Name of the case: (block of 4 channels, by formula); the bottleneck without projection has 8.
BLOCKS = {
    "basic": (lambda k: blocks.basic_block(4, 4, **k), lambda r, x: r.residual("", x, 2)),
    "basic, projection": (lambda k: blocks.basic_block(4, 6, 2, **k), lambda r, x: r.residual("", x, 2, 2)),
    "basic, plain": (lambda k: blocks.basic_block(4, 6, 2, residual=False, **k),
                     lambda r, x: r.residual("", x, 2, 2, residual=False)),
    "bottleneck": (lambda k: blocks.bottleneck(8, 2, **k), lambda r, x: r.residual("", x, 3)),
    "bottleneck, projection": (lambda k: blocks.bottleneck(4, 2, 2, **k), lambda r, x: r.residual("", x, 3, 2)),
    "bottleneck, paper": (lambda k: blocks.bottleneck(4, 2, 2, variant="paper", **k),
                          lambda r, x: r.residual("", x, 3, 2, paper=True)),
    "basic, padding": (lambda k: blocks.basic_block(4, 6, 2, shortcut="padding", **k),
                       lambda r, x: r.residual("", x, 2, 2, paper=True)),
    "dense layer": (lambda k: blocks.DenseLayer(4, 3, expansion=2, **k), lambda r, x: r.dense_layer("", x)),
    "dense block": (lambda k: blocks.DenseBlock(4, 3, 2, expansion=2, **k), lambda r, x: r.dense_block("", x)),
    "dense block, one layer": (lambda k: blocks.DenseBlock(4, 1, 2, **k), lambda r, x: r.dense_block("", x)),
    "transition": (lambda k: blocks.transition(4, 2, **k), lambda r, x: r.transition("", x)),
    "inception": (lambda k: blocks.inception(4, 2, (3, 2), (1, 3), 2, **k), lambda r, x: r.inception("", x)),
    "inception, torchvision": (lambda k: blocks.inception(4, 2, (3, 2), (1, 3), 2, variant="torchvision", **k),
                               lambda r, x: r.inception("", x)),
    "inception, naive": (lambda k: blocks.naive_inception(4, 2, 3, 1, **k), lambda r, x: r.naive_inception("", x)),
    "mlpconv": (lambda k: blocks.mlpconv(4, (3, 5, 2), 3, stride=2, padding=1, **k),
                lambda r, x: r.mlpconv("", x, 2, 1)),
    "auxiliary, torchvision": (
        lambda k: blocks.auxiliary_classifier(4, 3, width=1 / 64, variant="torchvision", **k),
        lambda r, x: r.auxiliary("", x)),
    "auxiliary": (lambda k: blocks.auxiliary_classifier(4, 3, width=1 / 64, **k), lambda r, x: r.auxiliary("", x)),
}


def make(name, ndim):
    """The block with trained-looking normalisations, and an input."""
    block = BLOCKS[name][0](kind(ndim))
    rng = np.random.default_rng(1)
    for key, item in [*block.named_parameters(), *block.named_buffers()]:
        if len(item.shape) == 1:
            item.assign(rng.uniform(0.5, 1.5, item.shape) if key.endswith(("weight", "var"))
                        else rng.uniform(-0.5, 0.5, item.shape))
    for _, layer in block.named_layers():
        if isinstance(layer, Dropout):
            layer.p = 0.0
    size = AUXILIARY_SIZES if name == "auxiliary" else SIZES
    return block, rng.standard_normal((2, 8 if name == "bottleneck" else 4, *size[ndim]))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_values_by_the_numpy_reference(name, ndim):
    block, x = make(name, ndim)
    expected = BLOCKS[name][1](Reference(block.state_dict()), x)
    # four sums of up to 5**3 * 4 products after each other
    assert_close(block.forward(x)[0], expected, 4**2 * 500)
    y, backward = block.forward(to_channels_last(x))
    assert_close(y, expected, 4**2 * 500)
    assert memory_order(backward(y)) == "channels_last"
    if expected.ndim > 2:
        assert memory_order(y) == "channels_last"


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_by_difference_quotients(name, ndim):
    block, x = make(name, ndim)
    if name == "auxiliary":
        x = x[:1]
    fastconv.gradcheck(block, x, max_entries=60, directions=3)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", [n for n in BLOCKS if not n.startswith("auxiliary")])
def test_inference_is_training_with_the_running_statistics(name, ndim):
    block = BLOCKS[name][0](kind(ndim))
    for _, layer in block.named_layers():
        if isinstance(layer, tuple(BATCH_NORM.values())):
            layer.momentum = 1.0
    size = {1: (400,), 2: (21, 20), 3: (9, 10, 10)}[ndim]
    x = np.random.default_rng(2).standard_normal((2, 8 if name == "bottleneck" else 4, *size))
    y = block.forward(x)[0]
    # The running variance is the unbiased one: of at least 200 values, three times in a block, that is under 1 %.
    assert np.abs(block(x) - y).max() < 0.01 * np.abs(y).max()
    assert np.abs(block(x) - y).max() < 1e-12 or any("running" in key for key in block.state_dict())


def test_names_are_those_of_torchvision():
    names = set(blocks.bottleneck(4, 2, 2, **kind(2)).state_dict())
    assert {"conv3.weight", "bn3.running_var", "downsample.0.weight", "downsample.1.num_batches_tracked"} <= names
    names = set(blocks.DenseBlock(4, 2, 2, **kind(2)).state_dict())
    assert {"denselayer2.norm1.weight", "denselayer2.conv2.weight"} <= names
    names = set(blocks.inception(4, 2, (3, 2), (1, 3), 2, variant="torchvision", **kind(2)).state_dict())
    assert {"branch1.conv.weight", "branch3.1.bn.bias", "branch4.1.conv.weight"} <= names


# ---- dense blocks: one buffer ----------------------------------------------------------------------------------------


def address(x):
    return x.__array_interface__["data"][0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_dense_blocks_move_no_byte_for_concatenation(ndim, order, training, monkeypatch):
    """Every layer reads the buffer in place and writes its slice of it; the entry's pool writes the first one."""
    kit = blocks.Kit(ndim)
    block = blocks.DenseBlock(4, 3, 2, entry=kit.max_pool(3, 2, padding=1), ndim=ndim, rng=0)
    seen = []

    def spy(cls, method):
        original = getattr(cls, method)

        def wrapped(self, x, out=None):
            seen.append((x, out))
            return original(self, x, out)

        monkeypatch.setattr(cls, method, wrapped)

    method = "forward" if training else "__call__"
    spy(blocks.DenseLayer, method)
    spy(type(block.entry), method)
    x = np.random.default_rng(0).standard_normal((2, 4, 9, 8, 7)[:ndim + 2]).astype(np.float32)
    x = to_channels_last(x) if order == "channels_last" else x
    y = block.forward(x)[0] if training else block(x)
    assert y.shape[1] == 10
    assert memory_order(y) == order
    (given, first), *layers = seen
    assert given is x
    assert (address(first), first.shape[1]) == (address(y), 4)
    assert len(layers) == 3
    for (read, written), channels in zip(layers, (4, 6, 8), strict=True):
        assert (address(read), read.shape[1], read.strides) == (address(y), channels, y.strides)
        assert (address(written), written.shape[1]) == (address(y) + channels * y.strides[1], 2)
        assert written.strides == y.strides


def test_dense_blocks_need_their_output_and_two_temporaries():
    """Block 3 of DenseNet-121, whose 24 concatenations would write 15 times its output."""
    block = blocks.DenseBlock(256, 24, 32, rng=0)
    x = np.random.default_rng(0).standard_normal((1, 256, 14, 14)).astype(np.float32)
    fastconv.release_memory()  # what other tests have left lies idle in blocks up to twice as large
    block(x)  # packs the weights
    tracemalloc.start()
    y = block(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    normalised = y.nbytes * (1024 - 32) // 1024  # and once more behind the ReLU
    assert peak < y.nbytes + 2 * normalised + 2**16


def test_gradients_of_dense_blocks_are_added_up_in_one_buffer(monkeypatch):
    """The gradient of every layer's output is a slice of one array, the first that a layer returned."""
    block = blocks.DenseBlock(4, 4, 2, rng=0, dtype=np.float64)
    gradients = []
    original = blocks.DenseLayer.forward

    def forward(self, x, out=None):
        y, backward = original(self, x, out)

        def spy(dy):
            dx = backward(dy)
            gradients.append((dy, dx))
            return dx

        return y, spy

    monkeypatch.setattr(blocks.DenseLayer, "forward", forward)
    y, backward = block.forward(np.random.default_rng(0).standard_normal((2, 4, 6, 5)))
    dy = np.ones_like(y)
    dx = backward(dy)
    np.testing.assert_array_equal(dy, 1)  # the caller's
    (last, total), *others = gradients
    assert np.shares_memory(last, dy)
    for (read, _), lo in zip(others, (8, 6, 4), strict=True):
        assert address(read) == address(total) + lo * total.strides[1]
    assert address(dx) == address(total)


def test_entry_pool_is_the_pool_before_the_block():
    kit = blocks.Kit(2, np.float64)
    for pool in (kit.max_pool(3, 2, padding=1), kit.avg_pool(2, 2)):
        inside = blocks.DenseBlock(4, 2, 3, entry=pool, **kind(2))
        outside = blocks.DenseBlock(4, 2, 3, **kind(2))
        x = np.random.default_rng(0).standard_normal((2, 4, 8, 9))
        np.testing.assert_array_equal(inside(x), outside(pool(x)))
        y, backward = inside.forward(x)
        pooled, pool_backward = pool.forward(x)
        expected, outside_backward = outside.forward(pooled)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(backward(y), pool_backward(outside_backward(y)))


def test_dropout_of_dense_layers_drops_their_share():
    layer = blocks.DenseLayer(4, 50, dropout=0.3, rng=0)
    x = np.random.default_rng(0).standard_normal((4, 4, 8, 8)).astype(np.float32)
    out = np.full((4, 50, 8, 8), np.nan, np.float32)
    y, backward = layer.forward(x, out)
    assert y is out
    assert abs(np.mean(y == 0) - 0.3) < 0.02
    assert np.all(backward(np.ones_like(y)) != 0)
    assert np.all(layer(x) != 0)
    fastconv.gradcheck(blocks.DenseLayer(2, 2, dropout=0.5, **kind(2)), np.random.default_rng(1).standard_normal(
        (2, 2, 4, 4)))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: blocks.DenseBlock(4, 0, 2), "num_layers is 0"),
    (lambda: blocks.DenseBlock(4, 2, 2)(np.zeros((1, 3, 4, 4))), r"\(1, 3, 4, 4\), but \(N, 4, \*spatial\)"),
    (lambda: blocks.basic_block(4, 4, ndim=0), "ndim is 0"),
    (lambda: blocks.inception(4, 1, (1, 1), (1, 1), 1, variant="v3"), "variant is 'v3'"),
    (lambda: blocks.auxiliary_classifier(4, 3, variant="v3"), "variant is 'v3'"),
])
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
