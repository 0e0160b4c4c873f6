"""The images that all networks of a comparison see."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from fastconv import demo
from fastconv.compare.networks import Size
from fastconv.resize import resize
from fastconv.training import Dataset, Normalise, Split, load_npz

__all__ = ["DIGITS", "DIGITS_SIZE", "Prepare", "balanced_order", "fingerprint", "load"]

DIGITS = "digits"
DIGITS_SIZE = (16, 16)
"""Scikit-learn's digits have 8x8 pixels; at 16x16 they survive the pools of the networks for small images."""
MOST_TEST, MOST_VAL = 2000, 500
"""Images beyond these would cost time and hardly narrow the intervals: 2000 leave 0.4 % around 99 %."""


def load(data: str, seed: int) -> Dataset:
    """Read scikit-learn's digits or an MNIST or MedMNIST file, with at most `MOST_TEST` and `MOST_VAL` images.

    Raises
    ------
    ImportError
        The digits are asked for, and scikit-learn is missing.
    OSError, ValueError
        See `load_npz`.
    """
    dataset = demo.digits(DIGITS_SIZE) if data == DIGITS else load_npz(data, seed=seed)
    assert dataset.val is not None
    return replace(dataset, val=_some(dataset.val, MOST_VAL, seed), test=_some(dataset.test, MOST_TEST, seed))


def _some(split: Split, most: int, seed: int) -> Split:
    if len(split) <= most:
        return split
    return split[np.sort(np.random.default_rng(seed).permutation(len(split))[:most])]


def balanced_order(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of labels (N,) whose first n entries hold the classes in equal numbers while there are any."""
    order = rng.permutation(len(labels))
    shuffled = labels[order]
    turn = np.empty(len(labels), np.int64)  # the how-manieth of its class each is
    for k in np.unique(labels):
        turn[shuffled == k] = np.arange(int((shuffled == k).sum()))
    return order[np.argsort(turn, kind="stable")]


@dataclass(frozen=True)
class Prepare:
    """Normalises a batch of images (B, C, \\*spatial) and enlarges it to `size`."""

    normalise: Normalise
    size: Size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        x = self.normalise(images)
        return x if x.shape[2:] == self.size else resize(x, self.size)


def fingerprint(dataset: Dataset) -> list[int]:
    """What a resumed comparison must find unchanged."""
    return [zlib.crc32(array.tobytes()) for part in (dataset.train, dataset.test)
            for array in (part.images, part.labels)]
