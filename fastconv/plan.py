"""Which algorithm runs a convolution, and why: a table, most special row first, the reference last."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastconv import costs
from fastconv.backends import _cpu, lattice
from fastconv.config import Settings, settings
from fastconv.problem import ConvProblem

# Below this many multiply-accumulates (about 50 µs on one core) a second thread costs more than it brings.
SMALL = 1_500_000
# A dilated convolution is this many undilated ones at most, before their planning takes longer than it saves.
MAX_SUBGRIDS = 64

@dataclass(frozen=True)
class Request:
    """What is to be run, as the rows of the table see it.

    Attributes
    ----------
    op
        "conv", "conv_input_grad" or "conv_weight_grad".
    packed
        Whether the weights will be packed once and used many times.
    exact
        Whether algorithms that round more than the plain sum are forbidden.
    batch
        The batch size that the choice may consider: 1 if it must not depend on it.
    """

    problem: ConvProblem
    op: str
    isa: str
    relu: bool
    packed: bool
    exact: bool
    batch: int
    threads: int


Verdict = str | None  # None: the row serves; else the reason why not


@dataclass(frozen=True)
class Row:
    """One algorithm. `refuses` says what it cannot do, `declines` what it can do but another row does better, `engine`
    makes the compiled plan and says whether it covers all of the result."""

    name: str
    refuses: Callable[[Request], Verdict]
    declines: Callable[[Request], Verdict]
    engine: Callable[[Request], tuple[Any, bool]]


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


def _never(r: Request) -> Verdict:
    return None


# ---- Winograd ----------------------------------------------------------------------------------------------------

def _winograd_refuses(r: Request) -> Verdict:
    p = r.problem
    if r.op == "conv_weight_grad":
        return "it has no weight gradient"
    if r.exact:
        return "config(exact=True) forbids it: it rounds more than the plain sum"
    if p.stride != (1, 1, 1):
        return f"it needs stride 1, and it is {_seen(p, p.stride)}"
    if math.prod(p.dilation) > MAX_SUBGRIDS:
        return f"dilation {_seen(p, p.dilation)} makes {math.prod(p.dilation)} sub-grids, more than {MAX_SUBGRIDS}"
    if not _shapes_for(p):
        kernels = sorted({_seen(p, s.kernel) for s in costs.winograd_shapes()})
        return f"the kernel is {_seen(p, p.kernel)}, and it has transforms for {', '.join(map(str, kernels))}"
    return None


def _winograd_declines(r: Request) -> Verdict:
    shape = _best_shape(r)
    own = costs.winograd(r.problem, r.op, r.isa, shape, r.batch, r.packed)
    other = costs.direct(r.problem, r.op, r.isa, r.batch)
    if own < other:
        return None
    return f"{shape.name} would take about {own:,.0f} cycles, the plain sum {other:,.0f}"


def _shapes_for(p: ConvProblem) -> list[costs.Shape]:
    return [s for s in costs.winograd_shapes() if s.kernel == p.kernel]


def _best_shape(r: Request) -> costs.Shape:
    return min(_shapes_for(r.problem), key=lambda s: costs.winograd(r.problem, r.op, r.isa, s, r.batch, r.packed))


def _winograd(r: Request) -> tuple[Any, bool]:
    p = r.problem
    shape = costs.winograd_shapes().index(_best_shape(r))
    lattices = _lattices(r)[0]
    if p.dilation != (1, 1, 1):
        lattices = lattice.undilated(lattices[0], p.dilation)
    tasks = -(-4 * r.threads // len(lattices))
    parts = [_cpu.winograd_part(part, r.isa, p.dtype == "float64", shape, r.relu, tasks) for part in lattices]
    return _cpu.ConvPlan(parts, one_packing=True), True


# ---- Channelwise (depthwise) -------------------------------------------------------------------------------------

def _channelwise_refuses(r: Request) -> Verdict:
    if r.op == "conv_weight_grad":
        return "it has no weight gradient"
    if costs.channels(r.problem, r.op) != (1, 1):
        c, k = costs.channels(r.problem, r.op)
        return f"it needs groups of one input and one output channel, and these have {c} and {k}"
    return None


def _channelwise(r: Request) -> tuple[Any, bool]:
    lattices, covers = _lattices(r)
    double = r.problem.dtype == "float64"
    return _cpu.ConvPlan([_cpu.channelwise_part(part, r.isa, double, r.relu) for part in lattices]), covers


# ---- Direct and im2col -------------------------------------------------------------------------------------------

def _direct_refuses(r: Request) -> Verdict:
    x, _, step = _operands(r)
    if r.op == "conv_weight_grad":
        if x[1] != 1:
            return f"it reads x in place, which needs channels with stride 1 (channels_last), and theirs is {x[1]}"
        return None
    if x[1] != 1 and x[4] * step != 1:
        return (f"it reads its input in place, which needs channels or pixels with stride 1, and theirs are {x[1]} "
                f"and {x[4]} * {step} = {x[4] * step}")
    return None


def _direct_declines(r: Request) -> Verdict:
    p = r.problem
    x, y, _ = _operands(r)
    rows, columns = _cpu.tile(r.isa, p.dtype)
    channels, _ = costs.channels(p, r.op)
    if r.op == "conv_weight_grad":
        if channels < rows // 2:
            return f"{channels} channels per group fill too little of a tile of {rows} rows"
        return None
    width = (p.in_size[2] // p.stride[2]) if r.op == "conv_input_grad" else p.out_size[2]
    by_pixels = y[1] == 1
    if p.taps == 1 and not any(p.pad_lo + p.pad_hi):
        return None
    if by_pixels and x[1] == 1 and 2 * width < rows:
        return f"rows of {width} pixels are too short for tiles of {rows} pixels"
    if by_pixels and x[1] != 1:
        return f"its channels have stride {x[1]}, so every patch has to be gathered"
    if not by_pixels and width < 4 * columns and p.taps > 1:
        return f"rows of {width} pixels have too few inner tiles of {columns} pixels"
    if not by_pixels and channels < rows:
        return f"{channels} channels per tap are too short a run of products"
    return None


def _operands(r: Request) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Strides of the array that is read in patches and of the one that is written (or, for the weight gradient,
    read), and the step between patches."""
    p = r.problem
    if r.op == "conv_input_grad":
        return p.y_strides, p.x_strides, 1
    return p.x_strides, p.y_strides, p.stride[2]


