"""What a network is made of: layers, shapes, parameters, operations, memory and receptive fields.

Nothing is computed: each layer's rule says what it would do to an input of the shape given, so that a summary of
VGG takes milliseconds. Combinators have rules too; where branches meet, receptive fields are united.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastconv.arrays import Array
from fastconv.memory import StepMemory, step_memory
from fastconv.models.covariates import Standardise
from fastconv.models.googlenet import WithHeads
from fastconv.models.lenet import RBFOutput, ScaledTanh, SparseConv, Subsampling
from fastconv.nn import basic, blocks, combine, norm, pool
from fastconv.nn.checkpoint import Checkpoint
from fastconv.nn.conv import _Conv, _ConvTranspose
from fastconv.nn.layer import Layer, Parameter
from fastconv.problem import adaptive_pool_problem, conv_problem, conv_transpose_problem, explicit_padding, pool_problem
from fastconv.tables import columns, count, human, outline, power

__all__ = ["Axis", "Row", "Summary", "summarize"]

Shape = tuple[int, ...]


class Axis(NamedTuple):
    """Receptive field along one axis: output o is computed from the inputs ``lo + o * jump`` to ``hi + o * jump``.

    Inputs beyond the image are padding. Araujo, Norris and Sim, "Computing receptive fields of convolutional neural
    networks", Distill 2019.
    """

    jump: float
    lo: float
    hi: float

    @property
    def size(self) -> int:
        """Number of inputs."""
        return round(self.hi - self.lo) + 1

    @property
    def centre(self) -> float:
        """Position of output 0 in the input, in pixels."""
        return (self.lo + self.hi) / 2


Field = tuple[Axis, ...] | None
"""One `Axis` for each spatial axis of the input; none for tables; None if unknown."""


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes
    ----------
    name, kind : str
        Dotted name and class.
    shape : tuple of int
        Of the output, without the batch.
    parameters : int
        Trained values of this layer alone; shared ones count where they come first.
    macs : int
        Multiply-accumulates of convolutions and linear layers, for one image. Products with padding count.
    flops : int
        Floating-point operations: two for each multiply-accumulate, one for a bias, and those of all other layers in
        inference; a function such as exp counts as one.
    activation_bytes : int
        Size of the output, if it is an array of its own: what training keeps for the backward pass, at most.
    field : tuple of Axis or None
        Receptive field of the output.
    """

    name: str
    kind: str
    shape: Shape
    parameters: int = 0
    macs: int = 0
    flops: int = 0
    activation_bytes: int = 0
    field: Field = None

    @property
    def receptive_field(self) -> tuple[int, ...] | None:
        """Size of the receptive field for each spatial axis of the input."""
        return None if self.field is None else tuple(axis.size for axis in self.field)


@dataclass(frozen=True)
class Summary:
    """Rows of all layers in the order in which they run; ``print`` shows a table."""

    name: str
    input_shapes: tuple[Shape, ...]
    rows: tuple[Row, ...]
    itemsize: int = 4
    """Bytes of one value."""
    step: StepMemory | None = None
    """Memory of a step of training, if that was asked for."""

    @property
    def parameters(self) -> int:
        """Trained values."""
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(row.macs for row in self.rows)

    @property
    def flops(self) -> int:
        """Floating-point operations for one image."""
        return sum(row.flops for row in self.rows)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all activations of one image."""
        return sum(row.activation_bytes for row in self.rows)

    def grouped(self, depth: int) -> list[Row]:
        """Add up neighbouring rows whose names agree in the first `depth` parts; shape and field are the last's."""
        groups = itertools.groupby(self.rows, key=lambda row: ".".join(row.name.split(".")[:depth]))
        return [_added(name, list(rows)) for name, rows in groups]

    def table(self, depth: int | None = None) -> str:
        """Format as text, an outline of the names; `depth` is the number of levels that get lines.

        The line of a group has the sums of the lines below it. A receptive field of ``7²`` is 7x7.
        """
        head = ("layer", "kind", "output", "field", "parameters", "MACs", "FLOPs", "memory")
        nodes = list(outline(self.rows, depth))
        lines = [(node.label, row.kind, _times(row.shape),
                  "?" if row.field is None else power(row.receptive_field or ()), *_numbers(row))
                 for node in nodes for row in [_added(node.name, node.members)]]
        last = next((row for row in reversed(self.rows) if row.field and math.prod(row.shape[1:]) > 1), None)
        return "\n".join([
            f"{self.name}, input {' and '.join(map(_times, self.input_shapes))}", "",
            *columns([head, *lines, ("sum", "", "", "", *_numbers(_added("sum", self.rows)))], left=4), "",
            f"{self.parameters:,} parameters ({human(self.parameters * self.itemsize, 'B')}); for one image "
            f"{human(self.macs)} MACs, {human(self.flops, 'FLOP')}, {human(self.activation_bytes, 'B')} of activations",
            *([f"receptive field of {last.name}, the last layer with positions: {_times(last.receptive_field)}"]
              if last else []),
            *([f"(layers below {count(depth or 0, 'level')} of names are added up)"]
              if any(node.hidden for node in nodes) else []),
            *([] if self.step is None else [str(self.step)])])

    def __str__(self) -> str:
        return self.table()


