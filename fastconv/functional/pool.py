"""Pooling and unpooling in one, two and three dimensions, and their gradients.

Names and argument order are PyTorch's. Every function is written once for N spatial axes; ``max_pool1d``,
``max_pool2d`` and ``max_pool3d`` are ``max_pool`` with ``ndim`` fixed. ``input`` is (N, C, *spatial) or, where
the number of spatial axes is fixed, (C, *spatial) without a batch; float32 or float64; any strides. Results are
of the same dtype and in the memory order of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast, overload

from fastconv.arrays import Array
from fastconv.backends import cpu_pool, select
from fastconv.backends.cpu_pool import Taps
from fastconv.backends.select import call_key
from fastconv.config import token
from fastconv.functional.pool_calls import (
    adopt_indices,
    adopt_input,
    adopt_like,
    adopt_out,
    by_ndim,
    checked_out,
    differentiated,
    forward_run,
    from_output,
    pool_backend,
    pooled,
    repeats,
    with_batch,
)
from fastconv.problem import (
    adaptive_pool_grad_problem,
    adaptive_pool_problem,
    indexed_grad_problem,
    pool_grad_problem,
    pool_problem,
    unpool_grad_problem,
    unpool_problem,
)

Sizes = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[Sequence[int]]


@overload
def max_pool(input: object, kernel_size: Sizes, stride: Sizes | None = ..., padding: Padding = ...,
             dilation: Sizes = ..., ceil_mode: bool = ..., return_indices: Literal[False] = ..., *,
             ndim: int | None = ..., out: Array | None = ...) -> Array: ...
@overload
def max_pool(input: object, kernel_size: Sizes, stride: Sizes | None = ..., padding: Padding = ...,
             dilation: Sizes = ..., ceil_mode: bool = ..., *, return_indices: Literal[True],
             ndim: int | None = ..., out: Array | None = ...) -> tuple[Array, Array]: ...
@overload
def max_pool(input: object, kernel_size: Sizes, stride: Sizes | None, padding: Padding, dilation: Sizes,
             ceil_mode: bool, return_indices: bool, *, ndim: int | None = ...,
             out: Array | None = ...) -> Array | tuple[Array, Array]: ...
def max_pool(input: object, kernel_size: Sizes, stride: Sizes | None = None, padding: Padding = 0,
             dilation: Sizes = 1, ceil_mode: bool = False, return_indices: bool = False, *,
             ndim: int | None = None, out: Array | None = None) -> Array | tuple[Array, Array]:
    """Return the maximum of every window.

    Parameters
    ----------
    input : (N, C, *spatial)
    kernel_size, dilation
        An integer or one per spatial axis.
    stride
        The same; ``kernel_size`` if None.
    padding
        Elements that are never the maximum: numbers up to ``kernel_size // 2``, pairs (lo, hi) per axis,
        ``"same"``, ``"same_lower"`` or ``"valid"``.
    ceil_mode
        Round the output size up: a last window may hang over the end if it starts inside the input or the padding
        before it.
    return_indices
        Also return where each maximum was found.
    ndim
        Number of spatial axes; that of a batched `input` if None.
    out
        Array for the maxima, of their shape and dtype.

    Returns
    -------
    y : (N, C, *out_size)
        out = floor((in + pad_lo + pad_hi - dilation * (kernel_size - 1) - 1) / stride) + 1. NaN counts as greater
        than everything.
    indices : (N, C, *out_size), int64
        Only with `return_indices`: flat row-major positions within each channel of `input`, without padding; of
        equal maxima, the first.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    options = ("max_pool", kernel_size, stride, padding, dilation, ceil_mode, return_indices, ndim, token())
    key = call_key(options, input, out=out)
    repeat = repeats.get(key)
    if repeat is not None:
        return repeat(input, out)
    x, ndim, alone, op = adopt_input(input, ndim, "max_pool")
    out = adopt_out(out, ndim, op)
    problem = pool_problem(x, kernel_size, stride, padding, dilation, ceil_mode, ndim=ndim, op=op, out=out)
    run = forward_run(op, "max_pool", problem, x, return_indices)
    return cast(Array, pooled(problem, run, x, alone, out, op, return_indices, key=key, since=options[-1]))


