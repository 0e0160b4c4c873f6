"""Arrays decide the backend: those on a GPU run there, those in host memory on the CPU."""

from __future__ import annotations

import marshal
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from fastconv.arrays import Array, check_same_place
from fastconv.backends import _cpu, cpu, cpu_train


def backend(op: str, *arrays: tuple[str, Array | None]) -> ModuleType:
    """The backend for arrays given with their names; TypeError if they lie in several places."""
    if not check_same_place(op, *arrays):
        return cpu
    from fastconv.backends import cuda

    return cuda


def training(op: str, *arrays: tuple[str, Array | None]) -> ModuleType:
    """The passes of training for arrays given with their names; see `backend`."""
    if not check_same_place(op, *arrays):
        return cpu_train
    from fastconv.backends.cuda import train

    return train


def call_key(options: tuple[Any, ...], a: Any, b: Any = None, c: Any = None, out: Any = None) -> Any:
    """What two calls have in common that need the same checks and the same plan; see `fastconv.backends._cpu.call_key`.

    For arrays on a GPU too, without `out`; what runs there was prepared by one provider.
    """
    if isinstance(a, np.ndarray):
        return _cpu.call_key(options, a, b, c, out)
    if out is not None:
        return None
    try:
        # 1, 1.0 and True are equal and hash alike; as bytes they differ. Version 2 writes equal objects alike.
        return marshal.dumps(options, 2), _layout(a), _layout(b), _layout(c), _device().provider()
    except (AttributeError, ValueError, TypeError, RuntimeError):  # no arrays, options of the user's classes, no GPU
        return None


@cache
def _device() -> ModuleType:
    from fastconv.backends.cuda import device  # only now: most processes never see a GPU

    return device


def _layout(x: Any) -> Any:
    if x is None:
        return None
    if isinstance(x, np.ndarray):
        raise TypeError  # mixed: the checks find the words
    return type(x), x.shape, x.strides, x.dtype.char
