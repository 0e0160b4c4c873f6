"""The pictures of a comparison. Each function returns a matplotlib figure; `svg` and `png` write it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.compare.labels import place_labels
from fastconv.compare.networks import FAMILIES, NETWORKS
from fastconv.compare.study import PAIRS, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bubbles", "confusions", "curves", "few_images", "freeze", "memory", "pair", "png", "svg", "times"]

TEXT, FAINT = "#2b2f36", "#d9dce1"
"""Colours that an SVG leaves to the page, see `svg`."""
_IN_CELL = "#1f2329"  # on a light cell of a matrix, whatever the page
_SERIES = ("#3b82d6", "#d2504b", "#3a9d5d", "#e08a2c", "#8b5fc7")
_MARKERS = "osD^v"
_WIDTH = 8.2


def freeze(figure: Figure) -> None:
    """Do the layout now and for good."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def svg(figure: Figure, name: str, title: str) -> str:
    """An element for a web page: its text follows the page's colour and stays text, its background is the page's."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True,
                       metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg"):]
    text = text.replace(TEXT, "currentColor").replace(FAINT, "var(--faint)")
    # A page holds several pictures, which all number their parts from 1.
    for before in (' id="', "url(#", 'href="#'):
        text = text.replace(before, f"{before}{name}-")
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" ', text, count=1)


def png(figure: Figure, path: Path) -> None:
    """Write a picture on white for slides."""
    figure.savefig(path, dpi=160, facecolor="white")


def _figure(height: float, rows: int = 1, columns: int = 1, width: float = _WIDTH, **grid: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    for one in axes.flat:
        one.tick_params(labelsize=8, colors=TEXT, length=3)
        one.set_axisbelow(True)
        for side, spine in one.spines.items():
            spine.set_color(FAINT)
            spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _describe(axes: Axes, title: str = "", x: str = "", y: str = "", grid: str = "both") -> None:
    axes.set_title(title, fontsize=9, color=TEXT, loc="left")
    axes.set_xlabel(x, fontsize=8.5, color=TEXT)
    axes.set_ylabel(y, fontsize=8.5, color=TEXT)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(fontsize=8, frameon=False, labelcolor=TEXT, **options)


# ---- scales ------------------------------------------------------------------------------------------------------


# The first of them are drawn wherever they fit, the others where they leave room.
_SHARE_TICKS = (0.9, 0.99, 0.5, 0.999, 0.9999, 0.99999, 0.98, 0.95, 0.8, 0.995, 0.7, 0.998, 0.9995, 0.2, 0.0)


def _shares(axes: Axes, values: Sequence[float], floor: float, percent: bool = True,
            room: float = 0.06) -> Callable[..., Any]:
    """Make a y axis on which 90, 99 and 99.9% are equally far apart, and return what maps a share of 1 to it.

    Shares above ``1 - floor``, which so few images cannot tell from 1, are drawn there. Ticks are at least `room` of
    the axis apart.
    """

    def position(share: Any) -> Any:
        return -np.log10(np.maximum(1 - np.asarray(share, float), floor))

    lo, hi = float(np.min(position(values))), float(np.max(position(values)))
    margin = 0.08 * max(hi - lo, 0.2)
    lo, hi = lo - margin, hi + margin
    places: dict[float, str] = {}
    for tick in _SHARE_TICKS:
        place = float(position(tick))
        if lo <= place <= hi and 1 - tick >= floor / 1.001 and all(
                abs(place - other) >= room * (hi - lo) for other in places):
            places[place] = f"{100 * tick:g}%" if percent else f"{tick:g}"
    axes.set_ylim(lo, hi)
    axes.set_yticks(list(places), list(places.values()))
    return position


def _log_axis(axes: Axes, text: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _epochs(axes: Axes, epochs: int) -> None:
    """An axis from epoch 1 with whole numbers."""
    axes.set_xlim(0.8, epochs + 0.2)
    axes.set_xticks(range(1, epochs + 1, -(-epochs // 6)))


def short(value: float) -> str:
    """1200 as 1.2 k, 3400000 as 3.4 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _first(results: Results) -> list[str]:
    """Networks that did not diverge, with the seed that all have."""
    return [name for name in results.plan.models if "diverged" not in results.runs[name][0]]


# ---- pictures ----------------------------------------------------------------------------------------------------


