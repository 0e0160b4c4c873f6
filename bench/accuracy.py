"""The rounding error of every algorithm against float64: ``python bench/accuracy.py``.

Prints the tables of docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastconv import plan
from fastconv.arrays import Array, empty, to_channels_last
from fastconv.backends import reference
from fastconv.config import settings
from fastconv.problem import conv_problem

FILTERS = 16
# Each with a map that no tile of Winograd's shapes fills evenly; larger ones are sums of its parts.
KERNELS = {"2": ((2,), (67,)), "3": ((3,), (67,)), "5": ((5,), (67,)), "11": ((11,), (67,)), "2x2": ((2, 2), (15, 17)),
           "3x3": ((3, 3), (15, 17)), "5x5": ((5, 5), (15, 17)), "7x7": ((7, 7), (15, 17)),
           "3x3x3": ((3, 3, 3), (7, 9, 7))}


def _normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    return rng.standard_normal(shape, dtype)


# Input and weight: what layers see after normalisation; after a ReLU, so that no sum cancels; unnormalised data.
DATA: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "normal": (_normal, _normal),
    "positive": (lambda *a: np.abs(_normal(*a)), lambda *a: np.abs(_normal(*a))),
    "mean 100": (lambda *a: _normal(*a) + 100, _normal),
}


class Error(NamedTuple):
    """Of one algorithm on one problem, relative to the rms of the exact result.

    Attributes
    ----------
    reduction
        Products in the sum of one element.
    worst, rms
        The largest error of an element, and the root mean square of all.
    """

    kernel: str
    algorithm: str
    data: str
    channels: int
    reduction: int
    worst: float
    rms: float


def errors(kernel: str, data: str, channels: int, dtype: str = "float32", seed: int = 0) -> Iterator[Error]:
    """Run every row and variant that can serve a problem, and compare with sums in float64."""
    taps, size = KERNELS[kernel]
    rng = np.random.default_rng(seed)
    make_x, make_w = DATA[data]
    x = to_channels_last(make_x(rng, (2, channels, *size), np.dtype(dtype)))
    w = make_w(rng, (FILTERS, channels, *taps), np.dtype(dtype))
    problem = conv_problem(x, w, padding=taps[0] // 2)
    wide = [a.astype(np.float64) for a in (x, w)]
    exact = reference.conv(conv_problem(*wide, padding=taps[0] // 2), *wide)
    scale = np.sqrt(np.mean(exact**2))
    now = settings()
    request = plan.Request(problem, "conv", now.isa, False, False, False, problem.batch, 1)
    for row, variant in plan.candidates(request):
        y = empty(problem.y_shape, np.dtype(dtype), problem.order)
        assert plan.make_plan(request, row, variant).engine.run(x, w, None, y, 1)
        off = np.abs(y - exact) / scale
        yield Error(kernel, plan.label(row.name, variant), data, channels, w[0].size, float(off.max()),
                    float(np.sqrt(np.mean(off**2))))


def table(channels: Sequence[int], dtype: str, kernels: Sequence[str]) -> str:
    """Markdown: the largest error and the rms of all, over the rms of the result."""
    head = ["kernel", "algorithm", "data", *(f"{c} channels" for c in channels)]
    lines = ["| " + " | ".join(head) + " |", "|---" * 3 + "|---:" * len(channels) + "|"]
    for kernel in kernels:
        found: dict[tuple[str, str], list[Error]] = {}
        for data in DATA:
            for count in channels:
                for error in errors(kernel, data, count, dtype):
                    found.setdefault((error.algorithm, data), []).append(error)
        for data in DATA:
            alike: dict[tuple[str, ...], list[str]] = {}  # direct and im2col add the same products in the same order
            for (algorithm, drawn), row in found.items():
                if drawn == data:
                    of = {error.channels: f"{error.worst:.1e} ({error.rms:.1e})" for error in row}
                    cells = tuple(of.get(count, "") for count in channels)  # channelwise serves few
                    alike.setdefault(cells, []).append(algorithm)
            for cells, algorithms in alike.items():
                lines.append("| " + " | ".join([kernel, ", ".join(algorithms), data, *cells]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[4, 32, 128, 512], metavar="N")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=list(KERNELS))
    options = parser.parse_args(arguments)
    print(table(options.channels, options.dtype, options.kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
