"""Pictures of training and of what convolutions see. Needs matplotlib (extra "plot").

Every function draws one figure, returns it and, if `path` is given, writes it there; the suffix decides the format. No
global matplotlib state is touched, so they may be called from any thread and without a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fastconv.training.loop import EpochRecord

__all__ = ["check_matplotlib", "confusion", "feature_maps", "filters", "heatmaps", "learning_curve", "pictures"]

_TRAIN, _VALID, _TEXT, _FAINT = "#9aa1ab", "#1d5fbf", "#2b2f36", "#d9dce1"


def check_matplotlib() -> None:
    """Raise ImportError, which says what to install, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('fastconv.plots needs matplotlib. Hint: pip install "fastconv[plot]"') from error


def _figure(width: float, height: float, title: str, rows: int = 1, columns: int = 1, **grid: Any) -> Any:
    """A figure of `width` x `height` inches and its (rows, columns) array of axes."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11, color=_TEXT, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def _save(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _bare(axes: Axes, title: str = "") -> None:
    """Axes that hold a picture: no ticks, a thin frame, a small title."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(_FAINT)
    if title:
        axes.set_title(title, fontsize=8, color=_TEXT, pad=3)


def learning_curve(history: Sequence[EpochRecord], path: str | Path | None = None) -> Figure:
    """Draw loss and accuracy of the training and, where there is one, the validation part by epoch."""
    figure, grid = _figure(8, 3.2, "Learning curve", 1, 2)
    epochs = [record.epoch for record in history]
    for axes, name, scale, title in (
        (grid[0, 0], "loss", 1, "cross-entropy loss"),
        (grid[0, 1], "accuracy", 100, "accuracy, %"),
    ):
        for part, colour, label in (("train", _TRAIN, "training"), ("val", _VALID, "validation")):
            values = [getattr(record, f"{part}_{name}") for record in history]
            if None in values:
                continue
            axes.plot(epochs, [scale * value for value in values], "o-", color=colour, ms=3, label=label)
        axes.set_title(title, fontsize=9, color=_TEXT, loc="left")
        axes.set_xlabel("epoch", fontsize=8, color=_TEXT)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8, colors=_TEXT, length=3)
        axes.grid(axis="y", color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    grid[0, 0].legend(fontsize=8, frameon=False, labelcolor=_TEXT)
    # The first epochs would squeeze the rest into one line.
    grid[0, 0].set_yscale("log")
    return _save(figure, path)


def confusion(matrix: np.ndarray, path: str | Path | None = None, names: Sequence[str] | None = None) -> Figure:
    """Draw a confusion matrix (classes, classes), rows true, columns predicted, with its counts."""
    classes = len(matrix)
    names = [str(k) for k in range(classes)] if names is None else list(names)
    figure, grid = _figure(1.5 + 0.4 * classes, 1.5 + 0.4 * classes, "Confusion matrix")
    axes = grid[0, 0]
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(matrix):
        colour = "white" if share[row, column] > 0.5 else _TEXT
        axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(classes), names)
    axes.set_yticks(range(classes), names)
    axes.tick_params(labelsize=8, colors=_TEXT, length=0)
    axes.set_xlabel("predicted", fontsize=8, color=_TEXT)
    axes.set_ylabel("true", fontsize=8, color=_TEXT)
    for spine in axes.spines.values():
        spine.set_color(_FAINT)
    return _save(figure, path)


def filters(weight: np.ndarray, path: str | Path | None = None, title: str = "Filters") -> Figure:
    """Draw the first input channel of filters (K, C, H, W), all on one scale around zero.

    Filters (K, C, D, H, W) of volumes have a row each, with a column for each slice along D.
    """
    planes = weight[:, 0]
    slices = planes.shape[1] if planes.ndim == 4 else 0
    planes = planes.reshape(-1, *planes.shape[-2:])
    count = len(planes)
    columns = slices or min(count, 8)
    rows = math.ceil(count / columns)
    figure, grid = _figure(1.1 * columns + 0.9, 1.2 * rows + 0.6, title, rows, columns)
    limit = float(np.abs(planes).max()) or 1.0
    for k, axes in enumerate(grid.flat):
        if k < count:
            image = axes.imshow(planes[k], cmap="RdBu_r", vmin=-limit, vmax=limit)
            _bare(axes, "" if slices else str(k))
        else:
            axes.set_axis_off()
    for k in range(rows if slices else 0):
        grid[k, 0].set_ylabel(str(k), fontsize=8, color=_TEXT, rotation=0, ha="right", va="center", labelpad=4)
    for k in range(slices):
        grid[0, k].set_title(f"slice {k}", fontsize=8, color=_TEXT, pad=3)
    bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=15 * max(1, rows / columns), pad=0.02)
    bar.ax.tick_params(labelsize=7, colors=_TEXT, length=2)
    bar.outline.set_edgecolor(_FAINT)
    return _save(figure, path)