def max_pool_grad(grad_output: object, indices: object, input_size: Sequence[int], *, ndim: int | None = None,
                  out: Array | None = None) -> Array:
    """Return the gradient of any max pool (also adaptive and global) for its input.

    Parameters
    ----------
    grad_output, indices : (N, C, *out_size)
        The indices are those that the pool returned.
    input_size
        Shape of the pool's input, (N, C, *in_size).
    ndim
        Number of spatial axes; needed if there is no batch.
    out
        Array for the result, of shape `input_size`.

    Returns
    -------
    (N, C, *in_size)
        ``dx[n, c, i]`` is the sum of ``grad_output[n, c, o]`` over all o with ``indices[n, c, o] == i``.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; indices outside the input included.
    """
    options = ("max_pool_grad", input_size, ndim, token())
    key = call_key(options, grad_output, indices, out=out)
    repeat = repeats.get(key)
    if repeat is not None:
        return repeat(grad_output, indices, out=out)
    dy, ndim, alone, op = adopt_input(grad_output, ndim, "max_pool_grad", "grad_output")
    out = adopt_out(out, ndim, op)
    problem = indexed_grad_problem(with_batch(input_size, alone), dy, ndim=ndim, op=op, out=out)
    positions = adopt_indices(op, indices, alone, dy.shape, math.prod(problem.in_size))
    backend = pool_backend(op, grad_output=dy, indices=positions)
    return differentiated(backend, "max_pool_grad", problem, (dy, positions), alone, out, op, key=key,
                          since=options[-1])


