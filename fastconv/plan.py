"""Which algorithm runs a convolution, and why: a table, most special row first, the reference last."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fastconv import costs
from fastconv.backends import _cpu, lattice
from fastconv.config import Settings, settings, token
from fastconv.problem import ConvProblem
from fastconv.tables import human

# Below this many multiply-accumulates (10 to 50 µs on one core) a second thread costs more than it brings.
SMALL = 1_000_000
# The same where loads and stores are most of the work.
SMALL_CHANNELWISE = 400_000
# Parts into which Winograd cuts a kernel; bytes of its transformed weights beyond 4 times the weights (8 times in 3D).
MAX_WINOGRAD_TERMS = 16
MAX_WINOGRAD_BYTES = 18 << 20
# Pixels of an image from which on im2col's weight gradient, image by image, is worth it.
SHORT_IMAGE = 4
# Vectors of pixels of an image, below which too many lanes are empty if they are pixels.
FEW_VECTORS = 8
# Pixels of a phase up to which the direct algorithm packs weights in its tasks (csrc/conv_direct.c), and panels from
# which on; with more threads it wants more of them, but a choice that knew that would give other bits.
RAW_PIXELS, RAW_PANELS = 4096, 4
# Channels of an input in NCHW up to which it may be copied for lanes of pixels, also at a stride, which deals it out.
MOST_COPIED, MOST_COPIED_STRIDED = 16, 4
# Most bytes of a thread's copy of the input for a few outputs.
MAX_COPY = 8 << 20

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
    variant
        Which of its variants a row must take (Winograd's tile, by name); "" leaves that to the row.
    """

    problem: ConvProblem
    op: str
    isa: str
    relu: bool
    packed: bool
    exact: bool
    batch: int
    threads: int
    variant: str = ""

    @cached_property
    def shapes(self) -> dict[str, tuple[costs.Shape, float]]:
        """By name, Winograd's shapes that serve, and the cycles that each is predicted to take."""
        return {s.name: (s, costs.winograd(self.problem, self.op, self.isa, s, self.batch, self.packed))
                for s in _shapes_for(self.problem, self.op)}

    @cached_property
    def shape(self) -> tuple[costs.Shape, float]:
        """The best of them, or the one that is asked for."""
        return self.shapes[self.variant] if self.variant else min(self.shapes.values(), key=lambda shape: shape[1])


Verdict = str | None  # None: the row serves; else the reason why not


