"""What a call costs above its kernel, on small layers: ``python bench/overhead.py``.

The kernel alone is the same compiled plan with packed weights, run in a loop on one output.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import fastconv
from fastconv import functional, nn
from fastconv.plan import plan_for
from fastconv.problem import conv_problem

LAYERS = {  # input, filters, kernel
    "LeNet 1->6 5x5, 32x32": ((1, 1, 32, 32), 6, 5),
    "LeNet 6->16 5x5, 14x14": ((1, 6, 14, 14), 16, 5),
    "1x1 8->8, 4x4": ((1, 8, 4, 4), 8, 1),
}


def timed(runs: dict[str, Callable[[], Any]], calls: int, rounds: int) -> dict[str, float]:
    """Median over `rounds` of the time of a call in µs, taken in turns of `calls` calls."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    gc.disable()
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(calls // 10):
                run()
            start = perf_counter()
            for _ in range(calls):
                run()
            samples[name].append((perf_counter() - start) / calls * 1e6)
    gc.enable()
    return {name: median(taken) for name, taken in samples.items()}


def layer_runs(x_shape: tuple[int, ...], filters: int, kernel: int, order: str) -> dict[str, Callable[[], Any]]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(x_shape, np.float32)
    if order == "channels_last":
        x = fastconv.to_channels_last(x)
    layer = nn.Conv2d(x_shape[1], filters, kernel, rng=0)
    assert layer.bias is not None
    w, b = layer.weight.value, layer.bias.value
    prepared = fastconv.prepare_conv(w, b)
    plan = plan_for(conv_problem(x, w), "conv", packed=True)
    packed, y = plan.engine.pack(w, 1), prepared(x)
    engine = plan.engine.run

    return {
        "kernel": lambda: engine(x, packed, b, y, 1),
        "functional.conv2d": lambda: functional.conv2d(x, w, b),
        "prepare_conv": lambda: prepared(x),
        "nn.Conv2d": lambda: layer(x),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=500, help="in a turn (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="turns (default %(default)s)")
    options = parser.parse_args(arguments)
    for name, (x_shape, filters, kernel) in LAYERS.items():
        for order in ("contiguous", "channels_last"):
            times = timed(layer_runs(x_shape, filters, kernel, order), options.calls, options.rounds)
            base = times.pop("kernel")
            rest = ", ".join(f"{run} +{time - base:.2f}" for run, time in times.items())
            print(f"{name:<24} {order:<14} kernel {base:6.2f} µs; {rest}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
