"""The fastest algorithm by trying: ``config(tune=True)``.

Every row of the algorithm table that can run a problem is timed when the problem first comes, and the choice is kept:
in this process for good, so that results do not change between two calls, and on disk for the next one. The file
is ``tune.json`` in ``FASTCONV_CACHE_DIR``, ``$XDG_CACHE_HOME/fastconv`` or ``~/.cache/fastconv``; it is safe to delete.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastconv import plan
from fastconv.arrays import Array
from fastconv.problem import ConvProblem
from fastconv.tables import columns

__all__ = ["Choice", "cache_file", "choices", "choose", "table"]

ENTRIES = 4096
"""Problems that the file keeps; the oldest go first."""

# How often and how long at least each candidate runs, in turns; one that was not predicted to be the fastest has to be
# faster by this factor, so that noise decides less.
ROUNDS, ROUND_SECONDS, CLEARLY = 5, 0.004, 0.97

_FORMAT = 1


class Choice(NamedTuple):
    """What was chosen for a problem.

    Attributes
    ----------
    row, variant
        Of the algorithm table; on a GPU a name (`fastconv.backends.cuda.tune`).
    measured
        (name, seconds) of all that were compared.
    problem
        What it was chosen for.
    predicted
        Name of what would have run without a trial.
    """

    row: Any
    variant: str
    measured: tuple[tuple[str, float], ...]
    problem: str
    predicted: str

    @property
    def name(self) -> str:
        """Row and variant as in `measured`."""
        return plan.label(self.row.name, self.variant)


_choices: dict[str, Choice] = {}
_lock = threading.RLock()


def cache_file() -> Path:
    """Where choices are kept on disk."""
    folder = os.environ.get("FASTCONV_CACHE_DIR")
    if folder:
        return Path(folder, "tune.json")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache", "fastconv", "tune.json")


def choices() -> list[Choice]:
    """What was chosen in this process, in the order in which it was first asked for."""
    return list(_choices.values())


def choose(request: plan.Request) -> Choice:
    """The row and variant for `request`: as before in this process, as in the file, or the fastest of a trial."""
    if request.batch != request.problem.batch:
        request = replace(request, problem=replace(request.problem, batch=request.batch))
    return kept(_key(request), lambda entry: _parse(request, entry), lambda: _try(request))


def kept(key: str, parse: Callable[[Any], Choice | None], measure: Callable[[], Choice]) -> Choice:
    """The choice under `key`: as before in this process, as in the file if `parse` can read it, or as measured now."""
    with _lock:  # two trials at once would slow each other
        if key not in _choices:
            known = _read().get(key)
            choice = None if known is None else parse(known)
            if choice is None:
                choice = measure()
                _write(key, choice)
            _choices[key] = choice
        return _choices[key]


def table(chosen: Sequence[Choice]) -> str:
    """What was chosen, what would have run by prediction, and both times; a line each, and the sums."""
    lines = [("problem", "fastest", "without tuning", "ms", "without", "gain")]
    sums = [0.0, 0.0]
    for choice in chosen:
        times = dict(choice.measured)
        pair = times[choice.name], times.get(choice.predicted, times[choice.name])
        sums = [total + seconds for total, seconds in zip(sums, pair, strict=True)]
        lines.append((choice.problem, choice.name, "" if choice.predicted == choice.name else choice.predicted,
                      *_milliseconds(*pair)))
    lines.append((f"sum of {len(chosen)}, each once", "", "", *_milliseconds(*sums)))
    return "\n".join(columns(lines, 3))


def _milliseconds(best: float, other: float) -> tuple[str, str, str]:
    return f"{best * 1e3:.3f}", f"{other * 1e3:.3f}", f"{other / best:.2f}x" if best else ""


def _key(request: plan.Request) -> str:
    """What a choice depends on: version, machine, settings and problem."""
    import fastconv
    from fastconv.info import cpu_name

    r = request
    parts = (fastconv.__version__, cpu_name(), r.isa, r.threads, r.op, r.packed, r.exact, astuple(r.problem))
    return json.dumps(parts, separators=(",", ":"))


def describe(op: str, p: ConvProblem) -> str:
    """A problem in a few words."""
    x, w = ("x".join(map(str, shape)) for shape in (p.x_shape, p.w_shape))
    stride = "" if p.stride == (1, 1, 1) else " / " + "x".join(map(str, p.stride[3 - p.ndim:]))
    dtype = "" if p.dtype == "float32" else f" {p.dtype}"
    return f"{op} {x} * {w}{stride}{dtype} {p.order}"


# ---- Trials ----------------------------------------------------------------------------------------------------------

def _try(request: plan.Request) -> Choice:
    """Time all candidates in turns and take the fastest."""
    found = plan.candidates(request)
    runs = {}
    for row, variant in found:
        runs[plan.label(row.name, variant)] = _runner(plan.make_plan(request, row, variant))
    labels, predicted = list(runs), plan.predicted_choice(request)
    best, winner = race(runs, predicted, _seconds)
    return Choice(*found[labels.index(winner)], tuple(best.items()), describe(request.op, request.problem), predicted)


def race(runs: dict[str, Any], predicted: str, seconds: Callable[[Any], float]) -> tuple[dict[str, float], str]:
    """The shortest time of each run, and the name of the one to take: `predicted`, unless another is clearly faster."""
    best = dict.fromkeys(runs, math.inf)
    for turn in range(ROUNDS):
        for name, run in runs.items():
            if turn > 1 and best[name] > 3 * min(best.values()):
                continue  # out of the race
            best[name] = min(best[name], seconds(run))
    winner = predicted
    for name, time_of_it in best.items():
        if time_of_it < CLEARLY * best[predicted] and time_of_it < best[winner]:
            winner = name
    return best, winner


def _seconds(run: Any) -> float:
    """The fastest of the calls that fit a turn, the first of which warms up."""
    fastest, end = math.inf, time.perf_counter() + ROUND_SECONDS
    run()
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        fastest = min(fastest, now - start)
        if now >= end:
            return fastest


def _runner(tried: plan.Plan) -> Any:
    """Runs a plan on arrays of its own, laid out as the problem says."""
    p, engine, threads = tried.problem, tried.engine, tried.threads
    rng = np.random.default_rng(0)
    x, w, y = (_array(shape, strides, p.dtype, rng) for shape, strides in (
        (p.x_shape, p.x_strides), (p.w_shape, p.w_strides), (p.y_shape, p.y_strides)))
    if tried.op == "conv_weight_grad":
        return lambda: engine.run(x, y, w, threads)
    source, target = (x, y) if tried.op == "conv" else (y, x)
    weights = engine.pack(w, threads) if tried.request.packed else w
    return lambda: engine.run(source, weights, None, target, threads)


def _array(shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Array:
    """Random numbers under a shape and strides in elements of five axes."""
    seen = (*strides[:2], *strides[len(strides) - len(shape) + 2:])
    reach = [(n - 1) * s for n, s in zip(shape, seen, strict=True)]
    low, high = (sum(r for r in reach if (r < 0) == negative) for negative in (True, False))
    buffer = rng.random(max(high - low, 0) + 1, np.dtype(dtype).type)
    return np.lib.stride_tricks.as_strided(buffer[-low:], shape, [s * buffer.itemsize for s in seen])


# ---- The file --------------------------------------------------------------------------------------------------------

def _read() -> dict[str, Any]:
    """All entries of the file; none, with a warning, if it cannot be read."""
    path = cache_file()
    try:
        data = json.loads(path.read_text())
        entries = data["entries"]
        if data["format"] != _FORMAT or not isinstance(entries, dict):
            raise ValueError("it has another format")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"tune: {path} is ignored ({error}); what was measured will be measured again. "
                      "Hint: delete the file", RuntimeWarning, stacklevel=2)
        return {}
    return entries


def _parse(request: plan.Request, entry: Any) -> Choice | None:
    """An entry of the file as a choice; None if it is no entry, or names what cannot run."""
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        for row, variant in plan.candidates(request):
            if (row.name, variant) == (entry["algorithm"], entry["variant"]):
                measured = tuple((str(name), float(seconds)) for name, seconds in entry["seconds"].items())
                if plan.label(row.name, variant) in dict(measured):
                    words = describe(request.op, request.problem)
                    return Choice(row, variant, measured, words, plan.predicted_choice(request))
    return None


def _write(key: str, choice: Choice) -> None:
    """Add an entry to the file, which is replaced as a whole: readers see the old one or the new one."""
    path = cache_file()
    entries = _read()  # again: other processes write too
    entries.pop(key, None)
    entries[key] = {"algorithm": choice.row.name, "variant": choice.variant, "seconds": dict(choice.measured)}
    for oldest in list(entries)[:max(len(entries) - ENTRIES, 0)]:
        del entries[oldest]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="tune-", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"format": _FORMAT, "entries": entries}, file, indent=0)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        warnings.warn(f"tune: {path} cannot be written ({error}), so that the next process measures again. "
                      "Hint: FASTCONV_CACHE_DIR names a folder that can", RuntimeWarning, stacklevel=2)
