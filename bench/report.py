"""Tables and the chart: pure functions of what the measurements wrote down.

A record is {"row", "direction", "times": {peer: {"min", "median"}}, "notes", "algorithms", "extra_bytes"}; times in
seconds, see measure.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from shapes import POOLS, Row

Record = Mapping[str, Any]

OURS = ("fastconv", "fastconv_cl")
TORCH = ("torch", "torch_cl")
REFERENCE = "numpy"  # fastconv's own, no peer
PASSES_OF = {"fwd": 1, "dgrad": 1, "wgrad": 1, "fwdbwd": 3}
TIME_WIDTH = 12
LEGEND = """\
ms: smallest time of a call; _cl: channels_last, else contiguous (NCHW); speed: of fastconv's faster order, in GFLOP/s
of the direct algorithm (1 MAC = 2) or, for pools, GB/s of input and output; peak: share of the measured FMA peak;
x best: best peer's time / fastconv's, both in their faster order; x torch: contiguous against contiguous;
x t.best: torch's faster order / fastconv's; +MB: most memory above the operands, packed weights included."""


@dataclass(frozen=True)
class Line:
    """What one record comes to; None where something was not measured."""

    row: Row
    best: str | None  # fastconv's faster order
    seconds: float | None
    speed: float | None  # in 1e9 per second
    best_peer: str | None
    x_best: float | None
    x_best_median: float | None
    x_torch: float | None
    x_torch_best: float | None
    algorithm: str
    extra_mb: float | None


def line(record: Record) -> Line:
    """Work out speeds and ratios of a record."""
    row = Row(**{key: tuple(value) if isinstance(value, list) else value for key, value in record["row"].items()})
    least = {name: t["min"] for name, t in record["times"].items()}
    medians = {name: t["median"] for name, t in record["times"].items()}
    peers = [name for name in least if name not in (*OURS, REFERENCE)]
    best, seconds = _fastest(least, OURS)
    best_peer, peer_seconds = _fastest(least, peers)
    work = PASSES_OF[record["direction"]] * (
        4 * (math.prod(row.x_shape) + math.prod(row.y_shape)) if row.op in POOLS else 2 * row.macs)
    return Line(
        row, best, seconds, work / seconds / 1e9 if seconds else None, best_peer,
        _ratio(peer_seconds, seconds),
        _ratio(_fastest(medians, peers)[1], _fastest(medians, OURS)[1]),
        _ratio(least.get("torch"), least.get("fastconv")),
        _ratio(_fastest(least, TORCH)[1], seconds),
        record["algorithms"].get(best, ""),
        None if record["extra_bytes"] is None else record["extra_bytes"] / 2**20,
    )


def _fastest(seconds: Mapping[str, float], names: Iterable[str]) -> tuple[str | None, float | None]:
    known = [name for name in names if name in seconds]
    if not known:
        return None, None
    name = min(known, key=lambda n: seconds[n])
    return name, seconds[name]


def _ratio(other: float | None, ours: float | None) -> float | None:
    return None if other is None or ours is None else other / ours


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


# ---- Text --------------------------------------------------------------------------------------------------------

def heading(peers: Sequence[str], name_width: int) -> str:
    return _format(name_width, ["row", "class", *(f"{name} ms" if i == 0 else name for i, name in enumerate(peers)),
                                "speed", "peak", "x best", "x torch", "x t.best", "best peer", "algorithm", "+MB"])


def text(record: Record, peers: Sequence[str], peak: float | None, name_width: int) -> str:
    """One line of the table; what is not there is a dash."""
    found = line(record)
    unit = "GB/s" if found.row.op in POOLS else "GF/s"
    of_peak = found.speed / peak if found.speed and peak and unit == "GF/s" else None
    times = (record["times"].get(name) for name in peers)
    return _format(name_width, [
        found.row.name, found.row.kind, *(_number(t and t["min"] * 1e3, ".3f") for t in times),
        _number(found.speed, ".1f", " " + unit), _number(of_peak, ".0%"),
        *(_number(x, ".2f") for x in (found.x_best, found.x_torch, found.x_torch_best)),
        found.best_peer or "-", found.algorithm or "-", _number(found.extra_mb, ".1f"),
    ])


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def _format(name_width: int, cells: Sequence[str]) -> str:
    name, kind, *times, speed, peak, best, torch, torch_best, peer, algorithm, extra = cells
    return "".join([
        f"{name:<{name_width}}  {kind:<11}", *(f"{t:>{TIME_WIDTH}}" for t in times), f"{speed:>13}{peak:>6}",
        f"{best:>8}{torch:>9}{torch_best:>10}  {peer:<12}{algorithm:<14}{extra:>6}"]).rstrip()


def summary(records: Sequence[Record]) -> str:
    """Geometric means per class and over all rows."""
    lines = [line(record) for record in records]
    kinds = list(dict.fromkeys(found.row.kind for found in lines))
    out = [f"{'class':<12}{'rows':>5}{'x best':>8}{'worst':>8}{'(median)':>10}{'x torch':>9}{'x t.best':>10}"
           "  worst row"]
    for kind in [*kinds, "all"]:
        rows = [found for found in lines if kind in (found.row.kind, "all")]
        worst = min((found for found in rows if found.x_best is not None), key=lambda f: f.x_best or 0, default=None)
        columns = [_mean(found.x_best for found in rows), worst and worst.x_best]
        columns += [_mean(getattr(found, name) for found in rows)
                    for name in ("x_best_median", "x_torch", "x_torch_best")]
        out.append(f"{kind:<12}{len(rows):>5}" + "".join(
            f"{_number(value, '.2f'):>{width}}" for value, width in zip(columns, (8, 8, 10, 9, 10), strict=True))
            + f"  {worst.row.name if worst else '-'}")
    return "\n".join(out)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return geometric_mean(known) if known else None


def distribution(records: Sequence[Record]) -> str:
    """How the ratios to the best peer spread, and the worst rows by name."""
    found = sorted((x.x_best, x.row.name) for x in map(line, records) if x.x_best is not None)
    if not found:
        return "no row has both fastconv and a peer"
    ratios = [ratio for ratio, _ in found]
    names = {0: "min", 0.5: "median", 1: "max"}
    quantiles = ", ".join(f"{names.get(q, f'{q:.0%}')} {ratios[round(q * (len(ratios) - 1))]:.2f}"
                          for q in (0, 0.05, 0.25, 0.5, 0.75, 1))
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    below = ", ".join(f"{sum(r < x for r in ratios) / len(ratios):.1%} below {x:g}" for x in (0.8, 1, 1.5, 2))
    edges = [0, 0.5, 0.8, 1, 1.25, 1.6, 2, 3, math.inf]
    bars = []
    for low, high in pairwise(edges):
        count = sum(low <= r < high for r in ratios)
        bars.append(f"  {low:>4g} to {high:<4g} {count:>4} {'#' * round(60 * count / len(ratios))}")
    worst = "\n".join(f"  {ratio:.2f}  {name}" for ratio, name in found[:10])
    return (f"x best over {len(ratios)} rows: {quantiles}, geometric mean {mean:.2f}; {below}\n" + "\n".join(bars)
            + f"\nworst:\n{worst}")


# ---- Chart -------------------------------------------------------------------------------------------------------

def chart(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw bars, the geometric means per class, and points, the rows: how much faster fastconv is.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    lines = [line(record) for record in records]
    kinds = list(dict.fromkeys(found.row.kind for found in lines))[::-1]
    series = (("x_best", "against the best peer", "#3b6fb6", 0.2),
              ("x_torch_best", "against torch's better order", "#e0a03c", -0.2))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.45 * len(kinds)), layout="constrained")
    for name, _, color, shift in series:
        for y, kind in enumerate(kinds):
            values = [v for f in lines if f.row.kind == kind and (v := getattr(f, name)) is not None]
            if not values:
                continue
            mean = geometric_mean(values)
            # from 1, where both are equally fast, to the right or to the left
            axes.barh(y + shift, mean - 1, left=1, height=0.36, color=color)
            axes.plot(values, [y + shift] * len(values), "o", color="black", markersize=2.5, alpha=0.55)
            axes.annotate(f"{mean:.2f}", (max(*values, 1.0, mean), y + shift), (5, 0), textcoords="offset points",
                          va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    low, high = axes.get_xlim()
    ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("how many times as fast: geometric mean of the class (bar), its rows (points)")
    axes.set_title(title, fontsize=10)
    figure.legend(handles=[Patch(color=color, label=label) for _, label, color, _ in series], frameon=False,
                  fontsize=9, loc="outside lower center", ncols=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