def bubbles(results: Results, measure: str, x: str, area: str) -> Figure:
    """Accuracy or AUC of each network against one cost, another as the area of its bubble."""
    figure, grid = _figure(4.8)
    axes = grid[0, 0]
    names = _first(results)
    words = {"accuracy": "test accuracy (equal steps: equal factors of the error)",
             "auc": "test AUC (equal steps: equal factors of what is missing to 1)",
             "macs": "multiply-accumulates for one image",
             "parameters": "parameters"}
    floor = 0.5 / len(results.dataset.test) if measure == "accuracy" else 1e-5
    values = [results.runs[name][0][measure] for name in names]
    position = _shares(axes, values, floor, percent=measure == "accuracy")
    xs = [results.costs[name][x] for name in names]
    # Root of the cost as area: the range is a thousandfold.
    largest = max(results.costs[name][area] for name in names)
    areas = [30 + 900 * math.sqrt(results.costs[name][area] / largest) for name in names]
    points = [(cost, float(position(value))) for cost, value in zip(xs, values, strict=True)]
    axes.scatter(*zip(*points, strict=True), s=areas, alpha=0.7, linewidths=0,
                 color=[FAMILIES[NETWORKS[name].family] for name in names])
    _log_axis(axes, short)
    axes.set_xlim(min(xs) / 2.5, max(xs) * 2.5)
    _describe(axes, f"Area of a bubble: root of the {words[area]}, the largest {short(largest)}", words[x],
              words[measure])
    families = [family for family in FAMILIES if family in {NETWORKS[name].family for name in names}]
    for family in families:
        axes.scatter([], [], s=40, color=FAMILIES[family], alpha=0.7, linewidths=0, label=family)
    figure.legend(fontsize=8, frameon=False, labelcolor=TEXT, ncols=len(families), loc="outside lower center")
    freeze(figure)
    place_labels(axes, points, areas, [NETWORKS[name].label for name in names], TEXT)
    return figure


