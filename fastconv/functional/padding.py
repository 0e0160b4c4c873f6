"""Padding with other things than zeros: the input is padded in memory, its gradient folded back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastconv.arrays import Array, memory_order
from fastconv.problem import explicit_padding

# Name, NumPy's name for it, and how much padding an axis of length n allows.
_MODES: dict[str, tuple[str, Callable[[int], int]]] = {
    "reflect": ("reflect", lambda n: n - 1),
    "replicate": ("edge", lambda n: 2**31 if n else 0),
    "circular": ("wrap", lambda n: n),
}


def check_padding_mode(op: str, in_size: tuple[int, ...], kernel: tuple[int, ...], stride: Any, padding: Any,
                       dilation: Any, mode: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and behind each axis, checked against what the mode allows."""
    if mode not in _MODES:
        raise ValueError(f"{op}: padding_mode is {mode!r}, but one of 'zeros', {', '.join(map(repr, _MODES))} is "
                         "needed. Hint: 'replicate' repeats the edge, 'reflect' mirrors without it")
    ndim = len(in_size)
    stride, dilation = ((v,) * ndim if isinstance(v, int) else tuple(v) * (ndim if len(v) == 1 else 1)
                        for v in (stride, dilation))
    lo, hi = explicit_padding(padding, in_size, kernel, stride, dilation, op)
    for n, a, b in zip(in_size, lo, hi, strict=True):
        limit = _MODES[mode][1](n)
        if max(a, b) > limit:
            raise ValueError(f"{op}: padding is ({a}, {b}) along an axis of length {n}, but padding_mode={mode!r} "
                             f"allows at most {limit} there. Hint: padding_mode='replicate' has no limit")
    return lo, hi


def pad(x: Array, lo: tuple[int, ...], hi: tuple[int, ...], mode: str) -> Array:
    """A padded copy of `x` (N, C, \\*spatial) in the same memory order."""
    last = memory_order(x) == "channels_last"
    result, first = (np.moveaxis(x, 1, -1), 1) if last else (x, 2)
    for axis, (n, a, b) in enumerate(zip(x.shape[2:], lo, hi, strict=True), first):
        if a or b:
            source = np.asarray(_source(n, a, b, mode), like=result)
            result = np.take(result, source, axis=axis)
    return np.moveaxis(result, -1, 1) if last else result


def fold_padding(dx: Array, lo: tuple[int, ...], hi: tuple[int, ...], mode: str) -> Array:
    """The gradient of `pad`: adds the gradient of every padded element to that of the element it was copied from."""
    for axis, (a, b) in enumerate(zip(lo, hi, strict=True), 2):
        if not (a or b):
            continue
        n = dx.shape[axis] - a - b
        inner = _along(axis, slice(a, a + n))
        source = _source(n, a, b, mode)
        for at in (*range(a), *range(a + n, a + n + b)):
            dx[inner][_along(axis, source[at])] += dx[_along(axis, at)]
        dx = dx[inner]
    return dx


def _source(n: int, lo: int, hi: int, mode: str) -> Any:
    return np.pad(np.arange(n), (lo, hi), mode=_MODES[mode][0])  # type: ignore[call-overload]


def _along(axis: int, index: Any) -> tuple[Any, ...]:
    return (slice(None),) * axis + (index,)