def max_pool_input_grad(grad_output: object, input: object, output: object, kernel_size: Sizes,
                        stride: Sizes | None = None, padding: Padding = 0, dilation: Sizes = 1,
                        ceil_mode: bool = False, *, ndim: int | None = None, out: Array | None = None) -> Array:
    """Return the gradient of `max_pool` for its input from input and output, where indices were not kept.

    Parameters
    ----------
    grad_output, output : (N, C, *out_size)
        `output` is what the pool returned.
    input : (N, C, *in_size)
    kernel_size, stride, padding, dilation, ceil_mode
        Those of the pool.
    ndim
        Number of spatial axes; needed if there is no batch.
    out
        Array for the result, of the shape of `input`.

    Returns
    -------
    (N, C, *in_size)
        What `max_pool_grad` returns for the indices of the pool.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    x, ndim, alone, op = adopt_input(input, ndim, "max_pool_input_grad")
    problem = pool_problem(x, kernel_size, stride, padding, dilation, ceil_mode, ndim=ndim, op=op)
    return from_output("max_pool_input_grad", problem, x, grad_output, output, alone, out, op)


def max_pool_taps(input: object, kernel_size: Sizes, stride: Sizes | None, padding: Padding, dilation: Sizes,
                  ceil_mode: bool, *, ndim: int | None, out: Array | None = None) -> tuple[Array, Taps | None]:
    """`max_pool` for layers that train: the result, and what `max_pool_taps_grad` needs instead of the input.

    That is None where only `max_pool_input_grad` serves: on a GPU, in the reference, and for windows of more than 256
    taps or, in NCHW, few planes.
    """
    x, ndim, alone, op = adopt_input(input, ndim, "max_pool")
    problem = pool_problem(x, kernel_size, stride, padding, dilation, ceil_mode, ndim=ndim, op=op)
    out = checked_out(adopt_out(out, ndim, op), problem.y_shape, problem, op, x)
    backend, taps = pool_backend(op, input=x), None
    if backend is select.cpu:
        y, taps = cpu_pool.max_pool_taps(problem, x, out=out)
    else:
        y = backend.max_pool(problem, x, False, out=out)[0]
    return (y[0] if alone else y), taps


def max_pool_taps_grad(grad_output: Array, taps: Taps, *, out: Array) -> Array:
    """Return the gradient of `max_pool_taps` for its input, in `out`."""
    problem, alone = taps.problem, out.ndim < taps.problem.ndim + 2
    op = f"max_pool{problem.ndim}d_grad"
    dy = adopt_like(op, "grad_output", grad_output, out, alone, problem.y_shape, "the output")
    dx = cpu_pool.max_pool_taps_grad(taps, dy, out=out[None] if alone else out)
    return dx[0] if alone else dx


def _divisor(value: Any, op: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: divisor_override is {value!r}, but an integer other than 0 is needed. "
                        "Hint: None divides by the size of each window")
    if value == 0:
        raise ValueError(f"{op}: divisor_override is 0, but an integer other than 0 is needed. "
                         "Hint: None divides by the size of each window")
    return int(value)


def avg_pool(input: object, kernel_size: Sizes, stride: Sizes | None = None, padding: Padding = 0,
             ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None, *,
             dilation: Sizes = 1, ndim: int | None = None, out: Array | None = None) -> Array:
    """Return the mean of every window.

    Parameters
    ----------
    input : (N, C, *spatial)
    kernel_size, stride, padding, ceil_mode, dilation, ndim, out
        As in `max_pool`.
    count_include_pad
        Divide by the number of elements of the window with those of the padding (but not those behind the
        padding, in ``ceil_mode``), else by those of the input alone.
    divisor_override
        Divide every sum by this integer instead.

    Returns
    -------
    (N, C, *out_size)

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    options = ("avg_pool", kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation, ndim,
               token())
    key = call_key(options, input, out=out)
    repeat = repeats.get(key)
    if repeat is not None:
        return repeat(input, out)
    x, ndim, alone, op = adopt_input(input, ndim, "avg_pool")
    out = adopt_out(out, ndim, op)
    problem = pool_problem(x, kernel_size, stride, padding, dilation, ceil_mode, count_include_pad, ndim=ndim,
                           op=op, out=out)
    run = forward_run(op, "avg_pool", problem, x, _divisor(divisor_override, op))
    return cast(Array, pooled(problem, run, x, alone, out, op, key=key, since=options[-1]))


