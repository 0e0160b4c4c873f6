"""Gradients against central differences: the test that every layer of fastconv passes, for layers of your own too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastconv.arrays import FLOAT64, Array
from fastconv.nn.layer import Backward, Layer

Function = Callable[[Any], tuple[Any, Backward]]


class GradcheckError(AssertionError):
    """A gradient disagrees with the difference quotient; the message is the report."""


@dataclass(frozen=True)
class Comparison:
    """One array's gradient against difference quotients.

    Attributes
    ----------
    name : str
        ``"input"``, ``"input[1]"`` or the parameter's name.
    checked : str
        ``"every entry"`` or ``"5 directions"``.
    worst : str
        Where the largest error is: an index or the number of a direction.
    analytic, numeric : float
        The two gradients there.
    error, allowed : float
        Their difference and what is allowed.
    """

    name: str
    checked: str
    worst: str
    analytic: float
    numeric: float
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; a NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (f"{'ok  ' if self.ok else 'FAIL'} {self.name} ({self.checked}): worst at {self.worst}, "
                f"backward {self.analytic:.10g}, difference quotient {self.numeric:.10g}, "
                f"error {self.error:.2e}, allowed {self.allowed:.2e}")


def gradcheck(function: Layer | Function, x: Any, *, eps: float = 1e-6, rtol: float = 1e-6, atol: float = 1e-8,
              max_entries: int = 200, directions: int = 5, rng: np.random.Generator | int = 0) -> list[Comparison]:
    """Check a layer's or function's gradients by central differences in float64.

    For a random cotangent v the scalar ``L = <v, y>`` is differentiated by ``backward(v)`` and by
    ``(L(x + eps * d) - L(x - eps * d)) / (2 * eps)``: along random directions d for every array, and along each axis
    for arrays of at most `max_entries` entries.

    Parameters
    ----------
    function : Layer or callable
        A layer, whose `forward` is checked with all its trained parameters on copies (so that dropout with a generator
        of its own draws the same mask each time, and the layer is left as it was); or a function
        ``x -> (y, backward)`` without randomness.
    x : ndarray or tuple of ndarray
        float64. Keep it away from kinks (0 for ReLU, ties for max pooling) by more than `eps`. Arrays of a tuple that
        are not of floating point, such as pooling indices, are passed on and not differentiated.
    eps : float
        Step.
    rtol, atol : float
        Allowed is ``atol + rtol * scale`` with the largest gradient of the array as scale.
    max_entries : int
        Arrays up to this size are checked entry by entry.
    directions : int
        Number of random directions.
    rng : Generator or int
        Source of v and d.

    Returns
    -------
    list of Comparison
        For the input and each parameter. Printed, it is a readable report.

    Raises
    ------
    GradcheckError
        If a gradient is wrong, has the wrong shape or dtype, or is missing; the message names the worst entries.
    TypeError
        If `x` or a parameter is not float64.
    ValueError
        If two runs of the same input differ.
    """
    rng = np.random.default_rng(rng)
    inputs = x if isinstance(x, tuple) else (x,)
    names = [f"input[{i}]" for i in range(len(inputs))] if isinstance(x, tuple) else ["input"]
    values = {name: value for name, value in zip(names, inputs, strict=True) if value.dtype.kind == "f"}
    if isinstance(function, Layer):
        values |= {name: p.value for name, p in function.named_parameters() if p.requires_grad}
    for name, value in values.items():
        if value.dtype != FLOAT64:
            raise TypeError(f"gradcheck: {name} has dtype {value.dtype}, but differences need float64. "
                            "Hint: layers take dtype=np.float64")

    def run(changed: dict[str, Array]) -> tuple[Any, Backward, Layer | None]:
        arguments = tuple(changed.get(name, value) for name, value in zip(names, inputs, strict=True))
        argument = arguments if isinstance(x, tuple) else arguments[0]
        if not isinstance(function, Layer):
            return *function(argument), None
        layer = copy.deepcopy(function)
        layer.zero_grad()
        for name, parameter in layer.named_parameters():
            if name in changed:
                parameter.assign(changed[name])
        return *layer.forward(argument), layer

    y, backward, layer = run({})
    again, _, _ = run({})
    if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(_outputs(y), _outputs(again), strict=True)):
        raise ValueError("gradcheck: two runs of the same input give different outputs, so that there is no gradient. "
                         "Hint: give random layers a generator of their own, e.g. Dropout(rng=0)")
    cotangents = [rng.standard_normal(output.shape) for output in _outputs(y)]
    # What is no float (indices of a pool) has no gradient; a layer with one float output takes it alone.
    dx = backward(tuple(cotangents) if isinstance(y, tuple) and len(cotangents) > 1 else cotangents[0])
    gradients = dict(zip(names, dx if isinstance(dx, tuple) else (dx,), strict=False))
    if layer is not None:
        gradients |= {name: p.grad for name, p in layer.named_parameters()}

    def loss(name: str, value: Array) -> float:
        outputs = _outputs(run({name: value})[0])
        return float(sum(np.sum(v * output) for v, output in zip(cotangents, outputs, strict=True)))

    def quotient(name: str, direction: Array) -> float:
        step = eps * direction
        return (loss(name, values[name] + step) - loss(name, values[name] - step)) / (2 * eps)

    report = []
    for name, value in values.items():
        gradient = gradients.get(name)
        if gradient is None or gradient.shape != value.shape or gradient.dtype != value.dtype:
            what = "none" if gradient is None else f"one of shape {gradient.shape} and dtype {gradient.dtype}"
            raise GradcheckError(f"gradcheck: {name} has shape {value.shape} and dtype {value.dtype}, but backward "
                                 f"gave {what}")
        report += _compare(name, gradient, quotient, max_entries, directions, rng, rtol, atol)
    if not all(comparison.ok for comparison in report):
        raise GradcheckError("gradcheck: a gradient disagrees with central differences\n"
                             + "\n".join(map(str, report)))
    return report


def _outputs(y: Any) -> list[Array]:
    """The arrays of floating point among the outputs."""
    return [output for output in (y if isinstance(y, tuple) else (y,)) if output.dtype.kind == "f"]


def _compare(name: str, gradient: Array, quotient: Callable[[str, Array], float], max_entries: int, directions: int,
             rng: np.random.Generator, rtol: float, atol: float) -> list[Comparison]:
    """Difference quotients of one array along random directions and, if it is small, along every axis."""
    probes: list[tuple[str, list[tuple[str, Array]]]] = []
    lines = [rng.standard_normal(gradient.shape) for _ in range(directions)]
    unit = [(f"direction {i}", line / (float(np.linalg.norm(line)) or 1.0)) for i, line in enumerate(lines)]
    probes.append((f"{directions} directions", unit))
    if 0 < gradient.size <= max_entries:
        axes = np.eye(gradient.size).reshape(-1, *gradient.shape)
        indices = np.ndindex(gradient.shape)
        probes.append(("every entry", [(str(tuple(i)), axis) for i, axis in zip(indices, axes, strict=True)]))
    scale = float(np.max(np.abs(gradient), initial=0))
    results = []
    for checked, steps in probes:
        rows = [(where, float(np.sum(gradient * step)), quotient(name, step)) for where, step in steps]
        # NaN counts as the worst error.
        where, analytic, numeric = max(rows, key=lambda row: np.nan_to_num(abs(row[1] - row[2]), nan=np.inf))
        results.append(Comparison(name, checked, where, analytic, numeric, abs(analytic - numeric),
                                  atol + rtol * scale))
    return results