def feature_maps(image: np.ndarray, layers: Mapping[str, np.ndarray], path: str | Path | None = None) -> Figure:
    """Draw an image (H, W) and below it the channels (C, H, W) of each layer, a row per layer, at most 16 of them.

    Of volumes, (D, H, W) and (C, D, H, W), the middle slice along D is drawn.
    """
    most = max(len(maps) for maps in layers.values())
    columns = min(most, 16)
    rows = 1 + len(layers)
    title = "Feature maps, each on its own scale" + (", middle slices" if image.ndim == 3 else "") + (
        f", the first {columns} channels" if columns < most else "")
    figure, grid = _figure(0.75 * columns + 1.2, 0.95 * rows + 0.4, title, rows, columns)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (name, maps) in zip(grid, {"input": image[None], **layers}.items(), strict=True):
        for axes, channel in zip(row, maps, strict=False):
            axes.set_axis_on()
            plane = channel[len(channel) // 2] if channel.ndim == 3 else channel
            axes.imshow(plane, cmap="gray" if name == "input" else "viridis")
            _bare(axes)
        row[0].set_ylabel(name, fontsize=8, color=_TEXT, rotation=0, ha="right", va="center", labelpad=6)
    return _save(figure, path)


def heatmaps(images: Mapping[str, np.ndarray], heats: Mapping[str, np.ndarray], path: str | Path | None = None,
             title: str = "Grad-CAM") -> Figure:
    """Draw named images and, over them, their heatmaps from 0 to 1, as `gradcam` gives them.

    Images (H, W) have a column each: the image, and the image under its heatmap. Volumes (D, H, W) have two rows
    each: the three orthogonal slices through the maximum of the heatmap, which lines mark, without and with it.
    """
    volume = next(iter(images.values())).ndim == 3
    planes: list[list[tuple[str, np.ndarray, np.ndarray, tuple[int, int] | None]]] = []
    for name, image in images.items():
        heat = heats[name]
        if not volume:
            planes.append([(name, image, heat, None)])
            continue
        top = [int(i) for i in np.unravel_index(heat.argmax(), heat.shape)]
        planes.append([
            (f"{name}, {axis} {top[k]}", image.take(top[k], k), heat.take(top[k], k),
             (top[1 if k == 0 else 0], top[1 if k == 2 else 2]))
            for k, axis in enumerate(("slice", "row", "column"))])
    if not volume:
        planes = [[plane for row in planes for plane in row]]
    rows, columns = 2 * len(planes), len(planes[0])
    figure, grid = _figure(1.7 * columns + 0.9, 1.8 * rows + 0.5, title, rows, columns)
    for k, row in enumerate(planes):
        for j, (name, image, heat, peak) in enumerate(row):
            plain, over = grid[2 * k, j], grid[2 * k + 1, j]
            for axes in (plain, over):
                axes.imshow(image, cmap="gray")
            # Little heat shows the image, much heat hides half of it.
            shown = over.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=np.clip(1.5 * heat, 0, 0.65))
            if peak is not None:
                plain.axhline(peak[0], color=_VALID, linewidth=0.6)
                plain.axvline(peak[1], color=_VALID, linewidth=0.6)
            _bare(plain, name)
            _bare(over)
    bar = figure.colorbar(_opaque(shown), ax=grid, shrink=0.7, aspect=25, pad=0.02)
    bar.ax.tick_params(labelsize=7, colors=_TEXT, length=2)
    bar.outline.set_edgecolor(_FAINT)
    return _save(figure, path)


def _opaque(image: Any) -> Any:
    """The colours of `image` for a colour bar, without its transparency."""
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(image.norm, image.cmap)


def pictures(images: Mapping[str, np.ndarray], path: str | Path | None, title: str, columns: int = 4) -> Figure:
    """Draw named images side by side: (H, W) in grey or (H, W, 3), values from 0 to 1 (clipped)."""
    rows = math.ceil(len(images) / columns)
    height, width = next(iter(images.values())).shape[:2]
    figure, grid = _figure(
        2.6 * columns, (2.6 * height / width + 0.25) * rows + 0.35, title, rows, columns
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, image) in zip(grid.flat, images.items(), strict=False):
        axes.set_axis_on()
        axes.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1)
        _bare(axes, name)
    return _save(figure, path)