def _dots(results: Results, series: dict[str, Callable[[dict[str, Any]], float]], label: str,
          text: Callable[[float], str]) -> Figure:
    """A line for each network and on it a mark for each of several costs, on a logarithmic scale."""
    names = results.plan.models
    figure, grid = _figure(1.1 + 0.27 * len(names))
    axes = grid[0, 0]
    places = np.arange(len(names))[::-1]
    table = np.array([[value(results.costs[name]) for value in series.values()] for name in names])
    axes.hlines(places, table.min(1), table.max(1), color=FAINT, linewidth=2)
    for column, name, colour, marker in zip(table.T, series, _SERIES, _MARKERS, strict=False):
        axes.plot(column, places, marker, color=colour, markersize=6, label=name, linestyle="none")
    _log_axis(axes, text)
    axes.set_xlim(table.min() / 1.6, table.max() * 1.6)
    axes.set_yticks(places, [NETWORKS[name].label for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    _describe(axes, x=label, grid="x")
    figure.legend(fontsize=8, frameon=False, labelcolor=TEXT, ncols=len(series), loc="outside upper center")
    return figure


def times(results: Results, batch_size: int) -> Figure:
    """Milliseconds for each image, inference and training, alone and in a batch."""
    return _dots(results, {
        f"inference, batch of {batch_size}": lambda cost: 1e3 * cost["inference_batch"],
        "inference, one image": lambda cost: 1e3 * cost["inference_1"],
        f"training step, batch of {batch_size}": lambda cost: 1e3 * cost["training_batch"],
        "training step, one image": lambda cost: 1e3 * cost["training_1"],
    }, "milliseconds for each image", lambda value: f"{value:g} ms")


def memory(results: Results, batch_size: int) -> Figure:
    """Megabytes of a training step, by count and as measured."""
    return _dots(results, {
        "weights": lambda cost: 4e-6 * cost["parameters"],
        f"activations of {batch_size} images, counted": lambda cost: 1e-6 * batch_size * cost["activation_bytes"],
        f"peak of a step with {batch_size} images, measured": lambda cost: 1e-6 * cost["peak_bytes"],
    }, "megabytes", lambda value: f"{value:g} MB")


def curves(results: Results) -> Figure:
    """Validation accuracy by epoch, a panel for each network with all others in grey."""
    names = _first(results)
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure, grid = _figure(0.5 + 1.5 * rows, rows, columns, sharex=True, sharey=True)
    epochs = range(1, results.epochs + 1)
    values = {name: [record["val_accuracy"] for record in results.runs[name][0]["history"]] for name in names}
    for number, axes in enumerate(grid.flat):
        if number >= len(names):
            axes.set_axis_off()
            continue
        name = names[number]
        position = _shares(axes, [v for list_ in values.values() for v in list_],
                           0.5 / len(results.dataset.val or results.dataset.test), room=0.14)
        for other in names:
            axes.plot(epochs, position(values[other]), color=FAINT, linewidth=0.8)
        axes.plot(epochs, position(values[name]), color=FAMILIES[NETWORKS[name].family], linewidth=2,
                  marker="o" if results.epochs == 1 else "")
        _epochs(axes, results.epochs)
        axes.tick_params(labelbottom=number + columns >= len(names))
        _describe(axes, NETWORKS[name].label, grid="y")
        axes.title.set_fontsize(8.5)
    figure.supxlabel("epoch", fontsize=8.5, color=TEXT)
    figure.supylabel("validation accuracy", fontsize=8.5, color=TEXT)
    return figure


def pair(results: Results, key: str) -> Figure:
    """Accuracy on the training and the validation part by epoch of two networks, each with several seeds."""
    figure, grid = _figure(3.5, 1, 2)
    parts = {"train": ("training accuracy, while the weights move", len(results.dataset.train)),
             "val": ("validation accuracy", len(results.dataset.val or results.dataset.test))}
    epochs = range(1, results.epochs + 1)
    for axes, (part, (title, count)) in zip(grid.flat, parts.items(), strict=True):
        values = {name: np.array([[record[f"{part}_accuracy"] for record in run["history"]]
                                  for run in results.runs[name] if "diverged" not in run]) for name in PAIRS[key]}
        position = _shares(axes, [v for runs in values.values() for v in runs.ravel()], 0.5 / count)
        for (name, runs), colour in zip(values.items(), _SERIES[1::-1], strict=True):
            if len(runs):
                axes.fill_between(epochs, position(runs.min(0)), position(runs.max(0)), color=colour, alpha=0.18,
                                  linewidth=0)
                axes.plot(epochs, position(runs.mean(0)), color=colour, linewidth=2, label=NETWORKS[name].label,
                          marker="o" if results.epochs == 1 else "")
        _epochs(axes, results.epochs)
        _describe(axes, title, "epoch", grid="y")
    _legend(grid[0, 0], loc="lower right")
    return figure


def few_images(results: Results) -> Figure:
    """Test accuracy by number of training images, a line for each method with its range."""
    figure, grid = _figure(4.2)
    axes = grid[0, 0]
    sizes = sorted(results.few)
    methods = list(results.few[sizes[0]]["accuracy"])
    table = np.array([[results.few[n]["accuracy"][name] for n in sizes] for name in methods])
    position = _shares(axes, table.ravel().tolist(), 0.5 / len(results.dataset.test))
    axes.set_xscale("log")
    for index, (name, values, colour) in enumerate(zip(methods, table, _SERIES, strict=True)):
        mean, low, high = (position(values.mean(1)), position(values.min(1)), position(values.max(1)))
        shifted = np.array(sizes) * 1.015 ** (index - 2)  # so that ranges do not lie on each other
        axes.vlines(shifted, low, high, color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(shifted, mean, color=colour, marker=_MARKERS[index], markersize=5, linewidth=1.6, label=name,
                  linestyle="-" if name.startswith("LeNet") else "--")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    _describe(axes, x="training images", y="test accuracy")
    _legend(axes, loc="lower right")
    return figure


def confusions(results: Results, names: tuple[str, str]) -> Figure:
    """Confusion matrices of two networks, rows true, columns predicted, with counts up to 20 classes."""
    classes = results.dataset.num_classes
    size = min(4.1, 1.6 + 0.28 * classes)
    figure, grid = _figure(size, 1, 2, width=2 * size)
    for axes, name in zip(grid.flat, names, strict=True):
        matrix = results.runs[name][0]["confusion"]
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        edges = np.arange(classes + 1) - 0.5
        axes.pcolormesh(edges, edges, share, cmap="Blues", vmin=0, vmax=1, edgecolors=FAINT, linewidth=0.3)
        for row, column in np.argwhere(matrix) if classes <= 20 else ():
            axes.text(column, row, matrix[row, column], ha="center", va="center", fontsize=7.5,
                      color="#ffffff" if share[row, column] > 0.5 else _IN_CELL)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        if classes <= 20:
            axes.set_xticks(range(classes))
            axes.set_yticks(range(classes))
        axes.tick_params(length=0)
        _describe(axes, f"{NETWORKS[name].label}, {results.runs[name][0]['accuracy']:.1%}", "predicted", "true")
        axes.grid(visible=False)
    return figure
