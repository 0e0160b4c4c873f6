"""Inference on images and volumes that are larger than the network's window, or than memory.

The image is cut into overlapping windows, the network runs on batches of them, and their scores are averaged, with less
weight where a window ends and the network saw less of the surroundings (Isensee et al. 2021, nnU-Net). What is kept is
one slab: as many rows along the first spatial axis as one row of windows covers. Input and output may live on disk.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array, as_array, check_same_place
from fastconv.nn.layer import float_dtype
from fastconv.problem.common import AXIS_NAMES, check_ndim, integer

_OP = "sliding_window"


def _gaussian(size: int) -> Array:
    """Bell of one axis with a standard deviation of size / 8, as in nnU-Net; 3e-4 of the maximum at the ends."""
    return np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 8)) ** 2)


PROFILES: dict[str, Callable[[int], Array]] = {"gaussian": _gaussian, "constant": np.ones}
"""Weight along one axis of a window by its length; the weight of a pixel is the product over the axes."""


def sliding_window(predict: Callable[[Array], Any], image: Any, window: tuple[int, ...], *, overlap: float = 0.5,
                   weights: str = "gaussian", batch_size: int = 1, argmax: bool = False, out: Any = None,
                   pad_value: float = 0.0, dtype: DTypeLike = np.float32,
                   progress: Callable[[int, int], object] | None = None) -> Any:
    """Run a network on overlapping windows of an image, and average what it says about each pixel.

    Parameters
    ----------
    predict : callable
        A layer, or any function from windows (B, C, \\*window) to scores: (B, K, \\*size) for dense prediction, where
        size is window or a fixed multiple or fraction of it, or (B, K) for a classifier. Averaged is what it returns:
        return probabilities for their mean.
    image : array_like
        (N, C, \\*spatial), (C, \\*spatial) or \\*spatial, of any real dtype. A `numpy.memmap`, or anything else with
        ``shape`` that gives an array when it is indexed by integers and slices (HDF5, zarr, NIfTI): windows alone are
        read from it. On a GPU: an array of CuPy or its like; windows, scores and result lie there then, too.
    window : tuple of int
        Size of a window, one number for each spatial axis, 1 to 3 of them.
    overlap : float
        Share of a window that its neighbour covers too, at least, from 0 on and below 1. Windows are spread evenly.
    weights : str
        ``"gaussian"`` or ``"constant"``, see `PROFILES`. A classifier's scores have equal weights.
    batch_size : int
        Windows for each call of `predict`.
    argmax : bool
        Give the class with the largest mean score in place of the scores. The scores of the whole image are then never
        in memory at the same time.
    out : array_like, optional
        Where the result is written, slab by slab; a `numpy.memmap`, or anything with ``shape`` and ``dtype`` that can
        be assigned to by slices.
    pad_value : float
        What there is around the image, where it is smaller than a window: air, for instance.
    dtype
        float32 or float64, which windows are converted to.
    progress : callable, optional
        ``progress(done, total)`` is called with numbers of windows after each batch.

    Returns
    -------
    array
        `out`, or a new array, with the image's form. Dense: scores (N, K, \\*out_size), or classes (N, \\*out_size) of
        the smallest unsigned dtype; ``out_size = ceil(spatial * size / window)``. Classifier: (N, K) or (N,). Without N
        if the image has none.

    Raises
    ------
    ValueError
        If shapes or settings do not fit.
    TypeError
        If `image` cannot be read in parts, or `predict` gives no array of float32 or float64.

    Notes
    -----
    Memory: a batch of windows, what `predict` takes, and K scores for each pixel of a slab, which is as long as a row
    of windows along the first axis and whole along the others; put the longest axis first. Scores are added up in the
    order of the windows, so that the result depends on `batch_size` no more than the network's does.

    MONAI's `sliding_window_inference` raises Gaussian weights to at least 0.001 of the largest, so that windows which
    meet near an edge of the image count alike there; and it starts windows at multiples of the step and the last at the
    end, where these are spread evenly, as in nnU-Net.

    Examples
    --------
    >>> volume = np.load("ct.npy", mmap_mode="r")  # (D, H, W), int16
    >>> labels = np.lib.format.open_memmap("labels.npy", "w+", np.uint8, volume.shape)
    >>> sliding_window(lambda x: net(x / 1000), volume, (96, 96, 96), argmax=True, out=labels, pad_value=-1024)
    """
    if not isinstance(window, tuple):
        raise TypeError(f"{_OP}: window is {window!r}, but a tuple is needed, one size for each spatial axis. "
                        "Hint: (96, 96, 96) for volumes")
    check_ndim(len(window), _OP, "window")
    window = tuple(integer(_OP, "window", size, 1) for size in window)
    if not 0 <= overlap < 1:
        raise ValueError(f"{_OP}: overlap is {overlap!r}, but 0 <= overlap < 1 is needed. Hint: 0.5 is usual")
    if weights not in PROFILES:
        raise ValueError(f"{_OP}: weights is {weights!r}, but one of {', '.join(map(repr, PROFILES))} is needed. "
                         "Hint: 'gaussian' hides the borders of windows")
    batch_size = integer(_OP, "batch_size", batch_size, 1)
    source = _Source(image, window, pad_value, float_dtype(dtype))
    # The size of the scores decides how windows are laid, so the first one runs before that.
    starts = tuple(axis[0].start for axis in _lay(source.size, window, overlap, weights, (Fraction(1),) * len(window)))
    first = _predict(predict, source.read(0, [starts]))
    axes = _lay(source.size, window, overlap, weights, _scale(first, window))
    scores = _Scores(predict, source, batch_size, first, source.batch * math.prod(map(len, axes)), progress)
    if starts != tuple(axis[0].start for axis in axes):
        scores.pending = None  # coarse scores moved it
    return (_classify if first.ndim == 2 else _dense)(scores, axes, argmax, out)


# ---- the image ---------------------------------------------------------------------------------------------------


class _Source:
    """Reads windows of an image of any of the three forms, with padding around it."""

    def __init__(self, image: Any, window: tuple[int, ...], pad_value: float, dtype: np.dtype[Any]) -> None:
        if not hasattr(image, "shape") or not hasattr(image, "__getitem__"):
            raise TypeError(f"{_OP}: image is a {type(image).__qualname__}, but an array is needed, or what has a "
                            "shape and gives arrays when sliced. Hint: np.asarray(image)")
        shape, ndim = tuple(image.shape), len(window)
        if len(shape) not in (ndim, ndim + 1, ndim + 2):
            axes = AXIS_NAMES[ndim]
            raise ValueError(f"{_OP}: image has shape {shape}, but with window {window} it must be ({axes}), "
                             f"(C, {axes}) or (N, C, {axes}). Hint: one size of the window for each spatial axis")
        if 0 in shape:
            raise ValueError(f"{_OP}: image has shape {shape}: it holds no pixel. Hint: check how it was cut out")
        self.image = image
        self.like = np.empty(0)  # an array where windows are to lie
        if hasattr(image, "__cuda_array_interface__"):
            from fastconv.backends.cuda.device import adopt  # only now: most processes never see a GPU

            self.image = self.like = adopt(image)  # type: ignore[assignment]
        self.window = window
        self.pad_value = pad_value
        self.dtype = dtype
        self.has_batch = len(shape) == ndim + 2
        self.has_channels = len(shape) > ndim
        self.batch = shape[0] if self.has_batch else 1
        self.channels = shape[-ndim - 1] if self.has_channels else 1
        self.size = shape[-ndim:]

    def read(self, number: int, starts: list[tuple[int, ...]]) -> Array:
        """Windows (B, C, \\*window) of image `number`, which begin at `starts`, possibly outside of it."""
        windows = np.empty((len(starts), self.channels, *self.window), self.dtype, like=self.like)
        windows.fill(self.pad_value)
        for x, start in zip(windows, starts, strict=True):
            inside = [slice(max(s, 0), min(s + w, n)) for s, w, n in zip(start, self.window, self.size, strict=True)]
            part = self.image[(*self.prefix(number), *(slice(None),) * self.has_channels, *inside)]
            part = np.asarray(part, like=self.like)
            if part.dtype.kind not in "biuf":
                raise TypeError(f"{_OP}: image has dtype {part.dtype}, but real numbers are needed. "
                                "Hint: image.real and image.imag can be two channels")
            target = tuple(slice(i.start - s, i.stop - s) for i, s in zip(inside, start, strict=True))
            x[:, *target] = part
        return windows

    def prefix(self, number: int) -> tuple[int, ...]:
        """Index of image `number` in what has the form of the source."""
        return (number,) * self.has_batch


# ---- windows -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A window along one axis."""

    start: int
    """First pixel of the image; negative in the padding."""
    inside: slice
    """What of its scores lies inside of the result."""
    lo: int
    """Where that lies in the result, from `lo` up to `hi`."""
    hi: int
    weights: Array
    """(hi - lo,); those of all windows that cover a position add up to one."""