@dataclass(frozen=True)
class Row:
    """One algorithm. `refuses` says what it cannot do, `declines` what it can do but another row does better, `engine`
    makes the compiled plan and says whether it covers all of the result, `cycles` predicts its time and `variants`
    names the forms that it can take."""

    name: str
    refuses: Callable[[Request], Verdict]
    declines: Callable[[Request], Verdict]
    engine: Callable[[Request], tuple[Any, bool]]
    cycles: Callable[[Request], float]
    variants: Callable[[Request], tuple[str, ...]] = lambda r: ("",)


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
        (row, reason) of every row above it, or of every row that cannot run this where `measured` says the rest.
    engine
        The compiled plan; None for the reference.
    covers
        False if parts of dx meet no tap, so that they must be filled in beforehand.
    request
        What the rows of the table were asked.
    relu
        Whether max(., 0) is applied to the result.
    variant
        The form that the row takes: Winograd's tile.
    measured
        (name, seconds) of what tuning compared; empty if the choice was by prediction.
    """

    problem: ConvProblem
    op: str
    algorithm: str
    isa: str
    refused: tuple[tuple[str, str], ...]
    engine: Any = field(compare=False)
    request: Request = field(compare=False)
    covers: bool = True
    relu: bool = False
    variant: str = ""
    measured: tuple[tuple[str, float], ...] = ()

    @property
    def threads(self) -> int:
        """Threads that the pass uses under the current settings."""
        small = SMALL_CHANNELWISE if self.algorithm == "channelwise" else SMALL
        return 1 if self.problem.macs < small else settings().threads

    @property
    def predicted(self) -> tuple[tuple[str, float], ...]:
        """(name, cycles of one core) of every row and variant that could run this, in the order of the table."""
        return tuple((label(row.name, variant), row.cycles(replace(self.request, variant=variant)))
                     for row, variant in candidates(self.request))

    def __str__(self) -> str:
        p = self.problem
        rows = [f"{self.op}: {label(self.algorithm, self.variant)} ({self.isa}), {self.threads} thread(s)",
                f"  x {p.x_shape}, w {p.w_shape}, y {p.y_shape}, {p.dtype}, {p.order}, {p.macs / 1e6:.3g} MMAC"]
        if self.engine is not None:
            rows.append(f"  {self.engine.tasks} tasks, {self.engine.workspace_bytes / 1024:.0f} KiB of workspace "
                        "per thread")
        rows += [f"  not {name}: {reason}" for name, reason in self.refused]
        threads = 1 if self.engine is None else min(self.threads, self.engine.tasks)
        gigahertz = costs.clock() / 1e9
        for name, cycles in self.predicted:
            rows.append(f"  predicted {name}: {human(cycles, 'cycles')}, {cycles / gigahertz / 1e6 / threads:.3g} ms "
                        f"with {threads} thread(s) of {gigahertz:.2g} GHz")
        rows += [f"  measured {name}: {seconds * 1e3:.3g} ms" for name, seconds in self.measured]
        return "\n".join(rows)


def label(algorithm: str, variant: str = "") -> str:
    """"winograd f4x4_3x3", "direct"."""
    return f"{algorithm} {variant}" if variant else algorithm


def _never(r: Request) -> Verdict:
    return None


# ---- Winograd ----------------------------------------------------------------------------------------------------

def _winograd_refuses(r: Request) -> Verdict:
    p = r.problem
    if r.exact:
        return "config(exact=True) forbids it: it rounds more than the plain sum"
    if r.op == "conv_weight_grad" and p.stride != (1, 1, 1):
        return f"its weight gradient needs stride 1, and it is {_seen(p, p.stride)}"
    if costs.dilation(p) != (1, 1, 1) and p.stride != (1, 1, 1):
        return f"it needs stride 1 or dilation 1, and they are {_seen(p, p.stride)} and {_seen(p, p.dilation)}"
    if not r.shapes:
        if r.op == "conv_weight_grad":
            kernels = sorted({_seen(p, s.kernel) for s in costs.winograd_shapes()})
            return (f"the kernel is {_seen(p, p.kernel)}, and it has transforms for {', '.join(map(str, kernels))}"
                    + (" and depths of 2D ones" if p.ndim == 3 else ""))
        more = f"{MAX_WINOGRAD_BYTES >> 20} MB more than {8 if p.ndim == 3 else 4} times the weights"
        return (f"the kernel is {_seen(p, p.kernel)} at stride {_seen(p, p.stride)}, and it has transforms for kernels "
                f"larger than the stride, of 1 to 3 axes, the last ones, that fall into at most {MAX_WINOGRAD_TERMS} "
                f"parts and take at most {more}")
    return None


def _winograd_declines(r: Request) -> Verdict:
    shape, own = r.shape
    other = _direct_cycles(r)
    if _channelwise_refuses(r) is None and _channelwise_declines(r) is None:
        other = min(other, costs.channelwise(r.problem, r.op, r.isa, r.batch))
    if own < other:
        return None
    return f"{shape.name} would take about {own:,.0f} cycles, the plain sum {other:,.0f}"


def _shapes_for(p: ConvProblem, op: str) -> list[costs.Shape]:
    """Shapes that transform the axes along which the kernel has several taps, and cut it into few and whole parts."""
    if op == "conv_weight_grad":
        whole = [s for s in costs.winograd_shapes() if s.kernel == p.kernel]
        return whole or [s for s in costs.winograd_shapes() if s.kernel == (1, *p.kernel[1:])]  # depth by depth
    taps = max(-(-k // s) for k, s in zip(p.kernel, p.stride, strict=True))
    return [s for s in costs.winograd_shapes()
            if all((n > 1) == (k > 1) for n, k in zip(s.points, p.kernel, strict=True))
            and (taps % s.taps == 0 or (s.taps == 3 and taps > 3)) and _is_small(p, op, s)]


def _is_small(p: ConvProblem, op: str, shape: costs.Shape) -> bool:
    """Whether a shape has few terms, and transformed weights that do not surprise anybody."""
    axes = costs.winograd_phases(p, op, shape)
    weights = p.taps * p.out_channels * (p.in_channels // p.groups) * (4 if p.dtype == "float32" else 8)
    transformed = weights / p.taps * math.prod(shape.points) * math.prod(
        sum(len(phase.parts) for phase in phases) for phases in axes)
    return (math.prod(max(len(phase.parts) for phase in phases) for phases in axes) <= MAX_WINOGRAD_TERMS
            and transformed <= weights * (8 if p.ndim == 3 else 4) + MAX_WINOGRAD_BYTES)


def _winograd_variants(r: Request) -> tuple[str, ...]:
    return tuple(r.shapes)


def _winograd_cycles(r: Request) -> float:
    return r.shape[1]


def _winograd(r: Request) -> tuple[Any, bool]:
    p = r.problem
    shape = costs.winograd_shapes().index(r.shape[0])
    if r.op == "conv_weight_grad":
        return _weight_grad(r, "winograd", shape)
    lattices, covered = _lattices(r)
    tasks = -(-r.threads // max(len(lattices), 1))
    return _cpu.ConvPlan([_cpu.winograd_part(part, r.isa, p.dtype == "float64", shape, r.relu, costs.dilation(p), tasks,
                                             not r.packed) for part in lattices]), covered


# ---- Channelwise (depthwise) -------------------------------------------------------------------------------------

def _channelwise_refuses(r: Request) -> Verdict:
    lanes = _cpu.vector_lanes(r.isa, r.problem.dtype)
    c, k = costs.channels(r.problem, r.op)
    if max(c, k) > lanes:
        return f"it needs groups that fit a vector of {lanes} channels, and these have {c} and {k}"
    return None


def _channelwise_declines(r: Request) -> Verdict:
    if r.problem.groups == 1 and costs.channels(r.problem, r.op) != (1, 1):
        return "there is one group, of several channels"
    own, other = costs.channelwise(r.problem, r.op, r.isa, r.batch), _direct_cycles(r)
    if r.op != "conv_weight_grad" and max(costs.channels(r.problem, r.op)) > 1 and other < own:
        return f"it would take about {own:,.0f} cycles, the plain sum {other:,.0f}"
    return None


def _channelwise(r: Request) -> tuple[Any, bool]:
    if r.op == "conv_weight_grad":
        return _weight_grad(r, "channelwise")
    lattices, covers = _lattices(r)
    double = r.problem.dtype == "float64"
    return _cpu.ConvPlan([_cpu.channelwise_part(part, r.isa, double, r.relu) for part in lattices]), covers


# ---- Direct and im2col -------------------------------------------------------------------------------------------

def _direct_refuses(r: Request) -> Verdict:
    p = r.problem
    read, _ = costs.channels(p, r.op)
    if r.op == "conv_weight_grad":
        read = min(read, costs.WGRAD_CHANNELS)
    size = math.prod((k - 1) * d + 1 for k, d in zip(p.kernel[:2], p.dilation[:2], strict=True)) * read * 4
    size *= (p.kernel[2] - 1) * p.dilation[2] + 2 * _cpu.tile(r.isa, p.dtype)[0] * p.stride[2]
    if size > MAX_COPY:
        return f"the rows that the taps of a few outputs span take {size / 2**20:.3g} MiB, more than {MAX_COPY >> 20}"
    return None


def _direct_declines(r: Request) -> Verdict:
    p = r.problem
    _, written = costs.channels(p, r.op)
    if r.op == "conv_weight_grad":
        in_place = p.taps == 1 and p.x_strides[1] == p.y_strides[1] == 1 and not any(p.pad_lo + p.pad_hi)
        if in_place and (p.batch == 1 or math.prod(p.out_size) >= SHORT_IMAGE):
            return "it copies what im2col reads in place"
        return None
    own, other = (predict(r.problem, r.op, r.isa, r.batch) for predict in (costs.direct, costs.im2col))
    if own <= other or _lanes_are_pixels(r) or _linear(r.problem, r.op):
        return None
    lanes = _cpu.vector_lanes(r.isa, r.problem.dtype)
    return (f"it would take about {own:,.0f} cycles with {written} channels per group in vectors of {lanes}, "
            f"im2col {other:,.0f}")


def _lanes_are_pixels(r: Request) -> bool:
    """Few channels fill too little of a vector; of a strided input gradient, the phases of a row are interleaved; few
    inputs are copied sooner than outputs are transposed to NCHW."""
    p = r.problem
    read, written = costs.channels(p, r.op)
    phased = r.op == "conv_input_grad" and p.stride[2] > 1 and p.x_strides[1] != 1
    in_place = p.taps == 1 and (_pointwise(p) or costs.strides_read(p, r.op)[1] == 1)
    if phased or (2 * written < _cpu.vector_lanes(r.isa, p.dtype) and not in_place):
        return True
    most = MOST_COPIED if p.stride[2] == 1 else MOST_COPIED_STRIDED
    planes = r.op == "conv" and p.taps > 1 and read <= most and p.y_strides[1] != 1
    return planes and costs.pixels(p, r.op, r.isa, r.batch) < costs.direct(p, r.op, r.isa, r.batch)


def _linear(p: ConvProblem, op: str) -> bool:
    """Whether the images of the batch are pixels of one product."""
    if op == "conv_input_grad":
        return lattice.linear_input_grad(p) is not None
    return op == "conv" and p.out_size == (1, 1, 1) and p.batch > 1 and not any(p.pad_lo + p.pad_hi)


def _direct_cycles(r: Request) -> float:
    if r.op == "conv_weight_grad":
        return costs.direct(r.problem, r.op, r.isa, r.batch)
    as_rows = _lanes_are_pixels(r)
    predict = costs.pixels if as_rows else costs.direct
    return predict(r.problem, r.op, r.isa, r.batch) + _packing(r, as_rows)


def _packing(r: Request, as_rows: bool = False) -> float:
    return 0 if r.packed else costs.packing(r.problem, r.op, r.isa, _packs_in_tasks(r), as_rows)


def _packs_in_tasks(r: Request) -> bool:
    """Whether the direct algorithm packs the phases of a strided gradient in its tasks, nearly as fc_direct_raw_block
    decides; other convolutions, for which it also may, have no faster algorithm that they could be taken for."""
    p = r.problem
    phased = r.op == "conv_input_grad" and p.stride != (1, 1, 1) and not _lanes_are_pixels(r)
    panels = p.groups * -(-costs.channels(p, r.op)[1] // _cpu.tile(r.isa, p.dtype)[1])
    return phased and panels >= RAW_PANELS and r.batch * math.prod(p.out_size) <= RAW_PIXELS


def _direct(r: Request) -> tuple[Any, bool]:
    if r.op == "conv_weight_grad":
        return _weight_grad(r, "direct")
    p, double = r.problem, r.problem.dtype == "float64"
    _, written = costs.channels(p, r.op)
    lattices, covers = _lattices(r)
    to_strides = p.x_strides if r.op == "conv_input_grad" else p.y_strides
    lanes = _cpu.vector_lanes(r.isa, p.dtype)
    planes = to_strides[1] != 1 if written > 1 else costs.strides_read(p, r.op)[1] != 1
    columns = _pointwise(p) and planes and (2 * written < lanes or math.prod(p.out_size) >= FEW_VECTORS * lanes)
    if columns:  # pixels are lanes: nothing has to be copied or transposed
        return _cpu.ConvPlan([_cpu.gemm_part(part, r.isa, double, False, r.relu) for part in lattices]), covers
    whole = lattice.linear_input_grad(p) if r.op == "conv_input_grad" else None
    if whole is not None:
        lattices, covers = (whole,), True
    elif _linear(p, r.op):
        lattices = (lattice.linear(lattices[0]),)
    tasks = 1 if p.macs < SMALL else -(-4 * r.threads // max(len(lattices), 1))
    if r.op == "conv_input_grad" and whole is None and (sets := lattice.interleaved_input_grad(p)):
        return _cpu.ConvPlan([_cpu.pixels_part(rows, r.isa, double, r.relu, tasks) for rows in sets]), covers
    if _lanes_are_pixels(r) and whole is None:
        n = max(lattice.width_phases(p), 1) if r.op == "conv_input_grad" else 1
        return _cpu.ConvPlan([_cpu.pixels_part(lattices[i:i + n], r.isa, double, r.relu, tasks)
                              for i in range(0, len(lattices), n)]), covers
    raw = _cpu.direct_raw_part(lattices, r.isa, double, r.relu, 2 * r.threads) if lattices and not r.packed else None
    if raw:
        return _cpu.ConvPlan([raw]), covers
    return _cpu.ConvPlan([_cpu.direct_part(part, r.isa, double, r.relu, tasks) for part in lattices]), covers


def _pointwise(p: ConvProblem) -> bool:
    return p.taps == 1 and not any(p.pad_lo + p.pad_hi) and p.stride == (1, 1, 1)


def _gemm(r: Request, gather: bool) -> tuple[Any, bool]:
    double = r.problem.dtype == "float64"
    if r.op == "conv_weight_grad":
        return _weight_grad(r, "im2col")
    lattices, covers = _lattices(r)
    return _cpu.ConvPlan([_cpu.gemm_part(part, r.isa, double, gather, r.relu) for part in lattices]), covers


def _weight_grad(r: Request, form: str, shape: int = 0) -> tuple[Any, bool]:
    p = r.problem
    if _pointwise(p) and p.groups == 1 and 2 * p.out_channels <= _cpu.vector_lanes(r.isa, p.dtype) < p.in_channels:
        # Few out channels leave lanes empty; x and dy may change places.
        return _cpu.WeightGradPlan(lattice.swapped(p), r.isa, p.dtype == "float64", form, swapped=True), True
    whole = lattice.forward(p)
    by_depth = form == "winograd" and costs.winograd_shapes()[shape].kernel != p.kernel
    plans = [_cpu.WeightGradPlan(part, r.isa, p.dtype == "float64", form, shape, costs.dilation(p))
             for part in (lattice.depth_slices(whole) if by_depth else (whole,))]
    return plans[0] if len(plans) == 1 else _cpu.WeightGradSlices(plans), True


def _lattices(r: Request) -> tuple[tuple[lattice.Lattice, ...], bool]:
    return ((lattice.forward(r.problem),), True) if r.op == "conv" else lattice.input_grad(r.problem)


def _seen(p: ConvProblem, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes[3 - p.ndim:]


ROWS = (
    Row("winograd", _winograd_refuses, _winograd_declines, _winograd, _winograd_cycles, _winograd_variants),
    Row("channelwise", _channelwise_refuses, _channelwise_declines, _channelwise,
        lambda r: costs.channelwise(r.problem, r.op, r.isa, r.batch)),
    Row("direct", _direct_refuses, _direct_declines, _direct, _direct_cycles),
    Row("im2col", _never, _never, lambda r: _gemm(r, gather=True),
        lambda r: costs.im2col(r.problem, r.op, r.isa, r.batch) + _packing(r)),
    Row("reference", _never, _never, lambda r: (None, True),
        lambda r: costs.reference(r.problem, r.batch)),
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
        Whether max(., 0) is applied to the result; no weight gradient has that.
    packed
        Whether the weights are packed once and used many times.

    Raises
    ------
    ValueError
        If the row that is forced refuses, with its reason.
    """
    key = (problem, op, algorithm, relu, packed, token())
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
    if current.tune and algorithm == "auto":
        return _tuned(request)
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
        return make_plan(request, row, refused=tuple(refused))
    raise AssertionError("the reference serves every problem")


