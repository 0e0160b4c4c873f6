"""Where the time of a network goes, layer by layer."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastconv.arrays import on_device
from fastconv.models.lenet import SparseConv
from fastconv.nn import Layer, Linear
from fastconv.nn.conv import _Conv, _ConvTranspose
from fastconv.nn.prepared import PreparedLayer
from fastconv.plan import plan_for as cpu_plan_for
from fastconv.problem import conv_problem, conv_transpose_problem
from fastconv.tables import columns, outline
from fastconv.watch import shared_copy

__all__ = ["LayerProfile", "Profile", "Span", "profile"]


@dataclass(frozen=True)
class LayerProfile:
    """Time and work of one layer, without that of the layers inside it.

    Attributes
    ----------
    name, kind : str
        Dotted name and class, and what inference fuses into the layer: ``"Conv2d+norm+add+relu"``.
    output_shape : tuple of int
        With the batch.
    algorithms : tuple of str
        What computes the output of a convolution or linear layer and, in training, its input and weight gradient;
        empty for other layers.
    macs : int
        Multiply-accumulates of the forward pass on the batch; both gradients together cost twice as many.
    forward_seconds, backward_seconds : float
        The fastest of the runs. backward is 0 in inference.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    algorithms: tuple[str, ...] = ()
    macs: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + self.backward_seconds

    @property
    def flops(self) -> int:
        """Floating-point operations of the passes that ran, two for each multiply-accumulate."""
        return 2 * self.macs * (3 if self.backward_seconds else 1)

    @property
    def gflops(self) -> float:
        """Speed over the passes that ran, in 10⁹ operations a second."""
        return self.flops / self.seconds / 1e9


@dataclass(frozen=True)
class Span:
    """One call of a layer: when it began, in seconds since the run began, and how long it took in all."""

    name: str
    phase: str
    start: float
    seconds: float
    own_seconds: float = field(repr=False)
    """Without the layers inside it."""


@dataclass(frozen=True)
class Profile:
    """Times of all layers; ``print`` shows a table.

    Attributes
    ----------
    rows : tuple of LayerProfile
        In the order in which layers end. Layers that hold others have rows too, for what they do themselves.
    spans : tuple of Span
        Calls of the fastest run.
    seconds : float
        Duration of the fastest run.
    batch : int
        Number of images.
    train : bool
        Whether the runs were steps of training, without loss and optimiser.
    """

    rows: tuple[LayerProfile, ...]
    spans: tuple[Span, ...]
    seconds: float
    batch: int
    train: bool

    def table(self, depth: int | None = None) -> str:
        """Format as text, an outline of the names; `depth` is the number of levels that get lines.

        The line of a group has the sums of the lines below it and of what the group itself does, such as to
        concatenate. Algorithms are those of output, input gradient and weight gradient, once if they agree.
        """
        total = _added("sum", self.rows)
        times = ("forward", "backward") if self.train else ("ms",)
        lines = [("layer", "kind, algorithm", "output", *times, "GFLOP/s", "share")]
        nodes = [(node.label, _added(node.name, node.members)) for node in outline(self.rows, depth)]
        for label, row in [*nodes, ("sum", total)]:
            what = " ".join([row.kind, _algorithms(row.algorithms)]).strip()
            seconds = (row.forward_seconds, row.backward_seconds) if self.train else (row.forward_seconds,)
            lines.append((label, what, "x".join(map(str, row.output_shape[1:])) if label != "sum" else "",
                          *(f"{1e3 * t:.3f}" for t in seconds), f"{row.gflops:.1f}" if row.macs else "",
                          f"{row.seconds / total.seconds:.1%}"))
        what = "forward and backward" if self.train else "inference"
        rate = f"{self.batch / self.seconds:,.0f}" if self.batch >= 10 * self.seconds else (
            f"{self.batch / self.seconds:.2g}")
        return "\n".join([*columns(lines, left=3), "", f"fastest {what} of the whole batch of {self.batch}: "
                          f"{1e3 * self.seconds:.2f} ms, {rate} images a second; times in ms"])

    def __str__(self) -> str:
        return self.table()

    def trace(self) -> dict[str, Any]:
        """Return the spans in the Trace Event Format, which chrome://tracing and ui.perfetto.dev show.

        Complete events (``"ph": "X"``) with ``ts`` and ``dur`` in microseconds, nested as the layers are.
        """
        rows = {row.name: row for row in self.rows}
        names = [{"name": key, "ph": "M", "pid": 1, "tid": 1, "args": {"name": value}}
                 for key, value in (("process_name", "fastconv"), ("thread_name", "layers"))]
        return {"displayTimeUnit": "ms", "traceEvents": names + [
            {"name": span.name, "cat": span.phase, "ph": "X", "pid": 1, "tid": 1, "ts": 1e6 * span.start,
             "dur": 1e6 * span.seconds, "args": {
                 "kind": rows[span.name].kind, "output": list(rows[span.name].output_shape),
                 "algorithms": list(rows[span.name].algorithms), "multiply-accumulates": rows[span.name].macs}}
            for span in sorted(self.spans, key=lambda span: span.start)]}

    def save_trace(self, path: str | Path) -> None:
        """Write `trace` as JSON."""
        Path(path).write_text(json.dumps(self.trace()), encoding="utf-8")


