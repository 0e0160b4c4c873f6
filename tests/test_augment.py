"""Augmentation: what may change, what must not, and the words that name it."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from fastconv.training import augment

pytest.importorskip("scipy")


@pytest.mark.parametrize("size", [(28,), (28, 28), (14, 15, 16)])
def test_shift_moves_by_at_most_a_fourteenth(size):
    centre = tuple(n // 2 for n in size)
    x = np.zeros((200, 1, *size), np.float32)
    x[(slice(None), 0, *centre)] = 1
    y = augment.shift(x, np.random.default_rng(0))
    assert (y.reshape(200, -1).sum(axis=1) == 1).all()
    places = np.argwhere(y)[:, 2:] - centre
    for offsets, n in zip(places.T, size, strict=True):
        reach = max(1, n // 14)
        assert set(offsets) == set(range(-reach, reach + 1))


def test_shift_repeats_the_border():
    x = np.full((50, 2, 28, 28), 3, np.float32)
    np.testing.assert_array_equal(augment.shift(x, np.random.default_rng(0)), x)


def test_flip_gives_all_mirror_images_and_leaves_its_input():
    x = np.tile(np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3), (64, 1, 1, 1))
    y = augment.flip(x, np.random.default_rng(0))
    image = x[0, 0].copy()
    wanted = {image[::a, ::b].tobytes() for a, b in itertools.product((1, -1), (1, -1))}
    assert {picture.tobytes() for picture in y[:, 0]} == wanted
    assert (x == image).all()


def test_mirror_turns_the_last_axis_alone():
    x = np.tile(np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3), (64, 1, 1, 1))
    found = {picture.tobytes() for picture in augment.mirror(x, np.random.default_rng(0))[:, 0]}
    assert found == {x[0, 0].tobytes(), x[0, 0, :, ::-1].tobytes()}


def plane(ndim: int, count: int, size: int = 21) -> tuple[np.ndarray, np.ndarray]:
    """Images whose two channels rise linearly, and the slope per axis of the first; the second is twice as steep."""
    slope = np.array([3.0, 1.0, -2.0])[:ndim]
    line = sum(a * (axis - size // 2) for a, axis in zip(slope, np.indices((size,) * ndim), strict=True))
    return np.tile(np.stack([line, 2 * line]).astype(np.float32), (count, 1, *(1,) * ndim)), slope


def slopes(y: np.ndarray) -> np.ndarray:
    """(B, C, ndim): differences across the centre, which linear interpolation keeps exactly."""
    ndim, middle = y.ndim - 2, y.shape[-1] // 2
    at = np.full(ndim, middle)
    steps = np.eye(ndim, dtype=int) * 2
    return np.stack([y[(..., *(at + e))] - y[(..., *(at - e))] for e in steps], axis=-1) / 4


@pytest.mark.parametrize("ndim", [2, 3])
def test_rotation_turns_slopes_and_keeps_their_length(ndim):
    x, slope = plane(ndim, 60)
    y = augment.rotate(x, np.random.default_rng(0), 30)
    turned = slopes(y)
    np.testing.assert_allclose(np.linalg.norm(turned[:, 0], axis=-1), np.linalg.norm(slope), rtol=1e-5)
    np.testing.assert_allclose(turned[:, 1], 2 * turned[:, 0], rtol=1e-4, atol=1e-4)  # channels move together
    np.testing.assert_allclose(y[(..., *(10,) * ndim)], 0, atol=1e-5)  # the centre stays
    angle = np.degrees(np.arccos(np.clip(turned[:, 0] @ slope / np.dot(slope, slope), -1, 1)))
    assert angle.max() <= 30 * (1 if ndim == 2 else 3)
    assert angle.max() > 24
    if ndim == 2:  # both ways, evenly
        side = np.sign(turned[:, 0, 0] * slope[1] - turned[:, 0, 1] * slope[0])
        assert 15 < (side > 0).sum() < 45
    np.testing.assert_array_equal(augment.rotate(x, np.random.default_rng(0), 0), x)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_scale_divides_slopes(ndim):
    x, slope = plane(ndim, 60)
    enlarged = slope / slopes(augment.scale(x, np.random.default_rng(0), 0.25))[:, 0]
    np.testing.assert_allclose(enlarged, enlarged[:, :1].repeat(ndim, 1), rtol=1e-5)  # alike along all axes
    assert enlarged.min() >= 1 / 1.25 - 1e-5
    assert enlarged.max() <= 1.25 + 1e-5
    assert enlarged.min() < 0.85
    assert enlarged.max() > 1.18
    assert 20 < (enlarged[:, 0] > 1).sum() < 40


def test_rotation_repeats_the_border_and_needs_two_axes():
    x = np.full((20, 1, 9, 9), 3, np.float32)
    np.testing.assert_allclose(augment.affine(x, np.random.default_rng(0), 45, 0.5), x)
    with pytest.raises(ValueError, match=r"affine: x has shape \(2, 1, 9\).* needs 2 or 3"):
        augment.rotate(np.zeros((2, 1, 9), np.float32), np.random.default_rng(0))


BATCH = np.random.default_rng(7).standard_normal((400, 2, 6, 5)).astype(np.float32)


def test_gain_is_one_factor_for_an_image():
    ratio = augment.gain(BATCH, np.random.default_rng(0), 0.3) / BATCH
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], ratio.shape), rtol=1e-5)
    assert (ratio.min(), ratio.max()) == pytest.approx((0.7, 1.3), abs=0.02)


def test_offset_is_one_number_for_an_image():
    step = augment.offset(BATCH, np.random.default_rng(0), 0.3) - BATCH
    np.testing.assert_allclose(step, np.broadcast_to(step[:, :1, :1, :1], step.shape), atol=1e-5)
    assert (step.min(), step.max()) == pytest.approx((-0.3, 0.3), abs=0.02)


def test_noise_has_mean_zero_and_its_deviation():
    step = augment.noise(BATCH, np.random.default_rng(0), 0.5) - BATCH
    # Deviations d are uniform in [0, 0.5]: the mean of d**2 is 0.5**2 / 3, and 400 of them know it within 4.5 %.
    assert step.mean() == pytest.approx(0, abs=0.01)
    assert np.square(step).mean() == pytest.approx(0.25 / 3, rel=0.13)
    each = step.reshape(400, -1).std(axis=1)
    assert each.min() < 0.05 < 0.45 < each.max()


def test_gamma_bends_within_the_range():
    y = augment.gamma(BATCH, np.random.default_rng(0), 0.5)
    low, high = (getattr(BATCH, f)(axis=(1, 2, 3), keepdims=True) for f in ("min", "max"))
    np.testing.assert_allclose(y.min(axis=(1, 2, 3), keepdims=True), low, atol=1e-5)
    np.testing.assert_allclose(y.max(axis=(1, 2, 3), keepdims=True), high, atol=1e-5)
    before, after = ((z - low) / (high - low) for z in (BATCH, y))
    inside = (before > 0.2) & (before < 0.8)
    exponent = np.where(inside, np.log(np.where(inside, after, 1)) / np.log(np.where(inside, before, 0.5)), np.nan)
    assert np.nanmax(np.nanstd(exponent, axis=(1, 2, 3))) < 1e-4
    assert (np.nanmin(exponent), np.nanmax(exponent)) == pytest.approx((1 / 1.5, 1.5), abs=0.03)
    constant = np.full((3, 1, 4, 4), 2, np.float32)
    np.testing.assert_array_equal(augment.gamma(constant, np.random.default_rng(0)), constant)


@pytest.mark.parametrize(
    ("name", "spatial"),
    [
        (name, spatial)
        for name, spatial in itertools.product(augment.AUGMENTATIONS, [(12,), (12, 14), (8, 9, 10)])
        if name != "rotate" or len(spatial) > 1
    ],
)
def test_every_augmentation(name, spatial):
    """Same seed, same bits; another image each; dtype, shape and memory order kept; the input left alone."""
    one = np.random.default_rng(1).standard_normal((*spatial, 3)).astype(np.float32)
    x = np.moveaxis(np.tile(one, (16, *(1,) * (len(spatial) + 1))), -1, 1)  # channels last in memory, as batches are
    change, before = augment.parse([name]), x.copy()
    y, again, other = (change(x, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert y.tobytes() == again.tobytes() != other.tobytes()
    assert (y.dtype, y.shape, y.strides) == (x.dtype, x.shape, x.strides)
    assert len({image.tobytes() for image in y}) >= 2
    np.testing.assert_array_equal(x, before)


def test_words_are_applied_in_order_with_their_strengths():
    rng, other = np.random.default_rng(3), np.random.default_rng(3)
    y = augment.parse(["offset=2", "gain=0.5"])(BATCH, rng)
    expected = augment.gain(augment.offset(BATCH, other, 2), other, 0.5)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("spin", "'spin' is given, but one of flip, mirror, shift, "),
        ("flip=2", "'flip=2' is given, but flip takes no strength. Hint: flip"),
        ("rotate=far", "rotate takes a number of at least 0 and below 181. Hint: rotate=15"),
        ("noise=-1", "noise takes a number of at least 0. Hint: noise=0.1"),
        ("gain=1", "gain takes a number of at least 0 and below 1. Hint: gain=0.2"),
        ("scale=nan", "scale takes a number"),
    ],
)
def test_bad_words(word, message):
    with pytest.raises(ValueError, match=message):
        augment.parse([word])


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    augment.parse(["flip", "noise"])
    with pytest.raises(ImportError, match=r'pip install "fastconv\[augment\]"'):
        augment.parse(["rotate"])
