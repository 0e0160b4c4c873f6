"""Data sets in ``.npz`` files, batches, sampling and normalisation.

Images keep the dtype of the file (usually uint8, a quarter of float32) and become float32 one batch at
a time. Their shape is always (N, C, *spatial); channels that the file holds last stay last in memory. A
table with one row for each image (age, test scores, ...) goes along where there is one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Augment", "Dataset", "Input", "Normalise", "Split", "balanced_weights", "batches", "hold_out", "load_npz"]

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Input = np.ndarray | tuple[np.ndarray, np.ndarray]
"""What a network takes: images, or images and their rows of the table."""

# How the parts of a data set are called in the files that people have.
_LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "MNIST": {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")},
    "MedMNIST": {
        "train": ("train_images", "train_labels"),
        "val": ("val_images", "val_labels"),
        "test": ("test_images", "test_labels"),
    },
}


@dataclass(frozen=True)
class Split:
    """Images (N, C, *spatial) of any real dtype, their class indices (N,), int64, and perhaps a table.

    The table (N, columns) is float32, NaN where a value is missing; see `fastconv.models.WithCovariates`.
    """

    images: np.ndarray
    labels: np.ndarray
    table: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | np.ndarray) -> Split:
        return Split(self.images[index], self.labels[index], None if self.table is None else self.table[index])


@dataclass(frozen=True)
class Dataset:
    """A training, an optional validation and a test part with the same image shape."""

    train: Split
    val: Split | None
    test: Split
    num_classes: int

    @property
    def in_channels(self) -> int:
        return int(self.train.images.shape[1])

    @property
    def input_size(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.train.images.shape[2:])


def load_npz(path: str | Path, *, val_fraction: float = 0.1, seed: int = 0, table: bool = True,
             size: int | None = None) -> Dataset:
    """Read an MNIST or MedMNIST ``.npz`` file: 2D or 3D, grey or RGB.

    Parameters
    ----------
    path
        A file with ``x_train, y_train, x_test, y_test`` (MNIST) or ``train_images, train_labels,
        val_images, …`` (MedMNIST, Yang et al., Scientific Data 10, 41, 2023). Images are
        (N, *spatial) or (N, *spatial, channels) with 1, 3 or 4 channels; labels (N,) or (N, 1). A table of
        covariates may go along with each part as ``train_table``, ``val_table``, ``test_table``, (N, columns).
    val_fraction
        Share of the training part held out for validation where the file has no validation part;
        0 holds nothing out.
    seed
        Decides which images are held out.
    table
        False leaves the tables out.
    size
        Every spatial axis is cropped, or padded by repeating the border, to this length, on both sides alike; for
        networks that need more pixels than there are, such as VGG, 32.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        The file is no ``.npz``, lacks arrays, or holds arrays that do not fit together.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"load_npz: val_fraction is {val_fraction}, but 0 <= val_fraction < 1 is needed")
    try:
        with open(path, "rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError(f"{path}: holds one bare array (.npy), not a .npz of named arrays")
            layout = _layout_of(path, set(file))
            parts = {
                part: _split(f"{path}: {images}", file[images], f"{path}: {labels}", file[labels])
                for part, (images, labels) in layout.items()
                if images in file and labels in file
            }
            tables = {part: file[name] for part in parts if table and (name := f"{part}_table") in file}
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from error
    except ValueError as error:
        # NumPy's own messages ("Cannot load file containing pickled data ...") do not name the file.
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error

    if tables:
        parts = {part: _with_table(path, part, split, tables) for part, split in parts.items()}
    shape = parts["train"].images.shape[1:]
    for part, split in parts.items():
        if split.images.shape[1:] != shape:
            raise ValueError(
                f"{path}: {part} images have shape {split.images.shape[1:]} (channels first), "
                f"but training images have {shape}"
            )
    if size is not None:
        parts = {part: replace(split, images=_to_size(split.images, size)) for part, split in parts.items()}
    train, val, test = parts["train"], parts.get("val"), parts["test"]
    if val is None and val_fraction > 0:
        train, val = hold_out(train, val_fraction, seed)
    num_classes = 1 + max(int(split.labels.max()) for split in parts.values())
    if num_classes < 2:
        raise ValueError(f"{path}: all labels are 0; at least two classes are needed to train")
    return Dataset(train, val, test, num_classes)


def _layout_of(path: str | Path, names: set[str]) -> dict[str, tuple[str, str]]:
    for layout in _LAYOUTS.values():
        if all({*layout[part]} <= names for part in ("train", "test")):
            return layout
    wanted = " or ".join(
        f"{name}: {', '.join(array for part in ('train', 'test') for array in layout[part])}"
        for name, layout in _LAYOUTS.items()
    )
    raise ValueError(f"{path}: holds the arrays {sorted(names)}, but needs ({wanted})")


def _split(images_name: str, images: np.ndarray, labels_name: str, labels: np.ndarray) -> Split:
    """Check the two arrays of one part and bring them to (N, C, *spatial) and (N,)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{labels_name} has shape {labels.shape} and dtype {labels.dtype}, but one integer class per "
            "image is needed, (N,) or (N, 1) (several labels per image are not supported)"
        )
    if images.dtype.kind not in "uif":
        raise ValueError(f"{images_name} has dtype {images.dtype}, but integers or floats are needed")
    # (N, 28, 28, 3) is RGB and (N, 28, 28, 28) a volume: images of 1, 3 or 4 pixels across do not occur.
    has_channels = images.ndim >= 4 and images.shape[-1] in (1, 3, 4)
    images = np.moveaxis(images, -1, 1) if has_channels else images[:, None]
    if not 3 <= images.ndim <= 5:
        raise ValueError(
            f"{images_name} has {images.ndim - 1} axes, but (N, *spatial) or (N, *spatial, channels) with "
            "1 to 3 spatial axes is needed"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{images_name} holds {len(images)} images, but {labels_name} {len(labels)} labels: "
            "one label per image is needed"
        )
    if images.size == 0:
        raise ValueError(f"{images_name} has shape {images.shape}: it holds no pixel")
    if labels.min() < 0:
        raise ValueError(f"{labels_name} holds the label {labels.min()}, but classes count from 0")
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise ValueError(f"{images_name} holds NaN or infinity")
    return Split(images, labels.astype(np.int64))


def _with_table(path: str | Path, part: str, split: Split, tables: dict[str, np.ndarray]) -> Split:
    """Join a part with its table, which must fit the images of the part and the tables of the others."""
    name, table, first = f"{path}: {part}_table", tables.get(part), next(iter(tables.values()))
    if table is None:
        raise ValueError(f"{path}: holds {', '.join(f'{other}_table' for other in tables)}, but not {part}_table: "
                         "a table for every part, or for none, is needed")
    if table.ndim != 2 or table.dtype.kind not in "uifb" or table.shape != (len(split), first.shape[-1]):
        raise ValueError(f"{name} has shape {table.shape} and dtype {table.dtype}, but one row of numbers for each of "
                         f"the {len(split)} images, and as many columns as in the other parts, is needed. "
                         "Hint: NaN where a value is missing")
    if np.isinf(table).any():
        raise ValueError(f"{name} holds infinity. Hint: NaN where a value is missing")
    return Split(split.images, split.labels, table.astype(np.float32))


def _to_size(images: np.ndarray, size: int) -> np.ndarray:
    if size < 1:
        raise ValueError(f"load_npz: size is {size}, but at least 1 pixel is needed. Hint: size=32")
    crops, pads = [slice(None)] * 2, [(0, 0)] * 2
    for length in images.shape[2:]:
        cut, lack = max(length - size, 0), max(size - length, 0)
        crops.append(slice(cut // 2, cut // 2 + size))
        pads.append((lack // 2, lack - lack // 2))
    return np.pad(images[tuple(crops)], pads, mode="edge")


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Divide a part at random into (rest, held out), with ``round(fraction * N)`` images held out.

    Raises
    ------
    ValueError
        One of the two would be empty.
    """
    count = round(fraction * len(split))
    if not 0 < count < len(split):
        raise ValueError(
            f"hold_out: {fraction} of {len(split)} images is {count}, but both parts need at least one"
        )
    order = np.random.default_rng(seed).permutation(len(split))
    return split[np.sort(order[count:])], split[np.sort(order[:count])]


@dataclass(frozen=True)
class Normalise:
    """Maps images to float32 with mean 0 and variance 1 per channel: ``(x - mean) / std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, images: np.ndarray) -> Normalise:
        """Measure mean and standard deviation of each channel of images (N, C, *spatial)."""
        axes = (0, *range(2, images.ndim))
        mean = images.mean(axis=axes, dtype=np.float64)
        # E[x^2] - E[x]^2 in float64 over chunks: no float64 copy of the data set. The cancellation costs
        # at most 2 log10(mean / std) of 16 digits.
        square = np.zeros(images.shape[1])
        for start in range(0, len(images), 1024):
            square += np.square(images[start : start + 1024], dtype=np.float64).sum(axis=axes)
        variance = np.maximum(square / (images.size / images.shape[1]) - mean**2, 0)
        # A constant channel carries nothing; dividing it by 1 keeps it at 0.
        std = np.where(variance > 0, np.sqrt(variance), 1.0)
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images (N, C, *spatial) of any real dtype to float32 in the same memory order."""
        shape = (-1,) + (1,) * (images.ndim - 2)
        mean = np.asarray(self.mean, np.float32).reshape(shape)
        scale = (1 / np.asarray(self.std, np.float64)).astype(np.float32).reshape(shape)
        x = images.astype(np.float32)
        x -= mean
        x *= scale
        return x


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Weights of images, (N,) float64, with which `batches` draws every class equally often."""
    return 1 / np.bincount(labels)[labels]


def batches(
    split: Split,
    batch_size: int,
    *,
    normalise: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator | None = None,
    augment: Augment | None = None,
    weights: np.ndarray | None = None,
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield (x, labels) with x (B, C, *spatial) float32; the last batch may be smaller.

    If the part has a table, x is a pair of images and their rows of it, (B, columns) float32: an `Input`.

    Parameters
    ----------
    normalise
        Applied to each batch of images, see `Normalise`.
    rng
        Shuffles the images; without it they come in order.
    augment
        ``augment(images, rng) -> images``, see `fastconv.training.augment`; needs `rng`.
    weights
        (N,) numbers of at least 0: how often an image is drawn, relative to the others; needs `rng`. Still N draws in
        all: the image i comes ``N * weights[i] / sum(weights)`` times, rounded up or down at random such that this is
        the mean (systematic resampling, Kitagawa 1996, appendix). See `balanced_weights`.

    Raises
    ------
    ValueError
        `batch_size` is below 1, `weights` are no weights, or `augment` or `weights` is given without `rng`.
    """
    if batch_size < 1:
        raise ValueError(f"batches: batch_size is {batch_size}, but at least 1 is needed")
    for name, value in (("augment", augment), ("weights", weights)):
        if value is not None and rng is None:
            raise ValueError(f"batches: {name} needs rng. Hint: rng=numpy.random.default_rng(0)")
    order = np.arange(len(split)) if rng is None else rng.permutation(len(split))
    if weights is not None and rng is not None:
        order = _resample(order, weights, rng)
    # Gathered with the channels last in memory, as files hold RGB and as the kernels like it.
    images = np.moveaxis(split.images, 1, -1)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        x = normalise(np.moveaxis(np.take(images, chosen, axis=0), -1, 1))
        if augment is not None and rng is not None:
            x = augment(x, rng)
        yield (x if split.table is None else (x, split.table[chosen])), split.labels[chosen]


def _resample(order: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw as many as there are, each in proportion to its weight, by N equidistant pointers on the running sum."""
    weights = np.asarray(weights, np.float64)
    if weights.shape != order.shape or not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise ValueError(f"batches: weights has shape {weights.shape} and values from {weights.min()} to "
                         f"{weights.max()}, but {len(order)} finite numbers of at least 0, one for each image and not "
                         "all 0, are needed. Hint: balanced_weights(split.labels)")
    # Images of one weight, such as those of one class, side by side: their number is then right within one, too.
    order = order[np.argsort(weights[order], kind="stable")]
    ends = np.cumsum(weights[order])
    pointers = (np.arange(len(order)) + rng.random()) * (ends[-1] / len(order))
    return rng.permutation(order[np.searchsorted(ends, np.minimum(pointers, ends[-1]))])
