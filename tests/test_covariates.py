"""Networks that take a table beside the images."""

import numpy as np
import pytest

import fastconv
from fastconv import models, nn
from fastconv.models import WithCovariates
from fastconv.training.optim import AdamW


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
