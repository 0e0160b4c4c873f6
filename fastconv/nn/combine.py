"""Combinators: layers made of layers. Blocks and networks are expressions in these."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, overload

import numpy as np

from fastconv.arrays import Array, Order, empty, empty_like, memory_order
from fastconv.backends import select
from fastconv.functional.pointwise import relu_grad
from fastconv.nn.activation import activation_spec
from fastconv.nn.basic import Identity
from fastconv.nn.fusion import is_plain_relu, stages, takes_relu
from fastconv.nn.layer import Backward, Layer


class _Group(Layer):
    """Layers with names: ``"0"``, ``"1"``, ... by position, or the keys of a mapping or of keywords."""

    def __init__(self, *layers: Layer | Mapping[str, Layer], **named: Layer) -> None:
        entries: dict[str, Any] = {}
        for index, layer in enumerate(layers):
            entries.update(layer if isinstance(layer, Mapping) else {str(index): layer})
        entries.update(named)
        for name, layer in entries.items():
            if not isinstance(layer, Layer):
                raise TypeError(f"{type(self).__name__}: {name} is a {type(layer).__qualname__}, but a Layer is "
                                "needed. Hint: layers are objects, such as ReLU(), not classes or functions")
            if not name or "." in name:
                raise ValueError(f"{type(self).__name__}: a layer is called {name!r}, but a name must not be empty or "
                                 "hold a dot, which separates names in state_dict. Hint: use an underscore")
        self._layers: dict[str, Layer] = entries

    def children(self) -> Iterator[tuple[str, Layer]]:
        """See `Layer.children`."""
        return iter(self._layers.items())

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers.values())


class Sequential(_Group):
    """Layers one after the other.

    ``Sequential(conv, relu)``, ``Sequential({"conv": conv, "relu": relu})`` or ``Sequential(conv=conv, relu=relu)``;
    ``net[0]``, ``net[-1]`` and ``net["conv"]`` are layers, ``net[:2]`` is a Sequential that shares them.
    """

    def forward(self, x: Any) -> tuple[Any, Backward]:
        """Run all layers in order; see `Layer.forward`."""
        steps: list[Backward] = []
        layers, fused = list(self), False
        for layer, behind in itertools.zip_longest(layers, layers[1:]):
            if fused:  # into the layer before
                fused = False
                continue
            fused = takes_relu(layer) and is_plain_relu(behind)
            x, step = layer.forward(x, relu=True) if fused else layer.forward(x)  # type: ignore[call-arg]
            steps.append(step)

        def backward(dy: Any) -> Any:
            for step in reversed(steps):
                dy = step(dy)
            return dy

        return x, backward

    def __call__(self, x: Any) -> Any:
        """Run inference through all layers in order.

        A layer with weights, a batch normalisation behind it and an activation behind that run as one.
        """
        for stage in stages(self):
            x = stage(x)
        return x

    @overload
    def __getitem__(self, index: int | str) -> Layer: ...

    @overload
    def __getitem__(self, index: slice) -> Sequential: ...

    def __getitem__(self, index: int | str | slice) -> Layer:
        if isinstance(index, str):
            return self._layers[index]
        if isinstance(index, slice):
            return Sequential(dict(list(self._layers.items())[index]))
        return list(self._layers.values())[index]


class Residual(Layer):
    """``activation(branch(x) + shortcut(x))`` (He et al. 2016).

    Parameters
    ----------
    branch : Layer
        The residual function.
    shortcut : Layer, optional
        What the branch is added to; the input itself if left out.
    activation : Layer, optional
        Applied to the sum; nothing if left out.
    """

    def __init__(self, branch: Layer, shortcut: Layer | None = None, activation: Layer | None = None) -> None:
        self.branch = branch
        self.shortcut = Identity() if shortcut is None else shortcut
        self.activation = Identity() if activation is None else activation

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run branch, shortcut, sum and activation; see `Layer.forward`."""
        residual, branch_backward = self.branch.forward(x)
        skipped, shortcut_backward = self.shortcut.forward(x)
        activation_backward: Backward
        if is_plain_relu(self.activation):
            y = _add(residual, skipped, relu=True)
            activation_backward = partial(relu_grad, output=y)
        else:
            y, activation_backward = self.activation.forward(_add(residual, skipped))

        def backward(dy: Array) -> Array:
            dy = activation_backward(dy)
            return _add(branch_backward(dy), shortcut_backward(dy))

        return y, backward

    def __call__(self, x: Array) -> Array:
        """Run inference; a last convolution of the branch takes sum and activation along."""
        branch = self.branch if type(self.branch) is Sequential and len(self.branch) else [self.branch]
        *first, last = stages(branch)
        hidden = x
        for stage in first:
            hidden = stage(hidden)
        activation = activation_spec(self.activation)
        y = last.add(hidden, lambda: self.shortcut(x), activation)
        if y is None:
            y, activation = _add(last(hidden), self.shortcut(x)), None
        return y if activation is not None else self.activation(y)