def _gemm(r: Request, gather: bool) -> tuple[Any, bool]:
    p, double = r.problem, r.problem.dtype == "float64"
    if r.op == "conv_weight_grad":
        return _cpu.WeightGradPlan(lattice.forward(p), r.isa, double, gather), True
    lattices, covers = _lattices(r)
    return _cpu.ConvPlan([_cpu.gemm_part(part, r.isa, double, gather, r.relu) for part in lattices]), covers


def _lattices(r: Request) -> tuple[tuple[lattice.Lattice, ...], bool]:
    return ((lattice.forward(r.problem),), True) if r.op == "conv" else lattice.input_grad(r.problem)


def _seen(p: ConvProblem, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes[3 - p.ndim:]


ROWS = (
    Row("winograd", _winograd_refuses, _winograd_declines, _winograd),
    Row("channelwise", _channelwise_refuses, _never, _channelwise),
    Row("direct", _direct_refuses, _direct_declines, lambda r: _gemm(r, gather=False)),
    Row("im2col", _never, _never, lambda r: _gemm(r, gather=True)),
    Row("reference", _never, _never, lambda r: (None, True)),
)

_plans: OrderedDict[Any, Plan] = OrderedDict()
_PLANS = 1024


def plan_for(problem: ConvProblem, op: str, algorithm: str = "auto", *, relu: bool = False,
             packed: bool = False) -> Plan:
    """Choose the algorithm for a pass and prepare it; plans are cached.

    Parameters
    ----------
    op
        "conv", "conv_input_grad" or "conv_weight_grad".
    algorithm
        "auto", or the name of the row to force; "auto" gives way to ``config(algorithm=...)``.
    relu
        Whether max(., 0) is applied to the result ("conv" only).
    packed
        Whether the weights are packed once and used many times.

    Raises
    ------
    ValueError
        If the row that is forced refuses, with its reason.
    """
    key = (problem, op, algorithm, relu, packed, settings())
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _choose(problem, op, algorithm, relu, packed, settings())
        while len(_plans) > _PLANS:
            try:
                _plans.popitem(last=False)
            except KeyError:  # another thread was faster
                break
    return plan


def cached_plans() -> int:
    """How many plans are kept."""
    return len(_plans)


def _choose(problem: ConvProblem, op: str, algorithm: str, relu: bool, packed: bool, current: Settings) -> Plan:
    if algorithm == "auto":
        algorithm = current.algorithm
    names = [row.name for row in ROWS]
    if algorithm != "auto" and algorithm not in names:
        raise ValueError(f"{op}: algorithm is {algorithm!r}, but one of 'auto', {', '.join(map(repr, names))} is "
                         "needed. Hint: 'auto' lets fastconv choose, and fastconv.explain says what and why")
    request = Request(problem, op, current.isa, relu, packed, current.exact,
                      1 if current.batch_invariant else problem.batch, current.threads)
    refused = []
    for row in ROWS:
        if algorithm not in ("auto", row.name):
            continue
        reason = row.refuses(request)
        if reason and algorithm == row.name:
            raise ValueError(f"{op}: algorithm is {algorithm!r}, but that cannot run this problem: {reason}. "
                             "Hint: algorithm='auto', or fastconv.to_channels_last(input)")
        reason = reason or (row.declines(request) if algorithm == "auto" else None)
        if reason:
            refused.append((row.name, reason))
            continue
        engine, covers = row.engine(request)
        return Plan(problem, op, row.name, current.isa if engine else "numpy", tuple(refused), engine, covers)
    raise AssertionError("the reference serves every problem")