def make_plan(request: Request, row: Row, variant: str = "", *, refused: tuple[tuple[str, str], ...] = (),
              measured: tuple[tuple[str, float], ...] = ()) -> Plan:
    """The plan of one row for what is asked."""
    if not variant and row.name == "winograd":
        variant = request.shape[0].name
    request = replace(request, variant=variant)
    engine, covers = row.engine(request)
    return Plan(request.problem, request.op, row.name, request.isa if engine else "numpy", refused, engine, request,
                covers, request.relu, variant, measured)


def candidates(request: Request) -> list[tuple[Row, str]]:
    """Every compiled row that can run what is asked, in each of its variants."""
    return [(row, variant) for row in ROWS[:-1] if not row.refuses(request) for variant in row.variants(request)]


def predicted_choice(request: Request) -> str:
    """The label of what runs without tuning."""
    row = next(row for row in ROWS if not row.refuses(request) and not row.declines(request))
    return label(row.name, request.shape[0].name if row.name == "winograd" else "")


def _tuned(request: Request) -> Plan:
    """The plan that is fastest when it is tried, or was when it was tried before."""
    from fastconv import tune

    choice = tune.choose(request)
    refused = tuple((row.name, reason) for row in ROWS[:-1] if (reason := row.refuses(request)))
    return make_plan(request, choice.row, choice.variant, refused=refused, measured=choice.measured)