def _add(a: Array, b: Array, relu: bool = False) -> Array:
    if a.shape != b.shape:
        raise ValueError(f"Residual: the branch gives shape {a.shape}, but the shortcut {b.shape}; they are added and "
                         "must agree. Hint: a shortcut of a 1x1 convolution with the branch's stride and channels")
    if a.dtype != b.dtype:
        y = np.add(a, b, out=np.empty_like(a))
        return np.maximum(y, 0, out=y) if relu else y
    return select.training("Residual", ("the branch", a), ("the shortcut", b)).add(a, b, relu)


class Branches(_Group):
    """Layers side by side: a tuple of outputs, one for each branch.

    An array goes to every branch; its gradient is the sum of theirs. A tuple hands its i-th entry to the i-th branch;
    its gradient is a tuple. ``backward`` takes a tuple of gradients, in which None marks an output that did not
    enter the loss, such as an auxiliary head; the gradient is None if all are. Branches are named as the layers of a
    `Sequential`.
    """

    def forward(self, x: Array | tuple[Any, ...]) -> tuple[Any, Backward]:
        """Run every branch; see `Layer.forward` and the class."""
        several = isinstance(x, tuple)
        outputs, steps = [], []
        for layer, entry in zip(self, self._inputs(x), strict=True):
            y, step = layer.forward(entry)
            outputs.append(y)
            steps.append(step)

        def backward(dys: tuple[Any, ...]) -> Any:
            if len(dys) != len(steps):
                raise ValueError(f"Branches: backward got {len(dys)} gradients, but there are {len(steps)} outputs. "
                                 "Hint: None marks an output without a gradient")
            dxs = [None if dy is None else step(dy) for step, dy in zip(steps, dys, strict=True)]
            return tuple(dxs) if several else _sum(dxs)

        return tuple(outputs), backward

    def __call__(self, x: Array | tuple[Any, ...]) -> Any:
        """Run inference in every branch."""
        return tuple(layer(entry) for layer, entry in zip(self, self._inputs(x), strict=True))

    def _inputs(self, x: Array | tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(x, tuple):
            return (x,) * len(self)
        if len(x) != len(self):
            raise ValueError(f"{type(self).__name__}: the input is a tuple of {len(x)}, but there are {len(self)} "
                             "branches: one entry for each is needed. Hint: an array goes to every branch")
        return x


def _sum(gradients: list[Array | None]) -> Array | None:
    """Sum of those that are not None, in order, in an array of its own: branches may return shared ones."""
    terms = [g for g in gradients if g is not None]
    if len(terms) < 2:
        return terms[0] if terms else None
    total = np.add(terms[0], terms[1], out=empty_like(terms[0]))
    for term in terms[2:]:
        total += term
    return total


class Concat(Branches):
    """`Branches` whose outputs are concatenated along the channels (axis 1): inception and dense blocks.

    Takes an array or a tuple as `Branches` does, for example ``Concat(image_net, table_net)`` for two inputs.
    """

    def forward(self, x: Array | tuple[Any, ...]) -> tuple[Array, Backward]:
        """Run every branch and concatenate; see `Layer.forward`."""
        outputs, branches_backward = super().forward(x)
        ends = list(itertools.accumulate(y.shape[1] for y in outputs))

        def backward(dy: Array) -> Any:
            starts = [0, *ends[:-1]]
            return branches_backward(tuple(dy[:, lo:hi] for lo, hi in zip(starts, ends, strict=True)))

        return _concatenate(outputs), backward

    def __call__(self, x: Array | tuple[Any, ...]) -> Array:
        """Run inference and concatenate."""
        return _concatenate(super().__call__(x))


def _concatenate(outputs: tuple[Array, ...]) -> Array:
    first = outputs[0]
    if any(y.ndim != first.ndim or y.shape[:1] + y.shape[2:] != first.shape[:1] + first.shape[2:] for y in outputs):
        raise ValueError(f"Concat: the branches give shapes {', '.join(str(y.shape) for y in outputs)}, but all axes "
                         "other than the channels must agree. Hint: check the padding of each branch")
    # Branches of one channel have no order of their own.
    order: Order = "contiguous"
    if first.ndim > 2:
        order = next((memory_order(y) for y in outputs if y.shape[1] > 1), order)
    shape = (first.shape[0], sum(y.shape[1] for y in outputs), *first.shape[2:])
    return np.concatenate(outputs, axis=1, out=empty(shape, first.dtype, order, like=first))