def summarize(model: Layer, input_shape: Shape | tuple[Shape, ...], name: str | None = None, *,
              memory: bool = False, batch: int = 8) -> Summary:
    """Describe a network for one input.

    Parameters
    ----------
    model : Layer
        Any network of fastconv's layers. A layer of your own that no rule knows is run on zeros for its shape, and
        the receptive field is unknown from there on.
    input_shape : tuple of int
        (C, \\*spatial) without the batch; a tuple of such shapes for networks with several inputs.
    name : str, optional
        What the summary is called; the class if left out.
    memory : bool
        Whether to find out what a step of training takes at most, see `fastconv.memory.step_memory`.
    batch : int
        Number of images of that step.

    Returns
    -------
    Summary

    Raises
    ------
    ValueError
        Where a layer does not fit its input; the message is that of the layer.

    Examples
    --------
    >>> print(summarize(resnet18(), (3, 224, 224)).table(depth=1))
    """
    shapes = tuple(input_shape) if isinstance(input_shape[0], tuple) else (tuple(input_shape),)
    flows = tuple(_Flow(shape, tuple(Axis(1, 0, 0) for _ in shape[1:])) for shape in shapes)
    dtypes = [parameter.dtype for parameter in model.parameters()]
    tracer = _Tracer(dtypes[0] if dtypes else np.dtype(np.float32))
    tracer.trace("", model, flows if len(flows) > 1 else flows[0])
    return Summary(name or type(model).__name__, shapes, tuple(tracer.rows), tracer.dtype.itemsize,
                   step_memory(model, input_shape, batch) if memory else None)


# ---- tracing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flow:
    """What passes between two layers: a shape without the batch, and its receptive field."""

    shape: Shape
    field: Field


@dataclass
class _Tracer:
    """Walks through a network by the rules, and collects rows."""

    dtype: np.dtype[Any]
    rows: list[Row] = field(default_factory=list)
    counted: set[int] = field(default_factory=set)

    def trace(self, name: str, layer: Layer, flow: Any) -> Any:
        """Follow one layer; returns what it hands on: a `_Flow`, or a tuple of them."""
        rule = next((_RULES[cls] for cls in type(layer).__mro__ if cls in _RULES), _unknown)
        return rule(self, name, layer, flow)

    def add(self, name: str, layer: Layer, flow: _Flow, *, macs: int = 0, flops: int = 0, view: bool = False,
            inner: bool = False) -> _Flow:
        """Add a row with the layer's own parameters, or with all `inner` ones too."""
        layers = [layer for _, layer in layer.named_layers()] if inner else [layer]
        parameters = 0
        for item in (value for one in layers for value in vars(one).values()):
            if isinstance(item, Parameter) and item.requires_grad and id(item) not in self.counted:
                self.counted.add(id(item))
                parameters += item.value.size
        size = 0 if view else math.prod(flow.shape) * self.dtype.itemsize
        self.rows.append(Row(name, type(layer).__name__, flow.shape, parameters, macs, flops, size, flow.field))
        return flow

    def blank(self, shape: Shape) -> Array:
        """One image of zeros that takes no memory."""
        return np.broadcast_to(np.zeros((), self.dtype), (1, *shape))


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _slide(axes: Field, kernel: Iterable[float], stride: Iterable[float], pad_lo: Iterable[float],
           dilation: Iterable[float]) -> Field:
    """Receptive field after a window has slid over outputs with the field `axes`."""
    if axes is None:
        return None
    return tuple(Axis(axis.jump * s, axis.lo - p * axis.jump, axis.hi + (d * (k - 1) - p) * axis.jump)
                 for axis, k, s, p, d in zip(axes, kernel, stride, pad_lo, dilation, strict=True))


