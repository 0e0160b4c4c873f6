"""What the tests of training share: a small problem, a small network, files, comparison of states bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastconv import nn
from fastconv.training import data


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def images(count: int, *size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def labels(count: int, classes: int = 2) -> np.ndarray:
    return (np.arange(count) % classes).astype(np.uint8)


def striped(count: int, size: int = 12, seed: int = 0) -> data.Split:
    """Noisy stripes: across for class 0, down for class 1."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 2, count)
    wave = 60 * np.sin(np.arange(size) * 1.5 + rng.uniform(0, 6, (count, 1)))
    stripes = np.where(classes[:, None, None], wave[:, None, :], wave[:, :, None])
    noisy = 128 + stripes + rng.normal(0, 30, (count, size, size))
    return data.Split(np.clip(noisy, 0, 255).astype(np.uint8)[:, None], classes)


def small_net(dropout: float = 0.0, seed: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, rng=seed), nn.ReLU(), nn.MaxPool2d(5), nn.Flatten(),
        nn.Dropout(dropout, rng=seed), nn.Dropout(dropout), nn.Linear(16, 2, rng=seed),
    )  # fmt: skip


def without_times(state: dict) -> dict:
    for record in state["history"]:
        del record["seconds"]
    return state


def assert_same_bits(a: object, b: object, path: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{path}/{i}")
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path
    else:
        assert a == b, path
