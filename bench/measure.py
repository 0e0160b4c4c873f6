"""Time one row in this process: reads a job from standard input, prints the result as its last line (both JSON)."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from peers import PEERS, Case, Peer, Run, Unsupported, algorithm, arrays, make_case
from shapes import Row

BURST_SECONDS = 0.04  # how long one peer runs before the next one's turn
MOST_CALLS = 500
# Between bursts: idle threads of GNU OpenMP spin for 300 000 pause instructions, 6 to 13 ms, those of LLVM's as ncnn
# sets it up for 20 ms, and would take a core from the next peer.
PAUSE_SECONDS = 0.025
WRONG = 1e-3  # a result that is off by more, relative to the rms, is of another computation

Result = tuple[np.ndarray, ...]


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run all peers of a job in turns.

    Parameters
    ----------
    job
        row (a dict), peers (names), direction, threads, rounds; see `compare.py`.

    Returns
    -------
    dict
        times: per peer the smallest and the median call in seconds; notes: why a peer has none; algorithms: what
        fastconv ran, per order; extra_bytes: most memory that fastconv held at a time above the operands.
    """
    row = Row(**{key: tuple(value) if isinstance(value, list) else value for key, value in job["row"].items()})
    notes: dict[str, str] = {}
    algorithms: dict[str, str] = {}
    runs: dict[str, Run] = {}
    results: dict[str, Result] = {}
    cases: list[Case] = []  # whose arrays peers read without holding them
    extra_bytes = None
    for name in job["peers"]:
        peer = PEERS[name]
        try:
            case = make_case(row, job["direction"], job["threads"], peer.order)
            cases.append(case)
            if name.startswith("fastconv"):
                algorithms[name] = algorithm(case)  # this imports fastconv, whose own size is not counted
            if not runs and algorithms:
                run, result, extra_bytes = _first_run(peer, case)
            else:
                run = peer.make(case)
                result = arrays(run())
            results[name] = tuple(a.astype(np.float64).ravel() for a in result)
            runs[name] = run
        except ImportError as error:
            notes[name] = f"not installed ({error})"
        except Unsupported as reason:
            notes[name] = str(reason)
        except Exception as error:  # the other peers are to go on
            notes[name] = f"failed: {type(error).__name__}: {error}"
    notes |= _wrong(results)
    times = _take_turns({name: run for name, run in runs.items() if name not in notes}, job["rounds"])
    return {"times": times, "notes": notes, "algorithms": algorithms, "extra_bytes": extra_bytes}


def _first_run(peer: Peer, case: Case) -> tuple[Run, Result, int | None]:
    """Make a run, run it, and see how much memory both took at most, results aside."""
    before = _memory("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    except OSError:
        before = None
    run = peer.make(case)
    result = arrays(run())
    if before is None:
        return run, result, None
    returned = sum(a.nbytes for a in result if not np.shares_memory(a, case.y))
    return run, result, max(0, (_memory("VmHWM") or 0) - before - returned)


def _memory(field: str) -> int | None:
    """A field of Linux's /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _wrong(results: Mapping[str, Result]) -> dict[str, str]:
    """Notes on the peers whose results differ from torch's or, without it, from those of the first."""
    if not results:
        return {}
    right = results.get("torch", next(iter(results.values())))
    notes = {}
    for name, result in results.items():
        if [a.size for a in result] != [b.size for b in right]:
            notes[name] = f"wrong: {[a.size for a in result]} elements, not {[b.size for b in right]}"
            continue
        errors = [np.abs(a - b).max() / np.sqrt(np.mean(b**2)) for a, b in zip(result, right, strict=True)]
        if not max(errors) <= WRONG:  # NaN is wrong too
            notes[name] = f"wrong: off by {max(errors):.2g} of the rms"
    return notes


def _take_turns(runs: Mapping[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    calls = {name: min(max(int(BURST_SECONDS / _seconds(run)), 1), MOST_CALLS) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.disable()
    for i in range(rounds):
        start = i % max(len(names), 1)
        for name in names[start:] + names[:start]:  # nobody always follows the same peer
            time.sleep(PAUSE_SECONDS)
            runs[name]()
            samples[name] += [_seconds(runs[name]) for _ in range(calls[name])]
    return {name: {"min": min(taken), "median": median(taken)} for name, taken in samples.items()}


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    print("\n" + json.dumps(measure(json.load(sys.stdin))))