def _unite(fields: Iterable[Field]) -> Field:
    """Receptive field of something computed from several outputs of one size; tables (no axes) add nothing."""
    known = list(fields)
    if any(axes is None for axes in known):
        return None
    several = [axes for axes in known if axes]
    return tuple(Axis(max(a.jump for a in group), min(a.lo for a in group), max(a.hi for a in group))
                 for group in zip(*several, strict=True)) if several else ()


def _unknown(tracer: _Tracer, name: str, layer: Layer, flow: Any) -> _Flow:
    zeros = tuple(np.zeros((1, *f.shape), tracer.dtype) for f in (flow if isinstance(flow, tuple) else (flow,)))
    y = layer(zeros if len(zeros) > 1 else zeros[0])
    return tracer.add(name, layer, _Flow(y.shape[1:], None), inner=True)


def _sequential(tracer: _Tracer, name: str, layer: combine.Sequential, flow: Any) -> Any:
    for child_name, child in layer.children():
        flow = tracer.trace(_join(name, child_name), child, flow)
    return flow


def _checkpoint(tracer: _Tracer, name: str, layer: Checkpoint, flow: Any) -> Any:
    return tracer.trace(name, layer.layer, flow)


def _with_heads(tracer: _Tracer, name: str, layer: WithHeads, flow: Any) -> Any:
    for child_name, child in layer._layers.items():
        flow = tracer.trace(_join(name, child_name), child, flow)
        for head_name, (after, head) in layer.heads.items():
            if after == child_name:
                tracer.trace(_join(name, head_name), head, flow)
    return flow


def _residual(tracer: _Tracer, name: str, layer: combine.Residual, flow: _Flow) -> _Flow:
    # The names of the state dict, which a ResidualBlock shortens.
    names = {id(child): _join(name, child_name) for child_name, child in layer.named_layers()}
    shortened = id(layer.branch) not in names
    branch = tracer.trace(name if shortened else names[id(layer.branch)], layer.branch, flow)
    skipped = flow if isinstance(layer.shortcut, basic.Identity) else tracer.trace(
        names[id(layer.shortcut)], layer.shortcut, flow)
    total = _Flow(branch.shape, _unite([branch.field, skipped.field]))
    tracer.add(_join(name, "add"), layer, total, flops=math.prod(total.shape))
    if isinstance(layer.activation, basic.Identity):
        return total
    result: _Flow = tracer.trace(names[id(layer.activation)], layer.activation, total)
    return result


def _branches(tracer: _Tracer, name: str, layer: combine.Branches, flow: Any) -> Any:
    return tuple(tracer.trace(_join(name, child_name), child, entry)
                 for (child_name, child), entry in zip(layer.children(), layer._inputs(flow), strict=True))


def _concat(tracer: _Tracer, name: str, layer: combine.Concat, flow: Any) -> _Flow:
    outputs = _branches(tracer, name, layer, flow)
    shape = (sum(output.shape[0] for output in outputs), *outputs[0].shape[1:])
    return tracer.add(_join(name, "concat"), layer, _Flow(shape, _unite(o.field for o in outputs)))


def _dense_block(tracer: _Tracer, name: str, layer: blocks.DenseBlock, flow: _Flow) -> _Flow:
    for child_name, child in layer.children():
        output = tracer.trace(_join(name, child_name), child, flow)
        if child is layer.entry:
            flow = output
        else:
            flow = _Flow((flow.shape[0] + output.shape[0], *output.shape[1:]), _unite([flow.field, output.field]))
    return tracer.add(name, layer, flow, view=True)


def _conv(tracer: _Tracer, name: str, layer: _Conv, flow: _Flow) -> _Flow:
    problem = conv_problem(tracer.blank(flow.shape), layer.weight.value, layer.stride, layer.padding, layer.dilation,
                           layer.groups, ndim=layer.ndim, op=name or "summarize")
    pad_lo = problem.pad_lo[-layer.ndim:]
    output = _Flow(problem.y_shape[1:],
                   _slide(flow.field, layer.kernel_size, layer.stride, pad_lo, layer.dilation))
    return tracer.add(name, layer, output, macs=problem.macs, flops=_flops(layer, problem.macs, output.shape))


