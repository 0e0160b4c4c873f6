"""What every pool does around the backend: it adopts and checks its arguments, runs, and remembers what ran."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, TypeVar, cast

from fastconv.arrays import Array, as_array, as_indices, check_out, on_device
from fastconv.backends import reference, select
from fastconv.backends.cpu_pool import avg_pool_run, lp_pool_run, max_pool_run
from fastconv.config import settings
from fastconv.functional.conv import remember
from fastconv.problem import PoolProblem, batched, check_ndim

F = TypeVar("F", bound=Callable[..., Any])


def pool_backend(op: str, **arrays: Array) -> ModuleType:
    """The pools for arrays given by name: on the CPU the compiled ones, unless the reference is forced."""
    backend = select.backend(op, *arrays.items())
    return reference if backend is select.cpu and settings().algorithm == "reference" else backend


def by_ndim(function: F) -> tuple[F, F, F]:
    """Return `function` for 1, 2 and 3 spatial axes, each with its own name, signature and docstring."""
    return _fixed(function, 1), _fixed(function, 2), _fixed(function, 3)


def _fixed(function: F, ndim: int) -> F:
    def fixed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, ndim=ndim, **kwargs)

    signature = inspect.signature(function)
    axes = {1: "L", 2: "H, W", 3: "D, H, W"}[ndim]
    fixed.__name__ = fixed.__qualname__ = f"{function.__name__}{ndim}d"
    fixed.__module__ = function.__module__
    fixed.__doc__ = (f"`{function.__name__}` of an input (N, C, {axes}) or (C, {axes}).\n\n    "
                     f"{inspect.getdoc(function)}")
    fixed.__annotations__ = {k: v for k, v in function.__annotations__.items() if k != "ndim"}
    fixed.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p for p in signature.parameters.values() if p.name != "ndim"])
    return cast(F, fixed)


def adopt_input(array: object, ndim: int | None, op: str, name: str = "input") -> tuple[Array, int, bool, str]:
    """Adopt and batch an argument; return it, its spatial axes, whether it had no batch, and the op's full name."""
    x = as_array(array, name, op)
    ndim = check_ndim(x.ndim - 2 if ndim is None else ndim, op, name)
    op = f"{op}{ndim}d"
    x, alone = batched(x, ndim, op, name)
    return x, ndim, alone, op


def adopt_out(out: object, ndim: int, op: str) -> Array | None:
    """Adopt and batch the caller's array for the result."""
    return None if out is None else batched(as_array(out, "out", op), ndim, op, "out")[0]


def checked_out(out: Array | None, shape: tuple[int, ...], problem: PoolProblem, op: str,
                *inputs: Array) -> Array | None:
    """Return `out` if it can hold a result of this shape."""
    return None if out is None else check_out(out, shape, problem.dtype, "out", op, inputs)


def adopt_like(op: str, name: str, array: object, like: Array, alone: bool, shape: tuple[int, ...],
               what: str) -> Array:
    """Adopt a further float argument, which must have this (batched) shape and the dtype of `like`."""
    other = as_array(array, name, op)
    other = other[None] if alone else other
    if other.shape != shape:
        raise ValueError(f"{op}: {name} has shape {other.shape}, but {shape} is needed, the shape of {what}. "
                         "Hint: pass what the forward pass took and gave")
    if other.dtype != like.dtype:
        raise TypeError(f"{op}: {name} has dtype {other.dtype}, but the other arrays have dtype {like.dtype}. "
                        f"Hint: {name}.astype(np.{like.dtype})")
    return other


