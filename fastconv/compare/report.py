"""The report of a comparison: one web page without any external part, and its pictures as PNG files beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from fastconv.compare import figures, text
from fastconv.compare.figures import short
from fastconv.compare.measure import BATCH_SIZE
from fastconv.compare.networks import NETWORKS
from fastconv.compare.study import PAIRS, Results
from fastconv.compare.text import interval

__all__ = ["overview", "write_report"]

_STYLE = """
:root { color-scheme: light dark; --text: #1f2329; --page: #ffffff; --faint: #d9dce1; --soft: #f4f5f7; --link: #1d5fbf }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6eb; --page: #16191e; --faint: #3a4049; --soft: #20242b; --link: #7fb0f5 }
}
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; color: var(--text); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem }
p { margin: .5rem 0; max-width: 48rem }
figure { margin: .8rem 0 0 }
svg { width: 100%; height: auto; display: block }
nav ol { columns: 2; margin: .3rem 0; padding-left: 1.4rem; font-size: .93rem }
a { color: var(--link) }
.scroll { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: .25rem .45rem; border-bottom: 1px solid var(--faint); text-align: right; vertical-align: top }
th { font-weight: 600; background: var(--soft); white-space: normal; vertical-align: bottom }
th:first-child, td:first-child, .words td, .words th { text-align: left }
.words { white-space: normal }
@media print {
  :root { color-scheme: light; --text: #000000; --page: #ffffff; --faint: #cccccc; --soft: #f2f2f2; --link: #000000 }
  body { max-width: none; padding: 0; font-size: 10.5pt }
  nav { display: none }
  section { break-inside: avoid }
  h2 { margin-top: 1.4rem }
  table { font-size: 7pt }
  th, td { padding: .15rem .3rem }
}
"""


def write_report(results: Results, out: Path) -> Path:
    """Write ``out/report.html`` and the pictures; returns its path.

    Raises
    ------
    OSError
        A file cannot be written.
    """
    path = out / "report.html"
    temporary = out / "report.html.tmp"
    temporary.write_text(_page(results, out), encoding="utf-8")
    temporary.replace(path)
    return path


def _page(results: Results, out: Path) -> str:
    sections = list(_sections(results, out))
    contents = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(title)}</h2>{content}</section>\n'
                   for key, title, content in sections)
    title = f"{len(results.plan.models)} networks on {text.data_name(results.plan.data)}"
    return (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>{_paragraphs(text.introduction(results))}"
        f"<nav><ol>{contents}</ol></nav>\n{body}</body></html>\n")


def _sections(results: Results, out: Path) -> Iterable[tuple[str, str, str]]:
    """Keys, titles and contents of all sections that this comparison has something for."""
    trained = [name for name in results.plan.models if "diverged" not in results.runs[name][0]]

    def draw(key: str, title: str, words: list[str], picture: Callable[..., Any], *args: Any) -> tuple[str, str, str]:
        figure = picture(results, *args)
        figures.freeze(figure)
        figures.png(figure, out / f"{key}.png")
        drawing = figures.svg(figure, key, escape(title, quote=True))
        return key, title, f"{_paragraphs(words)}<figure>{drawing}</figure>"

    yield "table", "All networks", _paragraphs(text.table(results)) + _table(_rows(results))
    if trained:
        yield draw("accuracy", "Accuracy and work", text.accuracy(results, trained), figures.bubbles,
                   "accuracy", "macs", "parameters")
        yield draw("auc", "Area under the ROC curve and size", text.auc(results, trained), figures.bubbles,
                   "auc", "parameters", "macs")
    yield draw("time", "Time for each image", text.times(results), figures.times, BATCH_SIZE)
    yield draw("memory", "Memory of training", text.memory(results), figures.memory, BATCH_SIZE)
    if trained:
        yield draw("learning", "Learning curves", text.curves(results, trained), figures.curves)
    for key, title in (("shortcuts", "Shortcuts: plain against residual"),
                       ("heads", "Auxiliary classifiers: without and with")):
        if set(PAIRS[key]) <= set(results.plan.models):
            yield draw(key, title, text.pair(results, key), figures.pair, key)
    if {"googlenet_naive", "googlenet"} <= set(trained):
        yield "reductions", "1x1 reductions: naive and reduced inception modules", _paragraphs(
            text.reductions(results))
    if results.few:
        yield draw("few", "Few images: a network and conventional classifiers", text.few_images(results),
                   figures.few_images)
    if len(trained) > 1:
        extremes = text.extremes(results, trained)
        yield draw("confusion", "Which classes are confused", text.confusions(results, *extremes),
                   figures.confusions, extremes)
    yield "networks", "The networks", _table(_network_rows(results), "words")
    yield "method", "How it was done", _paragraphs(text.method(results)) + _table(
        [("", "this machine"), *results.machine.items()], "words")


def _paragraphs(words: Iterable[str]) -> str:
    return "".join(f"<p>{escape(paragraph)}</p>" for paragraph in words)


def _table(rows: list[tuple[str, ...]], kind: str = "numbers") -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return (f'<div class="scroll"><table class="{kind}"><thead>{line(rows[0], "th")}</thead>'
            f"<tbody>{body}</tbody></table></div>")


def _rows(results: Results) -> list[tuple[str, ...]]:
    """The table of all networks, the most accurate first."""
    head = ("network", "accuracy", "95% interval", "AUC", "parameters", "MACs", "image", "infer 1, ms",
            f"infer {BATCH_SIZE}, ms", "train 1, ms", f"train {BATCH_SIZE}, ms", "step, MB", "trained in, s")

    def row(name: str) -> tuple[str, ...]:
        cost, run = results.costs[name], results.runs[name][0]
        quality: tuple[str, ...] = ("diverged", "", "")
        if "diverged" not in run:
            low, high = interval(run["accuracy"], len(results.dataset.test))
            quality = f"{run['accuracy']:.2%}", f"{100 * low:.1f} to {100 * high:.1f}", f"{run['auc']:.4f}"
        times = (_digits(1e3 * cost[key])
                 for key in ("inference_1", "inference_batch", "training_1", "training_batch"))
        return (NETWORKS[name].label, *quality, f"{cost['parameters']:,}", short(cost["macs"]),
                "x".join(map(str, cost["input_size"])), *times, _digits(cost["peak_bytes"] / 1e6),
                f"{run['seconds']:.1f}" if "seconds" in run else "")

    order = sorted(results.plan.models, key=lambda name: -results.runs[name][0].get("accuracy", 0.0))
    return [head, *map(row, order)]


def _digits(value: float) -> str:
    """Two or three digits that count, without exponents."""
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def _network_rows(results: Results) -> list[tuple[str, ...]]:
    return [("network", "paper", "here", "learning rate"),
            *((row.label, row.source, row.what, f"{row.lr:g}") for row in (NETWORKS[n] for n in results.plan.models))]


def overview(results: Results) -> str:
    """The table of all networks for a terminal: names, quality, costs."""
    rows = [row[:6] + row[10:11] for row in _rows(results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) if i else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows)
