"""How much memory a step of training takes, found out without computing one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv.arrays import Order, empty, rehearsal
from fastconv.nn.layer import Layer
from fastconv.nn.training_path import skip_input_gradients, use_channels_last
from fastconv.problem.common import integer
from fastconv.tables import human
from fastconv.watch import shared_copy

__all__ = ["StepMemory", "step_memory"]

OVERHEAD = 2 << 20
"""Bytes that the first step brings into memory once: code of the kernels, plans, stacks of threads, small objects."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step of training takes at most.

    Attributes
    ----------
    batch : int
        Number of images.
    parameters, state : int
        Parameters, running statistics, and what the optimiser keeps: for SGD with momentum as much as the parameters.
    arrays : int
        Input, activations, gradients and workspaces at the moment at which they take most.
    overhead : int
        `OVERHEAD`.
    """

    batch: int
    parameters: int
    state: int
    arrays: int
    overhead: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.parameters + self.state + self.arrays + self.overhead

    def __str__(self) -> str:
        return (f"a step of training with a batch of {self.batch} takes {human(self.peak, 'B')} at most: parameters "
                f"{human(self.parameters, 'B')}, optimiser {human(self.state, 'B')}, activations, gradients and "
                f"workspaces {human(self.arrays, 'B')}")


def step_memory(model: Layer, input_shape: tuple[Any, ...], batch: int = 8, *, order: Order = "contiguous",
                state_arrays: int = 1) -> StepMemory:
    """Predict the memory of a step: forward pass, loss, backward pass, optimiser.

    The network runs, but its kernels do nothing: they only take the memory that they would need, which the system
    never has to provide, since nobody writes to it. What NumPy computes (activations other than ReLU, concatenations)
    does run. The first layer computes no gradient of the input, as in `fit`.

    Parameters
    ----------
    model : Layer
        Any network, on the CPU. Its running statistics and random generators stay as they are.
    input_shape : tuple of int
        (C, \\*spatial) without the batch; a tuple of such shapes for networks with several inputs.
    batch : int
        Number of images.
    order : str
        Memory order of the images, ``"contiguous"`` or ``"channels_last"``.
    state_arrays : int
        Arrays of the size of the parameters that the optimiser keeps: 1 for SGD with momentum, 2 for Adam.

    Returns
    -------
    StepMemory

    Raises
    ------
    ValueError, TypeError
        Where a layer does not fit its input, for a batch that is not positive, or an unknown order.
    RuntimeError
        If another thread is predicting.
    """
    batch = integer("step_memory", "batch", batch, 1)
    state_arrays = integer("step_memory", "state_arrays", state_arrays, 0)
    if order not in ("contiguous", "channels_last"):
        raise ValueError(f"step_memory: order is {order!r}, but 'contiguous' or 'channels_last' is needed. "
                         "Hint: leave it out for images as they come")
    shapes = tuple(input_shape) if isinstance(input_shape[0], tuple) else (tuple(input_shape),)
    net = shared_copy(model)
    skip_input_gradients(net)
    if order == "channels_last":
        use_channels_last(net)
    parameters = net.parameters()
    dtype = parameters[0].dtype if parameters else np.dtype(np.float32)
    size = sum(p.value.nbytes for p in parameters)
    with rehearsal() as held, np.errstate(all="ignore"):
        x = tuple(empty((batch, *shape), dtype, order if len(shape) > 1 else "contiguous") for shape in shapes)
        for _ in range(2):  # the second one finds what the first one has left
            _step(net, x if len(x) > 1 else x[0])
        del x
    return StepMemory(batch, size + sum(b.value.nbytes for _, b in net.named_buffers()),
                      state_arrays * sum(p.value.nbytes for p in parameters if p.requires_grad), held[0], OVERHEAD)


def _step(net: Layer, x: Any) -> None:
    y, backward = net.forward(x)
    backward(tuple(map(np.empty_like, y)) if isinstance(y, tuple) else np.empty_like(y))
    net.zero_grad()
