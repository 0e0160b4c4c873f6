"""Augmentation of batches of images and volumes: random changes that leave the class as it is.

Every function takes images (B, C, *spatial) in 1D, 2D or 3D and a generator, and returns new ones of the same shape,
dtype and memory order; each image is changed in its own way, all its channels alike. Nothing else is remembered: the
same generator state gives the same bits. In training they see normalised images (mean 0, standard deviation 1), so that
strengths of `noise` and `offset` are in standard deviations.

``fastconv train --augment flip rotate=20`` names rows of `AUGMENTATIONS`; `parse` reads such words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from fastconv.training.data import Augment

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "affine",
    "flip",
    "gain",
    "gamma",
    "mirror",
    "noise",
    "offset",
    "parse",
    "rotate",
    "scale",
    "shift",
]


def flip(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror each image (B, C, *spatial) along each spatial axis with probability 1/2."""
    return _flip(x, rng, range(2, x.ndim))


def mirror(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror each image (B, C, *spatial) along its last axis, left to right, with probability 1/2."""
    return _flip(x, rng, [x.ndim - 1])


def _flip(x: np.ndarray, rng: np.random.Generator, axes: Iterable[int]) -> np.ndarray:
    x = x.copy(order="K")
    for axis in axes:
        chosen = rng.random(len(x)) < 0.5
        x[chosen] = np.flip(x[chosen], axis=axis)
    return x


def shift(x: np.ndarray, rng: np.random.Generator, fraction: float = 1 / 14) -> np.ndarray:
    """Move each image (B, C, *spatial) by whole pixels, at most `fraction` of its size, at least up to 1, on each axis.

    The border pixel is repeated into the space that opens, so that no edge appears in an image whose
    background is not zero.
    """
    moved = np.moveaxis(x, 1, -1)  # indexing gives C order, and batches have their channels last
    for axis in range(1, x.ndim - 1):
        size = moved.shape[axis]
        # Slightly more, so that 1/14 of 28 cannot be rounded to below 2.
        reach = max(1, math.floor(size * fraction + 1e-9))
        distance = rng.integers(-reach, reach + 1, size=(len(x), 1))
        index = np.clip(np.arange(size) + distance, 0, size - 1)
        shape = [len(x)] + [1] * (x.ndim - 1)
        shape[axis] = size
        moved = np.take_along_axis(moved, index.reshape(shape), axis=axis)
    return np.moveaxis(moved, -1, 1)


def rotate(x: np.ndarray, rng: np.random.Generator, degrees: float = 15.0) -> np.ndarray:
    """Turn each image about its centre by up to `degrees`, either way; in 3D about each axis. See `affine`."""
    return affine(x, rng, degrees=degrees, factor=0.0)


def scale(x: np.ndarray, rng: np.random.Generator, factor: float = 0.1) -> np.ndarray:
    """Enlarge each image by a factor between ``1 / (1 + factor)`` and ``1 + factor``, log-uniform. See `affine`."""
    return affine(x, rng, degrees=0.0, factor=factor)


def affine(x: np.ndarray, rng: np.random.Generator, degrees: float = 15.0, factor: float = 0.1) -> np.ndarray:
    """Rotate and scale each image about its centre with one linear interpolation, which blurs less than two.

    Parameters
    ----------
    x : ndarray
        Shape (B, C, \\*spatial), with two or three spatial axes (one without rotation); pixels are squares or cubes.
    rng : Generator
        Draws angles and factors.
    degrees : float
        Largest angle; in 3D of each of the rotations about the first, second and third axis, done in this order.
    factor : float
        Images are enlarged by ``(1 + factor)**u``, u uniform in [-1, 1].

    Returns
    -------
    ndarray
        As `x`. What lies outside is the nearest pixel of the border.

    Raises
    ------
    ImportError
        SciPy is missing: ``pip install "fastconv[augment]"``.
    ValueError
        There is nothing to rotate in 1D.
    """
    ndim, ndimage = x.ndim - 2, _ndimage()
    if ndim < 2 and degrees:
        raise ValueError(f"affine: x has shape {x.shape}, with {ndim} spatial axis, but a rotation needs 2 or 3 "
                         f"({degrees:g} degrees are given). Hint: scale or shift")
    planes = [(a, b) for a in range(ndim) for b in range(a + 1, ndim)][::-1]  # of the rotations about axis 0, 1, 2
    angles = rng.uniform(-math.radians(degrees), math.radians(degrees), (len(x), len(planes)))
    factors = (1 + factor) ** rng.uniform(-1, 1, len(x))
    centre = (np.array(x.shape[2:]) - 1) / 2
    y = np.empty_like(x)
    for image, turned, angle, enlarge in zip(x, y, angles, factors, strict=True):
        # From the place in the result to that in the image: the inverse of what is done to the image.
        matrix = np.eye(ndim) / enlarge
        for (a, b), theta in zip(planes, angle, strict=True):
            turn = np.eye(ndim)
            turn[[a, b], [a, b]], turn[a, b], turn[b, a] = math.cos(theta), math.sin(theta), -math.sin(theta)
            matrix = matrix @ turn
        for channel, result in zip(image, turned, strict=True):
            result[...] = ndimage.affine_transform(channel, matrix, centre - matrix @ centre, order=1, mode="nearest")
    return y


def gain(x: np.ndarray, rng: np.random.Generator, strength: float = 0.2) -> np.ndarray:
    """Multiply each image (B, C, *spatial) by a number in [1 - strength, 1 + strength]: contrast."""
    return x * _per_image(x, rng.uniform(1 - strength, 1 + strength, len(x)))


def offset(x: np.ndarray, rng: np.random.Generator, strength: float = 0.2) -> np.ndarray:
    """Add a number in [-strength, strength] to each image (B, C, *spatial): brightness."""
    return x + _per_image(x, rng.uniform(-strength, strength, len(x)))


def noise(x: np.ndarray, rng: np.random.Generator, strength: float = 0.1) -> np.ndarray:
    """Add normal noise to each image (B, C, *spatial), of a standard deviation in [0, strength]."""
    deviation = _per_image(x, rng.uniform(0, strength, len(x)))
    y = x.copy(order="K")
    y += deviation * rng.standard_normal(x.shape, dtype=np.float32)
    return y


def gamma(x: np.ndarray, rng: np.random.Generator, strength: float = 0.3) -> np.ndarray:
    """Bend the intensities of each image (B, C, *spatial) within its own range: ``low + (high - low) * t**g``.

    t is the intensity in units of that range and g between ``1 / (1 + strength)`` and ``1 + strength``, log-uniform.
    """
    axes = tuple(range(1, x.ndim))
    low, high = x.min(axis=axes, keepdims=True), x.max(axis=axes, keepdims=True)
    extent = np.where(high > low, high - low, x.dtype.type(1))  # a constant image stays as it is
    exponent = _per_image(x, (1 + strength) ** rng.uniform(-1, 1, len(x)))
    return low + extent * ((x - low) / extent) ** exponent


def _per_image(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return values.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError('rotation and scaling need SciPy. Hint: pip install "fastconv[augment]"') from error
    return ndimage


class Augmentation(NamedTuple):
    """A row of `AUGMENTATIONS`."""

    apply: Callable[..., np.ndarray]
    """``apply(x, rng)`` or ``apply(x, rng, strength)``."""
    strength: float | None
    """What it is unless another is given; None if there is none to give."""
    limit: float = math.inf
    """The strength must be below."""
    scipy: bool = False
    """Whether SciPy is needed."""


AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": Augmentation(flip, None),
    "mirror": Augmentation(mirror, None),
    "shift": Augmentation(shift, 1 / 14, 1),
    "rotate": Augmentation(rotate, 15, 181, scipy=True),
    "scale": Augmentation(scale, 0.1, scipy=True),
    "gain": Augmentation(gain, 0.2, 1),
    "offset": Augmentation(offset, 0.2),
    "noise": Augmentation(noise, 0.1),
    "gamma": Augmentation(gamma, 0.3),
}
"""Every augmentation by the name that the command line knows."""


def parse(words: Iterable[str]) -> Augment:
    """Return the augmentation that applies all those that are named, in this order.

    Parameters
    ----------
    words : iterable of str
        Names of `AUGMENTATIONS`, each alone or with a strength: ``"flip"``, ``"rotate=20"``.

    Raises
    ------
    ValueError
        There is no such name, or it takes no such strength.
    ImportError
        SciPy is needed and missing.
    """
    steps = [_parse(word) for word in words]

    def augment(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for apply, arguments in steps:
            x = apply(x, rng, *arguments)
        return x

    return augment


def _parse(word: str) -> tuple[Callable[..., np.ndarray], tuple[float, ...]]:
    name, equals, text = word.partition("=")
    row = AUGMENTATIONS.get(name)
    if row is None:
        raise ValueError(f"augment: {word!r} is given, but one of {', '.join(AUGMENTATIONS)} is needed. "
                         "Hint: a strength may follow, such as rotate=20")
    if row.scipy:
        _ndimage()
    if not equals:
        return row.apply, ()
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if row.strength is None or not 0 <= strength < row.limit:
        rule = ("takes no strength" if row.strength is None
                else f"takes a number of at least 0{f' and below {row.limit:g}' * (row.limit < math.inf)}")
        hint = name if row.strength is None else f"{name}={row.strength:.3g}"
        raise ValueError(f"augment: {word!r} is given, but {name} {rule}. Hint: {hint}")
    return row.apply, (strength,)
