"""Where the time of a training step goes, layer by layer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv.functional.conv import explain
from fastconv.nn import Conv1d, Conv2d, Conv3d, Layer, Linear, Sequential

__all__ = ["LayerProfile", "profile", "profile_table"]

_PASSES = ("conv", "conv_input_grad", "conv_weight_grad")


@dataclass(frozen=True)
class LayerProfile:
    """Time and work of one layer.

    Attributes
    ----------
    algorithms
        What computes the output, the input gradient and the weight gradient; empty for layers without
        a convolution.
    macs
        Multiply-accumulates of the forward pass; both gradients together cost twice as many.
    """

    name: str
    output_shape: tuple[int, ...]
    algorithms: tuple[str, ...]
    macs: int
    forward_seconds: float
    backward_seconds: float

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds

    @property
    def gflops(self) -> float:
        """Speed over all three passes, an addition and a multiplication counting as two."""
        return 3 * 2 * self.macs / self.seconds / 1e9


def profile(model: Sequential, x: np.ndarray, *, repeats: int = 5) -> list[LayerProfile]:
    """Time forward and backward pass of each layer of `model` on the batch x (B, C, *spatial).

    Each layer runs `repeats` times after one run that fills the caches, and the fastest counts: the
    smallest time is the one least disturbed by other processes. A copy of the model is run, so that
    gradients and running statistics stay as they are.
    """
    rows = []
    for name, layer in copy.deepcopy(model).children():
        y, backward = layer.forward(x)
        dy = np.ones_like(y)
        plans = [explain(*_as_conv(layer, x), op=op) for op in _PASSES] if _as_conv(layer, x) else []
        rows.append(
            LayerProfile(
                name=f"{name} {type(layer).__name__}",
                output_shape=y.shape,
                algorithms=tuple(plan.algorithm for plan in plans),
                macs=plans[0].problem.macs if plans else 0,
                forward_seconds=_fastest(lambda: layer.forward(x), repeats),  # noqa: B023
                backward_seconds=_fastest(lambda: backward(dy), repeats),  # noqa: B023
            )
        )
        x = y
    return rows


def _as_conv(layer: Layer, x: np.ndarray) -> tuple[Any, ...]:
    """Arguments of the convolution that a layer runs on x, or none."""
    if isinstance(layer, (Conv1d, Conv2d, Conv3d)):
        return (x, layer.weight.value, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, Linear):  # one image whose pixels are the rows
        return (x.reshape(-1, x.shape[-1]).T[None], layer.weight.value[:, :, None])
    return ()


def _fastest(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def profile_table(rows: list[LayerProfile]) -> str:
    """Format profiles as a table with a line for the sum."""
    total = sum(row.seconds for row in rows)
    head = ("layer", "output", "algorithm", "forward", "backward", "GFLOP/s", "share")
    lines = [head] + [
        (
            row.name,
            "x".join(map(str, row.output_shape)),
            _algorithms(row.algorithms),
            f"{row.forward_seconds * 1e3:.3f} ms",
            f"{row.backward_seconds * 1e3:.3f} ms",
            f"{row.gflops:.1f}" if row.macs else "",
            f"{row.seconds / total:.1%}",
        )
        for row in rows
    ]
    lines.append(
        (
            "sum",
            "",
            "",
            f"{sum(row.forward_seconds for row in rows) * 1e3:.3f} ms",
            f"{sum(row.backward_seconds for row in rows) * 1e3:.3f} ms",
            f"{sum(3 * 2 * row.macs for row in rows) / total / 1e9:.1f}",
            "100.0%",
        )
    )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _algorithms(names: tuple[str, ...]) -> str:
    """One name if all passes agree, else "im2col, dx direct, dw im2col"."""
    if len(set(names)) < 2:
        return "".join(names[:1])
    return f"{names[0]}, dx {names[1]}, dw {names[2]}"