def avg_pool_grad(grad_output: object, input_size: Sequence[int], kernel_size: Sizes, stride: Sizes | None = None,
                  padding: Padding = 0, ceil_mode: bool = False, count_include_pad: bool = True,
                  divisor_override: int | None = None, *, dilation: Sizes = 1, ndim: int | None = None,
                  out: Array | None = None) -> Array:
    """Return the gradient of `avg_pool` for its input, of shape `input_size`.

    Parameters
    ----------
    grad_output : (N, C, *out_size)
    input_size
        Shape of the pool's input, (N, C, *in_size).
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, dilation
        Those of the pool.
    ndim
        Number of spatial axes; needed if there is no batch.
    out
        Array for the result, of shape `input_size`.

    Returns
    -------
    (N, C, *in_size)

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    options = ("avg_pool_grad", input_size, kernel_size, stride, padding, ceil_mode, count_include_pad,
               divisor_override, dilation, ndim, token())
    key = call_key(options, grad_output, out=out)
    repeat = repeats.get(key)
    if repeat is not None:
        return repeat(grad_output, out=out)
    dy, ndim, alone, op = adopt_input(grad_output, ndim, "avg_pool_grad", "grad_output")
    out = adopt_out(out, ndim, op)
    problem = pool_grad_problem(with_batch(input_size, alone), dy, kernel_size, stride, padding, dilation, ceil_mode,
                                count_include_pad, ndim=ndim, op=op, out=out)
    return differentiated(pool_backend(op, grad_output=dy), "avg_pool_grad", problem, (dy,), alone, out, op, key=key,
                          since=options[-1], divisor=_divisor(divisor_override, op))


def _exponent(value: Any, op: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: norm_type is {value!r}, but a number is needed. Hint: 2 is the Euclidean norm")
    if not math.isfinite(value) or value == 0:
        raise ValueError(f"{op}: norm_type is {value}, but a finite number other than 0 is needed. "
                         "Hint: the limit of large norms is max_pool")
    return float(value)


def lp_pool(input: object, norm_type: float, kernel_size: Sizes, stride: Sizes | None = None,
            ceil_mode: bool = False, *, padding: Padding = 0, dilation: Sizes = 1, ndim: int | None = None,
            out: Array | None = None) -> Array:
    """Return ``(sum of x ** p) ** (1 / p)`` over every window, with p = `norm_type`.

    As in PyTorch there are no absolute values, so that a negative sum (odd p) gives NaN, and the sum of a window
    that hangs over the end (``ceil_mode``) is scaled up to the size of a whole window.

    Parameters
    ----------
    input : (N, C, *spatial)
    norm_type
        The exponent p, finite and not 0.
    kernel_size, stride, ceil_mode, padding, dilation, ndim, out
        As in `max_pool`.

    Returns
    -------
    (N, C, *out_size)

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    x, ndim, alone, op = adopt_input(input, ndim, "lp_pool")
    p = _exponent(norm_type, op)
    out = adopt_out(out, ndim, op)
    problem = pool_problem(x, kernel_size, stride, padding, dilation, ceil_mode, ndim=ndim, op=op, out=out)
    return cast(Array, pooled(problem, forward_run(op, "lp_pool", problem, x, p), x, alone, out, op))


def lp_pool_grad(grad_output: object, input: object, output: object, norm_type: float, kernel_size: Sizes,
                 stride: Sizes | None = None, ceil_mode: bool = False, *, padding: Padding = 0,
                 dilation: Sizes = 1, ndim: int | None = None, out: Array | None = None) -> Array:
    """Return the gradient of `lp_pool` for its input; zero where the output is zero.

    Parameters
    ----------
    grad_output, output : (N, C, *out_size)
        `output` is what the pool returned.
    input : (N, C, *in_size)
    norm_type, kernel_size, stride, ceil_mode, padding, dilation
        Those of the pool.
    ndim
        Number of spatial axes; needed if there is no batch.
    out
        Array for the result, of the shape of `input`.

    Returns
    -------
    (N, C, *in_size)

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    x, ndim, alone, op = adopt_input(input, ndim, "lp_pool_grad")
    p = _exponent(norm_type, op)
    problem = pool_problem(x, kernel_size, stride, padding, dilation, ceil_mode, ndim=ndim, op=op)
    return from_output("lp_pool_grad", problem, x, grad_output, output, alone, out, op, p=p)


def adaptive_avg_pool(input: object, output_size: int | Sequence[int | None] | None, *, ndim: int | None = None,
                      out: Array | None = None) -> Array:
    """Return the means of windows that divide each spatial axis into a given number of parts.

    Parameters
    ----------
    input : (N, C, *spatial)
    output_size
        An integer or one per spatial axis; None keeps the size of an axis.
    ndim, out
        As in `max_pool`.

    Returns
    -------
    (N, C, *output_size)
        Output o covers the inputs from floor(o * in / out) up to, not including, ceil((o + 1) * in / out).

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    options = ("adaptive_avg_pool", output_size, ndim, token())
    key = call_key(options, input, out=out)
    repeat = repeats.get(key)
    if repeat is not None:
        return repeat(input, out)
    x, ndim, alone, op = adopt_input(input, ndim, "adaptive_avg_pool")
    out = adopt_out(out, ndim, op)
    problem = adaptive_pool_problem(x, output_size, ndim=ndim, op=op, out=out)
    run = forward_run(op, "avg_pool", problem, x)
    return cast(Array, pooled(problem, run, x, alone, out, op, key=key, since=options[-1]))