_Axis = list[_Place]


def _lay(size: tuple[int, ...], window: tuple[int, ...], overlap: float, weights: str,
         scale: tuple[Fraction, ...]) -> list[_Axis]:
    profile = PROFILES[weights]
    return [_axis(n, w, overlap, profile, r) for n, w, r in zip(size, window, scale, strict=True)]


def _axis(size: int, window: int, overlap: float, profile: Callable[[int], Array], scale: Fraction) -> _Axis:
    """Spread windows over one axis, in steps at which the scores have whole pixels too."""
    unit = scale.denominator
    padded = max(-(-size // unit) * unit, window)
    before = (padded - size) // 2 // unit * unit
    span = (padded - window) // unit
    # 1 - 0.9 is a little less than 0.1, and one more window for that a waste
    gaps = math.ceil(span / max(window // unit * (1 - overlap), 1) - 1e-6)
    starts = [unit * ((2 * i * span + gaps) // (2 * gaps)) - before for i in range(gaps + 1)] if gaps else [-before]
    out_size, out_window = math.ceil(size * scale), int(window * scale)
    total = np.zeros(out_size)
    axis = []
    for start in starts:
        begin = int(start * scale)
        lo, hi = max(begin, 0), min(begin + out_window, out_size)
        inside = slice(lo - begin, hi - begin)
        weights = profile(out_window)[inside]
        total[lo:hi] += weights
        axis.append(_Place(start, inside, lo, hi, weights))
    return [place._replace(weights=place.weights / total[place.lo:place.hi]) for place in axis]


def _scale(scores: Array, window: tuple[int, ...]) -> tuple[Fraction, ...]:
    """Pixels of the scores for each pixel of a window, along each axis."""
    ndim = len(window)
    if scores.ndim not in (2, ndim + 2) or 0 in scores.shape:
        raise ValueError(f"{_OP}: predict gave shape {scores.shape} for one window {window}, but (B, K) or "
                         f"(B, K, {AXIS_NAMES[ndim]}) is needed. Hint: one score for each class, and for each pixel")
    if scores.ndim == 2:
        return (Fraction(1),) * ndim
    return tuple(Fraction(n, w) for n, w in zip(scores.shape[2:], window, strict=True))


def _predict(predict: Callable[[Array], Any], windows: Array) -> Array:
    scores = as_array(predict(windows), "what predict gives", _OP)
    check_same_place(_OP, ("image", windows), ("what predict gives", scores))
    if scores.ndim < 2 or len(scores) != len(windows):
        raise ValueError(f"{_OP}: predict gave shape {scores.shape} for {len(windows)} windows, but (B, K, ...) with "
                         f"B = {len(windows)} is needed. Hint: the batch is axis 0")
    return scores


class _Scores:
    """Runs the network on windows, batch by batch."""

    def __init__(self, predict: Callable[[Array], Any], source: _Source, batch_size: int, first: Array, total: int,
                 progress: Callable[[int, int], object] | None) -> None:
        self.predict = predict
        self.source = source
        self.batch_size = batch_size
        self.shape, self.dtype = first.shape[1:], first.dtype
        self.pending: Array | None = first  # scores of the first window, computed before
        self.done, self.total = 0, total
        self.progress = progress

    def __call__(self, number: int, windows: list[tuple[_Place, ...]]) -> Iterator[tuple[tuple[_Place, ...], Array]]:
        """Yield each window of image `number` with its scores (K, ...)."""
        while windows:
            if self.pending is not None:
                batch, scores, self.pending = windows[:1], self.pending, None
            else:
                batch = windows[:self.batch_size]
                starts = [tuple(place.start for place in window) for window in batch]
                scores = _predict(self.predict, self.source.read(number, starts))
            if scores.shape[1:] != self.shape or scores.dtype != self.dtype:
                raise ValueError(f"{_OP}: predict gave {scores.dtype} of shape {scores.shape}, but {self.dtype} of "
                                 f"shape {(1, *self.shape)} for the first window: all must be alike. "
                                 "Hint: windows have one size, so scores should")
            yield from zip(batch, scores, strict=True)
            windows = windows[len(batch):]
            self.done += len(batch)
            if self.progress is not None:
                self.progress(self.done, self.total)


# ---- results -----------------------------------------------------------------------------------------------------


def _dense(scores: _Scores, axes: list[_Axis], argmax: bool, out: Any) -> Any:
    source, classes = scores.source, scores.shape[0]
    rows, *others = axes
    size = tuple(axis[-1].hi for axis in axes)
    form = (*(source.batch,) * source.has_batch, *(() if argmax else (classes,)), *size)
    result = _result(form, scores.dtype, classes, argmax, out, source.like)
    # Rows of windows that run together, so that a batch is full where there are few windows beside each other.
    together = math.ceil(scores.batch_size / math.prod(map(len, others)))
    groups = [rows[i:i + together] for i in range(0, len(rows), together)]
    # A group's rows begin where no later window reaches back; what it shares with the next one moves to the front.
    ends = [group[0].lo for group in groups[1:]] + [size[0]]
    slab = np.zeros((classes, max(group[-1].hi - group[0].lo for group in groups), *size[1:]), scores.dtype,
                    like=source.like)
    for number in range(source.batch):
        for group, end in zip(groups, ends, strict=True):
            begin = group[0].lo
            for window, values in scores(number, list(itertools.product(group, *others))):
                top, *rest = window
                target = (slice(top.lo - begin, top.hi - begin), *(slice(place.lo, place.hi) for place in rest))
                weights = functools.reduce(np.multiply.outer, [place.weights for place in window])
                part = values[:, *(place.inside for place in window)]
                slab[:, *target] += part * np.asarray(weights.astype(scores.dtype), like=slab)
            done = slab[:, :end - begin]
            classes_axis = (slice(None),) * (not argmax)
            result[*source.prefix(number), *classes_axis, begin:end] = done.argmax(0) if argmax else done
            kept = group[-1].hi - end
            slab[:, :kept] = slab[:, end - begin:end - begin + kept].copy()  # the two may overlap
            slab[:, kept:] = 0
    return result


def _classify(scores: _Scores, axes: list[_Axis], argmax: bool, out: Any) -> Any:
    source, (classes,) = scores.source, scores.shape
    windows = list(itertools.product(*axes))
    sums = np.zeros((source.batch, classes), like=source.like)
    for number in range(source.batch):
        for _, values in scores(number, windows):
            sums[number] += values
    means = sums / len(windows)
    means = means if source.has_batch else means[0]
    form = means.shape[:-1] if argmax else means.shape
    result = _result(form, scores.dtype, classes, argmax, out, source.like)
    result[...] = means.argmax(-1) if argmax else means
    return result


def _result(shape: tuple[int, ...], dtype: np.dtype[Any], classes: int, argmax: bool, out: Any, like: Array) -> Any:
    """`out`, checked, or a new array for the scores of `dtype` or the classes."""
    if argmax and classes < 2:
        raise ValueError(f"{_OP}: argmax=True chooses among classes, but predict gave {classes} score for each pixel. "
                         "Hint: compare the scores with a threshold instead")
    needed = np.min_scalar_type(classes - 1) if argmax else dtype
    if out is None:
        return np.empty(shape, needed, like=like)
    if tuple(out.shape) != shape:
        raise ValueError(f"{_OP}: out has shape {tuple(out.shape)}, but the result has shape {shape}. "
                         f"Hint: np.empty({shape}, np.{needed})")
    if not np.can_cast(needed, out.dtype, "safe" if argmax else "same_kind"):
        raise TypeError(f"{_OP}: out has dtype {out.dtype}, but the result has {needed}. "
                        f"Hint: np.empty({shape}, np.{needed})")
    return out