def adopt_indices(op: str, indices: object, alone: bool, shape: tuple[int, ...] | None, plane: int) -> Array:
    """Adopt indices; check their shape, and that they lie in a plane of `plane` elements.

    The compiled pools check each position where they use it, which saves two passes over them here.
    """
    array = as_indices(indices, "indices", op)
    array = array[None] if alone else array
    if shape is not None and array.shape != shape:
        raise ValueError(f"{op}: indices have shape {array.shape}, but {shape} is needed, the shape of the pooled "
                         "array. Hint: pass the indices that max_pool(..., return_indices=True) returned")
    if array.size and not on_device(array) and pool_backend(op, indices=array) is reference:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= plane:
            raise ValueError(f"{op}: indices are between {low} and {high}, but positions in a plane of {plane} "
                             f"elements run from 0 to {plane - 1}. Hint: pass the indices and the input size of the "
                             "max pool")
    return array


def with_batch(input_size: Sequence[int], alone: bool) -> Any:
    """Return the batched shape that `input_size` stands for."""
    return (1, *input_size) if alone and isinstance(input_size, (tuple, list)) else input_size


Run = Callable[[Array, Array | None], tuple[Array, Array | None]]  # (x, out) -> (y, indices or None)
_RUNS: dict[str, Callable[..., Run]] = {"max_pool": max_pool_run, "avg_pool": avg_pool_run, "lp_pool": lp_pool_run}


def forward_run(op: str, name: str, problem: PoolProblem, x: Array, option: Any = None) -> Run:
    """What runs a forward pool of arrays like `x`; `option` follows (problem, x) in the backend's function."""
    backend = pool_backend(op, input=x)
    if backend is select.cpu:
        return _RUNS[name](problem, option)
    function = getattr(backend, name)

    def run(x: Array, out: Array | None) -> tuple[Array, Array | None]:
        result = function(problem, x, option, out=out)
        return result if isinstance(result, tuple) else (result, None)
    return run


class _Repeat:
    """A pool that was checked before."""

    __slots__ = ("_alone", "_indices", "_run")

    def __init__(self, run: Run, alone: bool, indices: bool) -> None:
        self._run, self._alone, self._indices = run, alone, indices

    def __call__(self, x: Array, out: Array | None) -> Any:
        if self._alone:
            x, out = x[None], out if out is None else out[None]
        y, positions = self._run(x, out)
        if self._alone:
            y, positions = y[0], positions if positions is None else positions[0]
        return (y, positions) if self._indices else y


# What ran before, by call_key, as in conv.py.
repeats: dict[Any, Any] = {}


def pooled(problem: PoolProblem, run: Run, x: Array, alone: bool, out: Array | None, op: str, indices: bool = False, *,
           key: Any = None, since: int = 0) -> Any:
    """Run a pool for the first time; the result is y or (y, indices)."""
    out = checked_out(out, problem.y_shape, problem, op, x)
    repeat = _Repeat(run, alone, indices)
    result = repeat(x[0], out if out is None else out[0]) if alone else repeat(x, out)
    remember(repeats, key, repeat, since)
    return result


def differentiated(backend: ModuleType, name: str, problem: PoolProblem, arrays: tuple[Array, ...], alone: bool,
                   out: Array | None, op: str, *, key: Any = None, since: int = 0, **options: Any) -> Array:
    """Run the gradient of a pool for the first time."""
    run = partial(getattr(backend, name), problem, **options)
    dx = run(*arrays, out=checked_out(out, problem.x_shape, problem, op, *arrays))
    if backend is not reference and not alone:  # the reference takes indices that were checked here
        remember(repeats, key, run, since)
    return cast(Array, dx[0] if alone else dx)


def from_output(name: str, problem: PoolProblem, x: Array, grad_output: object, output: object, alone: bool,
                out: object, op: str, **options: Any) -> Array:
    """Run a gradient that is found from the input and the output of the pool."""
    dy = adopt_like(op, "grad_output", grad_output, x, alone, problem.y_shape, "the output")
    y = adopt_like(op, "output", output, x, alone, problem.y_shape, "the output")
    return differentiated(pool_backend(op, input=x, output=y, grad_output=dy), name, problem, (x, y, dy), alone,
                          adopt_out(out, problem.ndim, op), op, **options)
