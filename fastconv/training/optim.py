"""Optimisers and learning-rate schedules.

An optimiser changes parameters in place by their gradients; a schedule sets its `lr` as a closed formula of the number
of steps taken. Both have `state_dict` and `load_state_dict`, nested dictionaries of arrays and numbers, from which
training goes on bit for bit. ::

    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, labels in batches:
        logits, backward = net.forward(x)
        loss, dlogits = cross_entropy(logits, labels)
        backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastconv.arrays import Array, on_device, to_host
from fastconv.backends import _cpu
from fastconv.config import settings
from fastconv.nn.layer import Parameter


def _check_range(op: str, name: str, value: float, low: float, high: float, hint: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} is {value}, but {low} <= {name} <= {high} is needed. Hint: {hint}")


class Optimizer:
    """Base class: the list of parameters, their state, and the loop over them.

    Parameters
    ----------
    params : iterable of Parameter
        What to train, for example ``net.parameters()``.
    lr : float
        Learning rate; schedules write it.
    weight_decay : float
        Strength of the decay of weights; see the subclass.

    Raises
    ------
    ValueError
        If there are no parameters, one comes twice, or a setting is out of range.
    TypeError
        If something else than a Parameter is given.
    """

    def __init__(self, params: Iterable[Parameter], lr: float, weight_decay: float) -> None:
        op = type(self).__name__
        self.params = list(params)
        for p in self.params:
            if not isinstance(p, Parameter):
                raise TypeError(f"{op}: params holds a {type(p).__qualname__}, but Parameters are needed. "
                                "Hint: net.parameters()")
        if not self.params:
            raise ValueError(f"{op}: params is empty, so that there is nothing to train. Hint: net.parameters()")
        if len({id(p) for p in self.params}) < len(self.params):
            raise ValueError(f"{op}: a parameter is given twice and would be moved twice. Hint: net.parameters() lists "
                             "shared parameters once")
        _check_range(op, "lr", lr, 0, math.inf, "lr=1e-3")
        _check_range(op, "weight_decay", weight_decay, 0, math.inf, "weight_decay=1e-4")
        self.lr = lr
        self.weight_decay = weight_decay
        self._states: list[dict[str, Any]] = [{} for _ in self.params]

    def step(self) -> None:
        """Move every parameter that has a gradient and is not frozen."""
        for parameter, state in zip(self.params, self._states, strict=True):
            if parameter.grad is not None and parameter.requires_grad:
                with parameter.write() as value:
                    self._update(value, parameter.grad, state)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.params:
            parameter.zero_grad()

    def _update(self, value: Array, grad: Array, state: dict[str, Any]) -> None:
        """Move `value` in place; `grad` must not change."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the learning rate and of the state of each parameter, in their order.

        Settings of the constructor other than `lr` are not part of it.
        """
        return {"lr": self.lr, "params": [{name: np.array(to_host(value)) if hasattr(value, "shape") else value
                                           for name, value in state.items()} for state in self._states]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that an optimiser of the same class gave for parameters of the same shapes.

        Raises
        ------
        ValueError
            If the number of parameters or a shape differs.
        """
        op, states = type(self).__name__, state["params"]
        if len(states) != len(self.params):
            raise ValueError(f"{op}: the state is for {len(states)} parameters, but there are {len(self.params)}. "
                             "Hint: build the same network before loading")
        for index, (parameter, entry) in enumerate(zip(self.params, states, strict=True)):
            for name, value in entry.items():
                if isinstance(value, np.ndarray) and value.shape != parameter.shape:
                    raise ValueError(f"{op}: {name} of parameter {index} has shape {value.shape}, but the parameter "
                                     f"has shape {parameter.shape}. Hint: build the same network before loading")
        self.lr = float(state["lr"])
        self._states = [{name: np.array(value, parameter.dtype, like=parameter.value)
                         if isinstance(value, np.ndarray) else value
                         for name, value in entry.items()}
                        for parameter, entry in zip(self.params, states, strict=True)]


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, in PyTorch's form.

    ``g = grad + weight_decay * w``; ``v = momentum * v + (1 - dampening) * g`` (the first time ``v = g``);
    ``w -= lr * v``, or ``w -= lr * (g + momentum * v)`` with `nesterov` (Sutskever et al. 2013).

    Parameters
    ----------
    params : iterable of Parameter
        What to train.
    lr : float
        Learning rate.
    momentum, dampening : float
        Constants of the formula.
    weight_decay : float
        L2 penalty.
    nesterov : bool
        Whether to look ahead; needs momentum and no dampening.

    Raises
    ------
    ValueError, TypeError
        As `Optimizer`.
    """

    def __init__(self, params: Iterable[Parameter], lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
                 weight_decay: float = 0.0, nesterov: bool = False) -> None:
        super().__init__(params, lr, weight_decay)
        _check_range("SGD", "momentum", momentum, 0, math.inf, "momentum=0.9")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"SGD: nesterov=True with momentum={momentum} and dampening={dampening}, but it needs "
                             "momentum > 0 and dampening = 0. Hint: momentum=0.9")
        self.momentum = momentum
        self.dampening = dampening
        self.nesterov = nesterov

    def _update(self, value: Array, grad: Array, state: dict[str, Any]) -> None:
        velocity, first = state.get("velocity"), False
        if self.momentum and velocity is None:
            state["velocity"] = velocity = np.empty_like(value)
            first = True
        if on_device(value):
            from fastconv.backends.cuda import train

            train.sgd_step(value, grad, velocity if self.momentum else None, self.lr, self.momentum,
                           1 - self.dampening, self.weight_decay, first, self.nesterov)
            return
        current = settings()
        _cpu.sgd_step(value, np.ascontiguousarray(grad), velocity if self.momentum else None, self.lr, self.momentum,
                      1 - self.dampening, self.weight_decay, first, self.nesterov, current.isa, current.threads)


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1).

    ``m = beta1 * m + (1 - beta1) * g``; ``v = beta2 * v + (1 - beta2) * g**2``;
    ``w -= lr * m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)``, where t counts the steps of this parameter.

    Parameters
    ----------
    params : iterable of Parameter
        What to train.
    lr : float
        Learning rate.
    betas : (float, float)
        Constants of the formula.
    eps : float
        Added to the denominator.
    weight_decay : float
        L2 penalty: ``g = grad + weight_decay * w``. See `AdamW` for the decoupled one.

    Raises
    ------
    ValueError, TypeError
        As `Optimizer`.
    """

    decoupled = False
    """Whether weights decay beside the gradient rather than through it."""

    def __init__(self, params: Iterable[Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        op = type(self).__name__
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"{op}: betas is {betas}, but 0 <= beta < 1 is needed. Hint: betas=(0.9, 0.999)")
        _check_range(op, "eps", eps, 0, math.inf, "eps=1e-8")
        self.betas = betas
        self.eps = eps

    def _update(self, value: Array, grad: Array, state: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, mean=np.zeros_like(value), square=np.zeros_like(value))
        state["step"] += 1
        beta1, beta2 = self.betas
        step, decay = state["step"], self.weight_decay
        constants = (1 - self.lr * decay if self.decoupled else 1.0, 0.0 if self.decoupled else decay, 1 - beta1, beta2,
                     1 - beta2, self.lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), self.eps)
        if on_device(value):
            from fastconv.backends.cuda import train

            train.adam_step(value, grad, state["mean"], state["square"], constants)
            return
        current = settings()
        _cpu.adam_step(value, np.ascontiguousarray(grad), state["mean"], state["square"], constants, current.isa,
                       current.threads)


