"""The fastest algorithm and tile on this GPU by trying, under ``config(tune=True)``.

Choices are kept as `fastconv.tune` keeps those of the CPU, by device, kernel sources and problem.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastconv import tune
from fastconv.arrays import SHORT_FLOATS
from fastconv.backends.cuda.conv import Run, WeightGradRun
from fastconv.backends.cuda.device import bfloat16, provider
from fastconv.backends.cuda.plan import plan_for, refuses, tiles_of
from fastconv.problem import ConvProblem

Array = Any  # of the provider


class Algorithm(NamedTuple):
    """What a call may ask for, such as "simt 64x64"."""

    name: str


def candidates(problem: ConvProblem, op: str, predicted: str) -> list[str]:
    """What is worth trying. Tensor cores round float32 to eleven bits, so that they are for 16 bits only."""
    cores = ("mma", "wgmma") if problem.dtype in SHORT_FLOATS else ()
    names = ["simt", *["direct"] * (problem.groups > 1),
             *(name for name in cores if refuses(problem, op, name, provider().capability()) is None)]
    found = itertools.chain.from_iterable(
        [f"{name} {tile.name}" for tile in tiles_of(problem, op, name)] or [name] for name in names)
    return list(dict.fromkeys([predicted, *found]))


def choose(problem: ConvProblem, op: str) -> str:
    """The algorithm for a pass: as kept, or the fastest of a trial."""
    device = provider()
    parts = ("cuda", device.name(), source_hash(), op, astuple(problem))

    def parse(entry: Any) -> tune.Choice | None:
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            measured = tuple((str(name), float(seconds)) for name, seconds in entry["seconds"].items())
            name = entry["algorithm"]
            if name in candidates(problem, op, _predicted(problem, op)) and name in dict(measured):
                return _choice(problem, op, name, measured)
        return None

    return tune.kept(json.dumps(parts, separators=(",", ":")), parse, lambda: _try(problem, op)).name


def _choice(problem: ConvProblem, op: str, name: str, measured: tuple[tuple[str, float], ...]) -> tune.Choice:
    return tune.Choice(Algorithm(name), "", measured, tune.describe(op, problem), _predicted(problem, op))


def _predicted(problem: ConvProblem, op: str) -> str:
    """What the heuristic takes, with the tile of its largest launch."""
    device = provider()
    plan = plan_for(problem, op, "auto", False, device.multiprocessors(), device.capability())
    if not plan.launches or not tiles_of(problem, op, plan.algorithm):
        return plan.algorithm
    first = max(plan.launches, key=lambda launch: math.prod(launch.grid) if "BM" in dict(launch.kernel.defines) else 0)
    defines = dict(first.kernel.defines)
    return f"{plan.algorithm} {defines['BM']}x{defines['BN']}"


def _try(problem: ConvProblem, op: str) -> tune.Choice:
    predicted = _predicted(problem, op)
    runs = {name: _runner(problem, op, name) for name in candidates(problem, op, predicted)}
    best, winner = tune.race(runs, predicted, provider().seconds)
    return _choice(problem, op, winner, tuple(best.items()))


def _runner(problem: ConvProblem, op: str, algorithm: str) -> Callable[[], object]:
    """Runs a pass on arrays of its own, laid out as the problem says."""
    p = problem
    x, w, y = (_array(shape, strides, p.dtype) for shape, strides in (
        (p.x_shape, p.x_strides), (p.w_shape, p.w_strides), (p.y_shape, p.y_strides)))
    if op == "conv_weight_grad":
        gradient = WeightGradRun(problem, algorithm)
        return lambda: gradient(x, y)
    run = Run(problem, op, algorithm)
    source, target = (x, y) if op == "conv" else (y, x)
    return lambda: run(source, w, None, target)


def _array(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> Array:
    """Random numbers on the GPU under a shape and strides in elements of five axes."""
    seen = (*strides[:2], *strides[len(strides) - len(shape) + 2:])
    reach = [(n - 1) * s for n, s in zip(shape, seen, strict=True)]
    low, high = (sum(r for r in reach if (r < 0) == negative) for negative in (True, False))
    number = bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    values = np.random.default_rng(0).random(max(high - low, 0) + 1, np.float32).astype(number)
    buffer = provider().upload(values)
    return provider().adopt(SimpleNamespace(owner=buffer, __cuda_array_interface__={
        "version": 3, "shape": shape, "strides": tuple(s * number.itemsize for s in seen),
        "typestr": "<V2" if dtype == "bfloat16" else number.str,
        "data": (buffer.data.ptr - low * number.itemsize, False)}))


@lru_cache(1)
def source_hash() -> str:
    """Of all kernels: whoever changes one, measures again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.cu*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