def profile(model: Layer, x: Any, *, train: bool = True, repeats: int = 5) -> Profile:
    """Time each layer of a network on one batch.

    The network runs `repeats` times after one run that makes plans and fills caches. Of each layer the fastest run
    counts, the one that other processes disturb least; so the sum is a little less than the time of the whole. A copy
    of the network runs: gradients and running statistics stay as they are.

    Parameters
    ----------
    model : Layer
        Any network.
    x : ndarray
        Batch (N, C, \\*spatial), or what the network takes instead.
    train : bool
        Whether to time ``forward`` and ``backward``; otherwise inference.
    repeats : int
        Number of runs, at least 1.

    Returns
    -------
    Profile
        Of a network on a GPU each layer is waited for, so that the sum is more than the time without a profile.

    Raises
    ------
    ValueError
        If `repeats` is less than 1, or `x` does not fit.
    """
    if repeats < 1:
        raise ValueError(f"profile: repeats is {repeats}, but at least 1 is needed. Hint: repeats=5")
    recorder = _Recorder(shared_copy(model), train)
    runs = []
    with recorder.catching_calls():
        gradient = _run(recorder.model, x, train, None)
        recorder.looking = False
        for _ in range(repeats):
            recorder.model.zero_grad()
            recorder.begin()
            start = time.perf_counter()
            _run(recorder.model, x, train, gradient)
            runs.append((time.perf_counter() - start, recorder.spans))
    rows = []
    for name, row in recorder.rows.items():
        fastest = {phase: min(sum(span.own_seconds for span in spans if (span.name, span.phase) == (name, phase))
                              for _, spans in runs) for phase in ("forward", "backward")}
        rows.append(replace(row, forward_seconds=fastest["forward"], backward_seconds=fastest["backward"]))
    seconds, spans = min(runs, key=lambda run: run[0])
    return Profile(tuple(rows), tuple(spans), seconds, len(x[0] if isinstance(x, tuple) else x), train)


def _run(model: Layer, x: Any, train: bool, gradient: Any) -> Any:
    """Run once; returns the gradient that went in, made up if it is None."""
    if not train:
        model(x)
        return None
    y, backward = model.forward(x)
    if gradient is None:
        rng = np.random.default_rng(0)
        noise = [np.asarray(rng.standard_normal(output.shape), output.dtype, like=output) for output in _tuple(y)]
        gradient = tuple(noise) if isinstance(y, tuple) else noise[0]
    backward(gradient)
    return gradient