class AdamW(Adam):
    """Adam with decoupled weight decay, ``w *= 1 - lr * weight_decay`` before the step (Loshchilov and Hutter 2019).

    Parameters
    ----------
    params, lr, betas, eps
        As in `Adam`.
    weight_decay : float
        Decay for a learning rate of one.
    """

    decoupled = True

    def __init__(self, params: Iterable[Parameter], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 1e-2) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class Schedule:
    """Base class: after t calls of `step` the learning rate is ``base_lr * factor(t)``, also at once for t = 0.

    Parameters
    ----------
    optimizer : Optimizer
        Its `lr` at this moment is the base.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.base_lr = optimizer.lr
        self.count = 0
        self._apply()

    def factor(self, count: int) -> float:
        """Return the factor of the learning rate after `count` steps."""
        raise NotImplementedError

    def step(self) -> None:
        """Count one step (an epoch or a batch, as the caller likes) and set the learning rate."""
        self.count += 1
        self._apply()

    def _apply(self) -> None:
        self.optimizer.lr = self.base_lr * self.factor(self.count)

    def state_dict(self) -> dict[str, float]:
        """Return the base learning rate and the number of steps."""
        return {"base_lr": self.base_lr, "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state` and set the learning rate."""
        self.base_lr, self.count = float(state["base_lr"]), int(state["count"])
        self._apply()


class StepLR(Schedule):
    """Multiply the learning rate by `gamma` every `step_size` steps.

    Parameters
    ----------
    optimizer : Optimizer
        Whose `lr` to set.
    step_size : int
        At least 1.
    gamma : float
        Factor.
    """

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        _check_range("StepLR", "step_size", step_size, 1, math.inf, "step_size=30")
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer)

    def factor(self, count: int) -> float:
        """See `Schedule.factor`."""
        return float(self.gamma ** (count // self.step_size))


class MultiStepLR(Schedule):
    """Multiply the learning rate by `gamma` at each milestone.

    Parameters
    ----------
    optimizer : Optimizer
        Whose `lr` to set.
    milestones : iterable of int
        Numbers of steps.
    gamma : float
        Factor.
    """

    def __init__(self, optimizer: Optimizer, milestones: Iterable[int], gamma: float = 0.1) -> None:
        self.milestones = sorted(milestones)
        self.gamma = gamma
        super().__init__(optimizer)

    def factor(self, count: int) -> float:
        """See `Schedule.factor`."""
        return float(self.gamma ** bisect.bisect_right(self.milestones, count))


class CosineLR(Schedule):
    """Warm up linearly, then follow half a cosine down to `min_factor` (Loshchilov and Hutter 2017, equation 5).

    Parameters
    ----------
    optimizer : Optimizer
        Whose `lr` to set.
    total_steps : int
        Number of steps to the bottom, warm-up included; the factor stays there afterwards.
    warmup_steps : int
        During these the factor is ``(count + 1) / (warmup_steps + 1)``.
    min_factor : float
        Share of the learning rate at the end.

    Raises
    ------
    ValueError
        If the warm-up takes all steps or `min_factor` is not in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0,
                 min_factor: float = 0.0) -> None:
        _check_range("CosineLR", "min_factor", min_factor, 0, 1, "min_factor=0.01")
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(f"CosineLR: warmup_steps is {warmup_steps} and total_steps is {total_steps}, but "
                             "0 <= warmup_steps < total_steps is needed. Hint: the total includes the warm-up")
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.min_factor = min_factor
        super().__init__(optimizer)

    def factor(self, count: int) -> float:
        """See `Schedule.factor`."""
        if count < self.warmup_steps:
            return (count + 1) / (self.warmup_steps + 1)
        done = min((count - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.min_factor + (1 - self.min_factor) * (1 + math.cos(math.pi * done)) / 2
