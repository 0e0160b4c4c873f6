"""LeNet-5: the numbers of the paper, any number of axes, and that it learns."""

import numpy as np
import pytest

from fastconv import nn
from fastconv.models import lenet5
from fastconv.models.lenet import C3_INPUTS, ScaledTanh, digit_codes
from fastconv.training.optim import Adam


def counts(net):
    return {name: child.num_parameters() for name, child in net.children() if child.num_parameters()}


@pytest.mark.parametrize("size", [(28, 28), (32, 32)])
def test_parameters_of_the_modern_form(size):
    net = lenet5(input_size=size)
    assert counts(net) == {"c1": 156, "c3": 2416, "c5": 48120, "f6": 10164, "output": 850}
    assert net.num_parameters() == 61706


@pytest.mark.parametrize("size", [(28, 28), (32, 32)])
def test_parameters_of_the_paper(size):
    net = lenet5(input_size=size, variant="paper")
    assert counts(net) == {"c1": 156, "s2": 12, "c3": 1516, "s4": 32, "c5": 48120, "f6": 10164}
    assert net.num_parameters() == 60000


@pytest.mark.parametrize("variant", ["modern", "paper"])
def test_sizes_of_the_maps(variant):
    x = np.zeros((2, 1, 32, 32), np.float32)
    shapes = {}
    for name, layer in lenet5(input_size=(32, 32), variant=variant).children():
        x = layer(x)
        shapes[name] = x.shape[1:]
    assert shapes["c1"] == (6, 28, 28)
    assert shapes["s2"] == (6, 14, 14)
    assert shapes["c3"] == (16, 10, 10)
    assert shapes["s4"] == (16, 5, 5)
    assert np.prod(shapes["c5"]) == 120
    assert shapes["f6"] == (84,)
    assert shapes["output"] == (10,)


def test_connections_of_c3():
    """The prose of the paper on table I: groups of contiguous, of 3, 4, and all maps; 10 of 16 per input map."""
    assert [len(maps) for maps in C3_INPUTS] == [3] * 6 + [4] * 9 + [6]
    assert len(set(C3_INPUTS)) == 16
    assert [sum(source in maps for maps in C3_INPUTS) for source in range(6)] == [10] * 6
    for start, maps in enumerate(C3_INPUTS[:6]):
        assert set(maps) == {(start + i) % 6 for i in range(3)}
    for start, maps in enumerate(C3_INPUTS[6:12]):
        assert set(maps) == {(start + i) % 6 for i in range(4)}


def test_squashing():
    y = ScaledTanh()(np.array([-1.0, 0, 1, 100]))
    np.testing.assert_allclose(y, [-1, 0, 1, 1.7159], atol=1e-4)


def test_codes_are_different_pictures():
    codes = digit_codes(10, np.random.default_rng(0))
    assert codes.shape == (10, 84)
    assert set(np.unique(codes)) == {-1, 1}
    different = (codes[:, None] != codes).sum(-1)
    assert different[~np.eye(10, dtype=bool)].min() >= 8
    assert digit_codes(4, np.random.default_rng(0)).shape == (4, 84)


@pytest.mark.parametrize("variant", ["modern", "paper"])
@pytest.mark.parametrize("size", [(12,), (40,), (16, 16), (28, 36), (12, 14, 16)])
def test_any_size_and_number_of_axes(size, variant):
    net = lenet5(2, 7, size, variant, rng=0)
    x = np.random.default_rng(0).standard_normal((3, 2, *size)).astype(np.float32)
    logits, backward = net.forward(x)
    assert logits.shape == (3, 7)
    assert logits.dtype == np.float32
    assert backward(np.ones_like(logits)).shape == x.shape
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("variant", ["modern", "paper"])
def test_learns(variant):
    """Four classes of stripes in noise: nearly all of unseen samples right after 40 small steps."""
    rng = np.random.default_rng(0)
    patterns = np.stack([np.sin(np.arange(16) * f)[:, None] * np.ones(16) for f in (0.5, 1.5)])
    patterns = np.concatenate([patterns, patterns.transpose(0, 2, 1)])

    def batch(n):
        labels = rng.integers(0, 4, n)
        return (patterns[labels] + 0.5 * rng.standard_normal((n, 16, 16)))[:, None].astype(np.float32), labels

    net = lenet5(1, 4, (16, 16), variant, rng=0)
    optimizer = Adam(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(40):
        x, labels = batch(16)
        logits, backward = net.forward(x)
        loss, dlogits = nn.cross_entropy(logits, labels)
        backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    x, labels = batch(100)
    assert np.mean(losses[-5:]) < losses[0] / 3
    assert (net(x).argmax(1) == labels).mean() > 0.95


@pytest.mark.parametrize("variant", ["modern", "paper"])
def test_frozen_layers_have_no_gradient(variant):
    net = lenet5(input_size=(12,), variant=variant, rng=0).requires_grad_(False)
    net["f6"].requires_grad_(True)
    logits, backward = net.forward(np.ones((2, 1, 12), np.float32))
    backward(np.ones_like(logits))
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {"f6.weight", "f6.bias"}


def test_seeds():
    x = np.ones((1, 1, 28, 28), np.float32)
    np.testing.assert_array_equal(lenet5(rng=0)(x), lenet5(rng=0)(x))
    assert not np.array_equal(lenet5(rng=0)(x), lenet5(rng=1)(x))


@pytest.mark.parametrize(("options", "message"), [
    ({"input_size": (8, 8)}, r"input_size is \(8, 8\), but after C1, S2, C3 and S4"),
    ({"input_size": ()}, "1 to 3 spatial sizes"),
    ({"input_size": (9, 9, 9, 9)}, "1 to 3 spatial sizes"),
    ({"variant": "1998"}, "variant is '1998'"),
])
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        lenet5(**options)
    assert "Hint: " in str(caught.value)