def adaptive_avg_pool_grad(grad_output: object, input_size: Sequence[int], *, ndim: int | None = None,
                           out: Array | None = None) -> Array:
    """Return the gradient of `adaptive_avg_pool` and `global_avg_pool` for the input, of shape `input_size`.

    Parameters
    ----------
    grad_output : (N, C, *output_size)
    input_size
        Shape of the pool's input, (N, C, *in_size).
    ndim
        Number of spatial axes; needed if there is no batch.
    out
        Array for the result, of shape `input_size`.

    Returns
    -------
    (N, C, *in_size)

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    dy, ndim, alone, op = adopt_input(grad_output, ndim, "adaptive_avg_pool_grad", "grad_output")
    out = adopt_out(out, ndim, op)
    problem = adaptive_pool_grad_problem(with_batch(input_size, alone), dy, ndim=ndim, op=op, out=out)
    return differentiated(pool_backend(op, grad_output=dy), "avg_pool_grad", problem, (dy,), alone, out, op)


@overload
def adaptive_max_pool(input: object, output_size: int | Sequence[int | None] | None,
                      return_indices: Literal[False] = ..., *, ndim: int | None = ...,
                      out: Array | None = ...) -> Array: ...
@overload
def adaptive_max_pool(input: object, output_size: int | Sequence[int | None] | None,
                      return_indices: Literal[True], *, ndim: int | None = ...,
                      out: Array | None = ...) -> tuple[Array, Array]: ...
@overload
def adaptive_max_pool(input: object, output_size: int | Sequence[int | None] | None, return_indices: bool, *,
                      ndim: int | None = ..., out: Array | None = ...) -> Array | tuple[Array, Array]: ...
def adaptive_max_pool(input: object, output_size: int | Sequence[int | None] | None, return_indices: bool = False,
                      *, ndim: int | None = None, out: Array | None = None) -> Array | tuple[Array, Array]:
    """Return the maxima of the windows of `adaptive_avg_pool`.

    Parameters
    ----------
    input : (N, C, *spatial)
    output_size
        As in `adaptive_avg_pool`.
    return_indices, ndim, out
        As in `max_pool`.

    Returns
    -------
    y : (N, C, *output_size)
    indices : (N, C, *output_size), int64
        Only with `return_indices`; their gradient is `max_pool_grad`.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; the message says which rule was broken.
    """
    options = ("adaptive_max_pool", output_size, return_indices, ndim, token())
    key = call_key(options, input, out=out)
    repeat = repeats.get(key)
    if repeat is not None:
        return repeat(input, out)
    x, ndim, alone, op = adopt_input(input, ndim, "adaptive_max_pool")
    out = adopt_out(out, ndim, op)
    problem = adaptive_pool_problem(x, output_size, ndim=ndim, op=op, out=out)
    run = forward_run(op, "max_pool", problem, x, return_indices)
    return cast(Array, pooled(problem, run, x, alone, out, op, return_indices, key=key, since=options[-1]))


def global_avg_pool(input: object, *, ndim: int | None = None, out: Array | None = None) -> Array:
    """Return the mean of every channel, (N, C, *spatial) -> (N, C, 1, ...).

    Its gradient is `adaptive_avg_pool_grad`. Parameters and errors as in `adaptive_avg_pool` with output_size 1.

    References
    ----------
    Lin, Chen and Yan, "Network in network", ICLR 2014, https://arxiv.org/abs/1312.4400, section 3.2.
    """
    return adaptive_avg_pool(input, 1, ndim=ndim, out=out)


@overload
def global_max_pool(input: object, return_indices: Literal[False] = ..., *, ndim: int | None = ...,
                    out: Array | None = ...) -> Array: ...
@overload
def global_max_pool(input: object, return_indices: Literal[True], *, ndim: int | None = ...,
                    out: Array | None = ...) -> tuple[Array, Array]: ...
@overload
def global_max_pool(input: object, return_indices: bool, *, ndim: int | None = ...,
                    out: Array | None = ...) -> Array | tuple[Array, Array]: ...
def global_max_pool(input: object, return_indices: bool = False, *, ndim: int | None = None,
                    out: Array | None = None) -> Array | tuple[Array, Array]:
    """Return the maximum of every channel, (N, C, *spatial) -> (N, C, 1, ...), and where it is.

    Its gradient is `max_pool_grad`. Parameters, results and errors as in `adaptive_max_pool` with output_size 1.
    """
    return adaptive_max_pool(input, 1, return_indices, ndim=ndim, out=out)


def max_unpool(input: object, indices: object, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0,
               output_size: Sequence[int] | None = None, *, ndim: int | None = None,
               out: Array | None = None) -> Array:
    """Return zeros with every element of `input` where its index says: the partial inverse of `max_pool`.

    Parameters
    ----------
    input, indices : (N, C, *pooled)
        As `max_pool` returned them. If an index occurs twice in a channel, the last one counts.
    kernel_size, stride, padding
        Those of the max pool; an integer or one per spatial axis.
    output_size
        The unpooled size, with or without N and C, less than one stride away from
        (in - 1) * stride + kernel_size - 2 * padding, which None chooses.
    ndim
        Number of spatial axes; that of a batched `input` if None.
    out
        Array for the result.

    Returns
    -------
    (N, C, *output_size)

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; indices outside the output included.

    References
    ----------
    Zeiler and Fergus, "Visualizing and understanding convolutional networks", ECCV 2014,
    https://arxiv.org/abs/1311.2901, section 2.1.
    """
    x, ndim, alone, op = adopt_input(input, ndim, "max_unpool")
    out = adopt_out(out, ndim, op)
    problem = unpool_problem(x, kernel_size, stride, padding, output_size, ndim=ndim, op=op, out=out)
    positions = adopt_indices(op, indices, alone, x.shape, math.prod(problem.in_size))
    out = checked_out(out, problem.x_shape, problem, op, x, positions)
    y = pool_backend(op, input=x, indices=positions).max_unpool(problem, x, positions, out=out)
    return cast(Array, y[0] if alone else y)


def max_unpool_grad(grad_output: object, indices: object, *, ndim: int | None = None,
                    out: Array | None = None) -> Array:
    """Return the gradient of `max_unpool` for its input: each element of `grad_output` that an index names.

    Parameters
    ----------
    grad_output : (N, C, *unpooled)
    indices : (N, C, *pooled), int64
    ndim
        Number of spatial axes; needed if there is no batch.
    out
        Array for the result, of the shape of `indices`.

    Returns
    -------
    (N, C, *pooled)

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type, shape or value; indices outside `grad_output` included.
    """
    dy, ndim, alone, op = adopt_input(grad_output, ndim, "max_unpool_grad", "grad_output")
    out = adopt_out(out, ndim, op)
    positions = adopt_indices(op, indices, alone, None, math.prod(dy.shape[2:]))
    problem = unpool_grad_problem(dy, positions.shape, ndim=ndim, op=op, out=out)
    out = checked_out(out, problem.y_shape, problem, op, dy, positions)
    dx = pool_backend(op, grad_output=dy, indices=positions).max_unpool_grad(problem, dy, positions, out=out)
    return cast(Array, dx[0] if alone else dx)


max_pool1d, max_pool2d, max_pool3d = by_ndim(max_pool)
avg_pool1d, avg_pool2d, avg_pool3d = by_ndim(avg_pool)
lp_pool1d, lp_pool2d, lp_pool3d = by_ndim(lp_pool)
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = by_ndim(adaptive_avg_pool)
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = by_ndim(adaptive_max_pool)
max_unpool1d, max_unpool2d, max_unpool3d = by_ndim(max_unpool)
