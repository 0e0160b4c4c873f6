"""Which algorithm runs a convolution, and why: a table, most special row first, the reference last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastconv.backends import _cpu, lattice
from fastconv.config import settings
from fastconv.problem import ConvProblem

# Below this many multiply-accumulates (about 50 µs on one core) a second thread costs more than it brings.
SMALL = 1_500_000

Verdict = str | None  # None: the row serves; else the reason why not


@dataclass(frozen=True)
class Row:
    """One algorithm. `refuses` says what it cannot do, `declines` what it can do but another row does better."""

    name: str
    refuses: Callable[[ConvProblem, str, str], Verdict]
    declines: Callable[[ConvProblem, str, str], Verdict]


@dataclass(frozen=True)
class Plan:
    """How one pass of one problem runs; made by `plan_for`.

    Attributes
    ----------
    op
        "conv", "conv_input_grad" or "conv_weight_grad".
    algorithm
        Name of the row that was chosen.
    refused
        (row, reason) of every row above it.
    engine
        The compiled plan; None for the reference.
    covers
        False if parts of dx meet no tap, so that they must be filled in beforehand.
    """

    problem: ConvProblem
    op: str
    algorithm: str
    isa: str
    refused: tuple[tuple[str, str], ...]
    engine: Any = field(compare=False)
    covers: bool = True

    @property
    def threads(self) -> int:
        """Threads that the pass uses under the current settings."""
        return 1 if self.problem.macs < SMALL else settings().threads

    def __str__(self) -> str:
        p = self.problem
        rows = [f"{self.op}: {self.algorithm} ({self.isa}), {self.threads} thread(s)",
                f"  x {p.x_shape}, w {p.w_shape}, y {p.y_shape}, {p.dtype}, {p.order}, {p.macs / 1e6:.3g} MMAC"]
        if self.engine is not None:
            rows.append(f"  {self.engine.tasks} tasks, {self.engine.workspace_bytes / 1024:.0f} KiB of workspace "
                        "per thread")
        rows += [f"  not {name}: {reason}" for name, reason in self.refused]
        return "\n".join(rows)


def _never(problem: ConvProblem, op: str, isa: str) -> Verdict:
    return None


def _direct_refuses(p: ConvProblem, op: str, isa: str) -> Verdict:
    x, _, step = _operands(p, op)
    if op == "conv_weight_grad":
        if x[1] != 1:
            return f"it reads x in place, which needs channels with stride 1 (channels_last), and theirs is {x[1]}"
        return None
    if x[1] != 1 and x[4] * step != 1:
        return (f"it reads its input in place, which needs channels or pixels with stride 1, and theirs are {x[1]} "
                f"and {x[4]} * {step} = {x[4] * step}")
    return None


def _direct_declines(p: ConvProblem, op: str, isa: str) -> Verdict:
    x, y, _ = _operands(p, op)
    rows, columns = _cpu.tile(isa, p.dtype)
    channels = (p.out_channels if op == "conv_input_grad" else p.in_channels) // p.groups
    if op == "conv_weight_grad":
        if channels < rows // 2:
            return f"{channels} channels per group fill too little of a tile of {rows} rows"
        return None
    width = (p.in_size[2] // p.stride[2]) if op == "conv_input_grad" else p.out_size[2]
    by_pixels = y[1] == 1
    if p.taps == 1 and not any(p.pad_lo + p.pad_hi):
        return None
    if by_pixels and x[1] == 1 and 2 * width < rows:
        return f"rows of {width} pixels are too short for tiles of {rows} pixels"
    if by_pixels and x[1] != 1:
        return f"its channels have stride {x[1]}, so every patch has to be gathered"
    if not by_pixels and width < columns:
        return f"rows of {width} pixels are too short for tiles of {columns} pixels"
    return None


def _operands(p: ConvProblem, op: str) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Strides of the array that is read in patches and of the one that is written (or, for the weight gradient,
    read), and the step between patches."""
    if op == "conv_input_grad":
        return p.y_strides, p.x_strides, 1
    return p.x_strides, p.y_strides, p.stride[2]


ROWS = (
    Row("direct", _direct_refuses, _direct_declines),
    Row("im2col", _never, _never),
    Row("reference", _never, _never),
)

_plans: OrderedDict[Any, Plan] = OrderedDict()
_PLANS = 1024


def plan_for(problem: ConvProblem, op: str, algorithm: str = "auto", *, relu: bool = False) -> Plan:
    """Choose the algorithm for a pass and prepare it; plans are cached.

    Parameters
    ----------
    op
        "conv", "conv_input_grad" or "conv_weight_grad".
    algorithm
        "auto", or the name of the row to force; "auto" gives way to ``config(algorithm=...)``.
    relu
        Whether max(., 0) is applied to the result ("conv" only).

    Raises
    ------
    ValueError
        If the row that is forced refuses, with its reason.
    """
    current = settings()
    if algorithm == "auto":
        algorithm = current.algorithm
    key = (problem, op, algorithm, current.isa, relu)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _choose(problem, op, algorithm, current.isa, relu)
        while len(_plans) > _PLANS:
            try:
                _plans.popitem(last=False)
            except KeyError:  # another thread was faster
                break
    return plan


def cached_plans() -> int:
    """How many plans are kept."""
    return len(_plans)


def _choose(problem: ConvProblem, op: str, algorithm: str, isa: str, relu: bool) -> Plan:
    names = [row.name for row in ROWS]
    if algorithm != "auto" and algorithm not in names:
        raise ValueError(f"{op}: algorithm is {algorithm!r}, but one of 'auto', {', '.join(map(repr, names))} is "
                         "needed. Hint: 'auto' lets fastconv choose, and fastconv.explain says what and why")
    refused = []
    for row in ROWS:
        if algorithm not in ("auto", row.name):
            continue
        reason = row.refuses(problem, op, isa)
        if reason and algorithm == row.name:
            raise ValueError(f"{op}: algorithm is {algorithm!r}, but that cannot run this problem: {reason}. "
                             "Hint: algorithm='auto', or fastconv.to_channels_last(input)")
        reason = reason or (algorithm == "auto" and row.declines(problem, op, isa)) or None
        if reason:
            refused.append((row.name, reason))
            continue
        engine, covers = _ENGINES[row.name](problem, op, isa, row.name, relu)
        return Plan(problem, op, row.name, isa if engine else "numpy", tuple(refused), engine, covers)
    raise AssertionError("the reference serves every problem")


def _compiled(problem: ConvProblem, op: str, isa: str, algorithm: str, relu: bool) -> tuple[Any, bool]:
    double, gather = problem.dtype == "float64", algorithm == "im2col"
    if op == "conv_weight_grad":
        return _cpu.WeightGradPlan(lattice.forward(problem), isa, double, gather), True
    lattices, covers = ((lattice.forward(problem),), True) if op == "conv" else lattice.input_grad(problem)
    return _cpu.ConvPlan(lattices, isa, double, gather, relu), covers


def _no_engine(problem: ConvProblem, op: str, isa: str, algorithm: str, relu: bool) -> tuple[Any, bool]:
    return None, True


_ENGINES = {"direct": _compiled, "im2col": _compiled, "reference": _no_engine}