def _tuple(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


_CLASSES = threading.Lock()
"""Held while classes are changed: one profile of inference at a time."""


class _Recorder:
    """A network whose layers note when they run.

    `forward`, by which training reaches layers, gives way to an attribute of the copy. Inference calls them, or asks
    those with weights for what is `prepared`, with the norm and the activation that are fused into it; calls can be
    caught in the class only, so that it has to be changed for as long as the runs last. Layers that are fused into
    others keep their classes, by which they are recognised, and have no rows.
    """

    def __init__(self, model: Layer, train: bool) -> None:
        self.model = model
        self.train = train
        self.looking = True
        self.rows: dict[str, LayerProfile] = {}
        self.names: dict[int, str] = {}
        for name, layer in model.named_layers():
            if id(layer) not in self.names:
                self.names[id(layer)] = name or "(network)"
                vars(layer)["forward"] = self._forward(layer)
                if isinstance(layer, PreparedLayer):
                    vars(layer)["prepared"] = self._prepared(layer)
        self.wait = _waiting(model)
        self.begin()

    def begin(self) -> None:
        """Forget all spans; the clock starts at zero."""
        self.spans: list[Span] = []
        self._inner: list[tuple[str, list[float]]] = []
        self._zero = time.perf_counter()

    def _forward(self, layer: Layer) -> Callable[..., Any]:
        forward = layer.forward

        def measured(*args: Any) -> Any:
            y, backward = self.measure(layer, "forward", lambda: forward(*args))
            self.look(layer, type(layer).__name__, args[0], y)
            return y, lambda dy: self.measure(layer, "backward", lambda: backward(dy))

        return measured

    def _prepared(self, layer: PreparedLayer) -> Callable[..., Any]:
        prepared = layer.prepared

        def measured_prepared(norm: Layer | None = None, activation: Any = None) -> Callable[..., Any]:
            run = prepared(norm, activation)  # type: ignore[arg-type]
            kind = type(layer).__name__ + "+norm" * (norm is not None)

            def measured(x: Any, **options: Any) -> Any:
                y = self.measure(layer, "forward", lambda: run(x, **options))
                ends = (["add"] if options.get("residual") is not None else []) + (
                    [] if activation is None else [activation if isinstance(activation, str) else activation[0]])
                self.look(layer, "+".join([kind, *ends]), x, y)
                return y

            return measured

        return measured_prepared

    @contextmanager
    def catching_calls(self) -> Iterator[None]:
        """Context in which calls of the network's layers are measured; others stay as they are."""
        if self.train:
            yield
            return
        with _CLASSES:
            # Where it is defined, not below: a norm is recognised by having the `__call__` of its base.
            classes = {next(base for base in type(layer).__mro__ if "__call__" in vars(base))
                       for _, layer in self.model.named_layers()}
            calls = {cls: vars(cls)["__call__"] for cls in classes}
            try:
                for cls, call in calls.items():
                    cls.__call__ = self._call(call)  # type: ignore[method-assign]
                yield
            finally:
                for cls, call in calls.items():
                    cls.__call__ = call  # type: ignore[method-assign]

    def _call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(layer: Layer, *args: Any, **options: Any) -> Any:
            if id(layer) not in self.names:
                return call(layer, *args, **options)
            y = self.measure(layer, "forward", lambda: call(layer, *args, **options))
            self.look(layer, type(layer).__name__, args[0], y)
            return y

        return measured

    def measure(self, layer: Layer, phase: str, run: Callable[[], Any]) -> Any:
        """Run and note a span, unless the layer is only calling itself."""
        name = self.names[id(layer)]
        if self._inner and self._inner[-1][0] == name:
            return run()
        inner: list[float] = []
        self._inner.append((name, inner))
        start = time.perf_counter()
        result = run()
        self.wait()
        seconds = time.perf_counter() - start
        self._inner.pop()
        if self._inner:
            self._inner[-1][1].append(seconds)
        self.spans.append(Span(name, phase, start - self._zero, seconds, seconds - sum(inner)))
        return result

    def look(self, layer: Layer, kind: str, x: Any, y: Any) -> None:
        """Note what the layer is and how it computes, in the first run."""
        name = self.names[id(layer)]
        if not self.looking or name in self.rows:
            return
        plans = _plans(layer, x, y, self.train)
        macs = plans[0].problem.macs if plans else 0
        if isinstance(layer, SparseConv):  # runs as a dense one; only the products that it is for are work
            macs = macs * layer.weight.value.size // math.prod(layer.shape)
        self.rows[name] = LayerProfile(name, kind, _tuple(y)[0].shape,
                                       tuple(plan.algorithm for plan in plans), macs)


def _waiting(model: Layer) -> Callable[[], object]:
    """Waits until a layer is done: on a GPU calls return before."""
    if model.place == "cpu":
        return lambda: None
    from fastconv.backends.cuda.device import provider  # only now: most processes never see a GPU

    return provider().synchronize


def _planner(x: Any) -> Callable[..., Any]:
    """``plan_for`` of the backend of `x`."""
    if not on_device(_tuple(x)[0]):
        return cpu_plan_for
    from fastconv.backends.cuda.conv import chosen

    return lambda problem, op, packed=False: chosen(problem, op)


def _plans(layer: Layer, x: Any, y: Any, train: bool) -> list[Any]:
    """Plans of the forward pass and, in training, of the input and the weight gradient."""
    plan_for = _planner(x)
    if isinstance(layer, (_Conv, _ConvTranspose)) and x.ndim == layer.ndim + 1:
        x, y = x[None], y[None]
    if isinstance(layer, _Conv):
        problem = conv_problem(x, layer.weight.value, layer.stride, layer.padding, layer.dilation, layer.groups,
                               out=y if layer.padding_mode == "zeros" else None, ndim=layer.ndim, op="profile")
        if not train:
            return [plan_for(problem, "conv", packed=True)]
    elif isinstance(layer, SparseConv):
        problem = conv_problem(x, np.broadcast_to(x.dtype.type(0), layer.shape), op="profile")
    elif isinstance(layer, _ConvTranspose):
        problem = conv_transpose_problem(x, layer.weight.value, layer.stride, layer.padding, layer.output_padding,
                                         layer.groups, layer.dilation, ndim=layer.ndim, op="profile")
        return [plan_for(problem, op) for op in ("conv_input_grad", "conv", "conv_weight_grad")[:3 if train else 1]]
    elif isinstance(layer, Linear):  # one image whose pixels are the rows; its input gradient is a convolution too
        w = layer.weight.value
        pixels, outputs = (rows.reshape(-1, rows.shape[-1]).T[None] for rows in (x, y))
        problem = conv_problem(pixels, w[:, :, None], op="profile")
        plans = [plan_for(problem, "conv")]
        if train:
            plans += [plan_for(conv_problem(outputs, w.T[:, :, None], op="profile"), "conv"),
                      plan_for(problem, "conv_weight_grad")]
        return plans
    else:
        return []
    return [plan_for(problem, op) for op in ("conv", "conv_input_grad", "conv_weight_grad")[:3 if train else 1]]


def _added(name: str, rows: Iterable[LayerProfile]) -> LayerProfile:
    rows = list(rows)
    own = next((row for row in rows if row.name == name), None)
    return LayerProfile(
        name, own.kind if own else "", (own or rows[-1]).output_shape, own.algorithms if own else (),
        sum(row.macs for row in rows), sum(row.forward_seconds for row in rows),
        sum(row.backward_seconds for row in rows))


def _algorithms(names: tuple[str, ...]) -> str:
    """One name if all passes agree."""
    return "/".join(names if len(set(names)) > 1 else names[:1])