def _conv_transpose(tracer: _Tracer, name: str, layer: _ConvTranspose, flow: _Flow) -> _Flow:
    problem = conv_transpose_problem(tracer.blank(flow.shape), layer.weight.value, layer.stride, layer.padding,
                                     layer.output_padding, layer.groups, layer.dilation, ndim=layer.ndim,
                                     op=name or "summarize")
    # The problem is that of the mirrored convolution, whose input is the output here.
    axes = None
    if flow.field is not None:
        axes = tuple(_spread(axis, k, s, p, d) for axis, k, s, p, d in zip(
            flow.field, layer.kernel_size, layer.stride, problem.pad_lo[-layer.ndim:], layer.dilation, strict=True))
    output = _Flow(problem.x_shape[1:], axes)
    return tracer.add(name, layer, output, macs=problem.macs, flops=_flops(layer, problem.macs, output.shape))


def _spread(axis: Axis, kernel: int, stride: int, pad: int, dilation: int) -> Axis:
    """Field after a transposed convolution: output i is made of the inputs (i + pad - t * dilation) / stride.

    Outputs whose i differs modulo the stride see different numbers of inputs; this is the field that covers all.
    """
    phases = range(stride)
    jump = axis.jump / stride
    lo = min(-((dilation * (kernel - 1) - pad - i) // stride) * axis.jump - i * jump for i in phases)
    hi = max((i + pad) // stride * axis.jump - i * jump for i in phases)
    return Axis(jump, axis.lo + lo, axis.hi + hi)


def _sparse_conv(tracer: _Tracer, name: str, layer: SparseConv, flow: _Flow) -> _Flow:
    kernel = layer.shape[2:]
    ones = (1,) * len(kernel)
    shape = (layer.shape[0], *(n - k + 1 for n, k in zip(flow.shape[1:], kernel, strict=True)))
    macs = layer.weight.value.size * math.prod(shape[1:])
    output = _Flow(shape, _slide(flow.field, kernel, ones, (0,) * len(kernel), ones))
    return tracer.add(name, layer, output, macs=macs, flops=_flops(layer, macs, shape))


def _linear(tracer: _Tracer, name: str, layer: basic.Linear, flow: _Flow) -> _Flow:
    if flow.shape[-1] != layer.in_features:
        raise ValueError(f"{name or 'summarize'}: the input has shape {flow.shape}, but Linear needs "
                         f"{layer.in_features} features. Hint: check the size of the images")
    shape = (*flow.shape[:-1], layer.out_features)
    macs = math.prod(flow.shape) * layer.out_features
    return tracer.add(name, layer, _Flow(shape, flow.field), macs=macs, flops=_flops(layer, macs, shape))


def _flops(layer: Any, macs: int, shape: Shape) -> int:
    """Of a layer of sums of products: each output has one addition less than products, and one for the bias."""
    return 2 * macs - (0 if layer.bias is not None else math.prod(shape))


def _sliding_pool(tracer: _Tracer, name: str, layer: Any, flow: _Flow) -> _Flow:
    ndim = layer.ndim
    ceil_mode = getattr(layer, "ceil_mode", False)
    shape = pool_problem(tracer.blank(flow.shape), layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                         ceil_mode, ndim=ndim, op=name or "summarize").y_shape[1:]
    pad_lo, _ = explicit_padding(layer.padding, flow.shape[1:], layer.kernel_size, layer.stride, layer.dilation)
    output = _Flow(shape, _slide(flow.field, layer.kernel_size, layer.stride, pad_lo, layer.dilation))
    return tracer.add(name, layer, output, flops=math.prod(shape) * math.prod(layer.kernel_size))


def _adaptive_pool(tracer: _Tracer, name: str, layer: Any, flow: _Flow) -> _Flow:
    size = flow.shape[1:]
    wanted = getattr(layer, "output_size", 1)  # GlobalMaxPool has none
    out = adaptive_pool_problem(tracer.blank(flow.shape), wanted, ndim=len(size), op=name or "summarize").y_shape[2:]
    # Where out does not divide n, windows differ by one in size and in steps: the largest, and the mean step.
    kernel = [max(-(-(o + 1) * n // m) - o * n // m for o in range(m)) for n, m in zip(size, out, strict=True)]
    stride = [n / m for n, m in zip(size, out, strict=True)]
    zeros, ones = (0,) * len(size), (1,) * len(size)
    output = _Flow((flow.shape[0], *out), _slide(flow.field, kernel, stride, zeros, ones))
    return tracer.add(name, layer, output, flops=flow.shape[0] * math.prod(out) * math.prod(kernel))


def _flatten(tracer: _Tracer, name: str, layer: basic.Flatten, flow: _Flow) -> _Flow:
    """Whoever reads the result sees all positions: their fields are united."""
    positions = flow.shape[1:]
    axes = flow.field and tuple(Axis(0, axis.lo, axis.hi + (n - 1) * axis.jump)
                                for axis, n in zip(flow.field, positions, strict=True))
    shape = layer(np.empty((1, *flow.shape), tracer.dtype)).shape[1:]
    return tracer.add(name, layer, _Flow(shape, axes), view=True)


def _subsampling(tracer: _Tracer, name: str, layer: Subsampling, flow: _Flow) -> _Flow:
    total = tracer.trace(_join(name, "sum"), layer.sum, flow)
    return tracer.add(name, layer, total, flops=2 * math.prod(total.shape))


def _rbf(tracer: _Tracer, name: str, layer: RBFOutput, flow: _Flow) -> _Flow:
    codes = layer.codes.value  # a difference, a square, a sum for each entry
    return tracer.add(name, layer, _Flow((len(codes),), flow.field), flops=3 * codes.size)


def _standardise(tracer: _Tracer, name: str, layer: Standardise, flow: _Flow) -> _Flow:
    return tracer.add(name, layer, _Flow((2 * flow.shape[0],), flow.field), flops=2 * flow.shape[0])


def _elementwise(operations: int | Callable[[Any], int], view: bool = False) -> Callable[..., _Flow]:
    """Rule of a layer with a number of operations for each element."""

    def rule(tracer: _Tracer, name: str, layer: Layer, flow: _Flow) -> _Flow:
        count = operations if isinstance(operations, int) else operations(layer)
        return tracer.add(name, layer, flow, flops=count * math.prod(flow.shape), view=view)

    return rule


_RULES: dict[type[Layer], Callable[..., Any]] = {
    combine.Sequential: _sequential,
    Checkpoint: _checkpoint,
    combine.Residual: _residual,
    combine.Branches: _branches,
    combine.Concat: _concat,
    blocks.DenseBlock: _dense_block,
    WithHeads: _with_heads,
    _Conv: _conv,
    _ConvTranspose: _conv_transpose,
    SparseConv: _sparse_conv,
    basic.Linear: _linear,
    pool._MaxPool: _sliding_pool,
    pool._AvgPool: _sliding_pool,
    pool._LPPool: _sliding_pool,
    pool._AdaptiveAvgPool: _adaptive_pool,
    pool._AdaptiveMaxPool: _adaptive_pool,
    pool.GlobalMaxPool: _adaptive_pool,
    basic.Flatten: _flatten,
    basic.Identity: _elementwise(0, view=True),
    basic.Dropout: _elementwise(0),
    basic.ReLU: _elementwise(1),
    basic.LeakyReLU: _elementwise(1),
    basic.Tanh: _elementwise(1),
    basic.Sigmoid: _elementwise(4),
    basic.Softmax: _elementwise(4),
    ScaledTanh: _elementwise(3),
    norm._BatchNorm: _elementwise(2),
    # a square for each element; the sum of `size`; scale, offset, power and division
    norm.LocalResponseNorm: _elementwise(lambda layer: layer.size + 4),
    Subsampling: _subsampling,
    RBFOutput: _rbf,
    Standardise: _standardise,
}


# ---- text --------------------------------------------------------------------------------------------------------


def _added(name: str, rows: Sequence[Row]) -> Row:
    """Sum of rows under one name; shape and field are the last's, the kind that of the row which has the name."""
    kind = next((row.kind for row in rows if row.name == name), "")
    last = rows[-1]
    return Row(name, kind, last.shape, sum(row.parameters for row in rows), sum(row.macs for row in rows),
               sum(row.flops for row in rows), sum(row.activation_bytes for row in rows), last.field)


def _times(shape: Iterable[int] | None) -> str:
    return "x".join(map(str, shape or ()))


def _numbers(row: Row) -> Iterator[str]:
    yield f"{row.parameters:,}" if row.parameters else ""
    yield human(row.macs) if row.macs else ""
    yield human(row.flops) if row.flops else ""
    yield human(row.activation_bytes, "B") if row.activation_bytes else ""
