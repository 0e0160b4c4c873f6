"""Batch normalisation and local response normalisation, with their gradients.

Input and output are (N, C, \\*spatial) in float32 or float64; outputs keep the memory order of the input. Sums over
the batch are taken in float64 over sums of at most 64 elements, so that a mean over many elements loses nothing in
float32.
"""

from __future__ import annotations

import math

import numpy as np

from fastconv.arrays import Array, as_array, on_device
from fastconv.backends import _cpu, select
from fastconv.functional.pointwise import check_grad, quiet


def _check_channels(x: Array, arrays: dict[str, Array | None], op: str) -> None:
    if x.ndim < 2 and x.shape != (0,):  # PyTorch takes an empty vector for no channels
        raise ValueError(f"{op}: input has shape {x.shape}, but (N, C, *spatial) is needed: at least 2 axes. "
                         "Hint: add the missing axis with input[None]")
    channels = x.shape[1] if x.ndim > 1 else 0
    for name, array in arrays.items():
        if array is not None and array.shape != (channels,):
            raise ValueError(f"{op}: {name} has shape {array.shape}, but input has {channels} channels: shape "
                             f"({channels},) is needed. Hint: the channels are axis 1 of {x.shape}")


@quiet
def batch_statistics(input: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel over the batch and the spatial axes.

    Parameters
    ----------
    input : ndarray
        Shape (N, C, \\*spatial).

    Returns
    -------
    mean, var : ndarray
        float64 of shape (C,); NaN if the batch is empty.
    """
    x = as_array(input, "input", "batch_statistics")
    _check_channels(x, {}, "batch_statistics")
    if x.size == 0:
        nothing = np.asarray(np.full(x.shape[1:2], np.nan), like=x)
        return nothing, nothing.copy()
    return select.training("batch_statistics", ("input", x)).batch_moments(x)


def _reduced(x: Array) -> int:
    """The number of elements of each channel."""
    return int(x.shape[0] * math.prod(x.shape[2:]))


@quiet
def normalize(input: Array, mean: Array, var: Array, weight: Array | None = None, bias: Array | None = None,
              eps: float = 1e-5) -> Array:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` for each channel.

    Parameters
    ----------
    input : ndarray
        Shape (N, C, \\*spatial).
    mean, var : ndarray
        Shape (C,); usually the float64 of `batch_statistics` or running statistics.
    weight, bias : ndarray, optional
        Shape (C,); ones and zeros where left out.
    eps : float
        Added to the variance.

    Returns
    -------
    ndarray
        Shape, dtype and memory order of `input`.

    Raises
    ------
    ValueError
        If a per-channel array has another shape than (C,).
    """
    x = as_array(input, "input", "normalize")
    _check_channels(x, {"mean": mean, "var": var, "weight": weight, "bias": bias}, "normalize")
    if x.size == 0:
        return np.empty_like(x)
    passes = select.training("normalize", ("input", x), ("mean", mean), ("var", var), ("weight", weight),
                             ("bias", bias))
    return passes.batch_norm(x, _doubles(mean), _doubles(var), weight, bias, eps)


def _doubles(values: Array) -> Array:
    return values.astype(np.float64, copy=False) if on_device(values) else np.ascontiguousarray(values, np.float64)


def batch_norm(input: Array, running_mean: Array | None, running_var: Array | None, weight: Array | None = None,
               bias: Array | None = None, training: bool = False, momentum: float = 0.1,
               eps: float = 1e-5) -> Array:
    """Batch normalisation (Ioffe and Szegedy 2015, algorithm 1).

    Parameters
    ----------
    input : ndarray
        Shape (N, C, \\*spatial), float32 or float64.
    running_mean, running_var : ndarray or None
        Shape (C,). Used as they are with ``training=False``; with ``training=True`` they are moved in place towards
        the statistics of the batch (the unbiased variance, as in PyTorch), if given.
    weight, bias : ndarray, optional
        Shape (C,): scale and shift after normalisation.
    training : bool
        Whether to normalise by the statistics of the batch.
    momentum : float
        ``running = (1 - momentum) * running + momentum * batch``.
    eps : float
        Added to the variance.

    Returns
    -------
    ndarray
        Shape, dtype and memory order of `input`.

    Raises
    ------
    ValueError
        For wrong shapes; if ``training=False`` comes without running statistics; if ``training=True`` meets a
        single value per channel, whose variance is not defined; if eps is not positive.
    TypeError
        For another dtype than float32 and float64.
    """
    x = as_array(input, "input", "batch_norm")
    _check_channels(x, {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias},
                    "batch_norm")
    check_eps(eps)
    if x.size == 0:
        return np.empty_like(x)
    if not training:
        mean, var = _running(running_mean, running_var, "batch_norm")
        return normalize(x, mean, var, weight, bias, eps)
    check_several_values(x)
    mean, var = batch_statistics(x)
    update_running(running_mean, running_var, mean, var, _reduced(x), momentum)
    return normalize(x, mean, var, weight, bias, eps)


def check_eps(eps: float) -> None:
    """Check the eps of batch normalisation; raises ValueError."""
    if not eps > 0:
        raise ValueError(f"batch_norm: eps is {eps}, but it keeps a division finite: eps > 0 is needed. "
                         "Hint: eps=1e-5")


def check_several_values(x: Array) -> None:
    """Check that each channel of `x` has more than one value to take a variance of; raises ValueError."""
    if _reduced(x) == 1:
        raise ValueError(f"batch_norm: input has shape {x.shape}, that is 1 value per channel, but training needs "
                         "a variance: more than 1 value. Hint: a larger batch, or frozen statistics")


def update_running(running_mean: Array | None, running_var: Array | None, mean: Array, var: Array, count: int,
                   momentum: float) -> None:
    """Move running statistics in place towards a batch of `count` values per channel; an empty one moves nothing."""
    if count == 0:
        return
    for running, batch, factor in ((running_mean, mean, 1.0), (running_var, var, count / (count - 1))):
        if running is None:
            continue
        if on_device(running) or not all(a.flags.c_contiguous for a in (running, batch)):
            running += momentum * (batch * factor - running)
        else:
            _cpu.update_running(running, batch, factor, momentum)


def _running(mean: Array | None, var: Array | None, op: str) -> tuple[Array, Array]:
    if mean is None or var is None:
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(f"{op}: {missing} is None, but training=False normalises by running statistics. "
                         "Hint: training=True takes the statistics of the batch")
    return mean, var


@quiet
def batch_norm_grad(grad_output: Array, input: Array, running_mean: Array | None, running_var: Array | None,
                    weight: Array | None = None, training: bool = False, eps: float = 1e-5, *,
                    statistics: tuple[Array, Array] | None = None) -> tuple[Array, Array, Array]:
    """Gradients of `batch_norm` (Ioffe and Szegedy 2015, section 3).

    With ``xhat = (x - mean) / sqrt(var + eps)`` and m values per channel,
    ``dx = weight / sqrt(var + eps) * (dy - sum(dy) / m - xhat * sum(dy * xhat) / m)``; with ``training=False`` the
    statistics are constants and the two sums fall away.

    Parameters
    ----------
    grad_output, input : ndarray
        Shape (N, C, \\*spatial).
    running_mean, running_var : ndarray or None
        The statistics of ``training=False``; not read otherwise.
    weight : ndarray, optional
        Shape (C,).
    training, eps
        As in `batch_norm`.
    statistics : (mean, var), optional
        What `batch_statistics` gave for `input` in the forward pass; computed again if left out. Not read with
        ``training=False``.

    Returns
    -------
    grad_input : ndarray
        Shape, dtype and memory order of `input`.
    grad_weight, grad_bias : ndarray
        Shape (C,), dtype of `input`.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`; if `grad_output` has another shape or dtype than `input`.
    """
    x = as_array(input, "input", "batch_norm_grad")
    dy = check_grad(grad_output, x, "batch_norm_grad")
    check_eps(eps)
    if x.size == 0:
        return np.empty_like(x), np.zeros(x.shape[1:2], x.dtype, like=x), np.zeros(x.shape[1:2], x.dtype, like=x)
    if training:
        mean, var = statistics or batch_statistics(x)
    else:
        mean, var = _running(running_mean, running_var, "batch_norm_grad")
    _check_channels(x, {"mean": mean, "var": var, "weight": weight}, "batch_norm_grad")
    passes = select.training("batch_norm_grad", ("input", x), ("mean", mean), ("var", var), ("weight", weight))
    return passes.batch_norm_grad(x, dy, _doubles(mean), _doubles(var), weight, None, eps, training)


def _window_sum(x: Array, before: int, after: int) -> Array:
    """Sum of `x` over the channels [c - before, c + after] of each channel c, clipped to those there are."""
    channels = x.shape[1]
    total = x.copy(order="K")
    for shift in (*range(-before, 0), *range(1, after + 1)):
        lo, hi = max(0, -shift), min(channels, channels - shift)
        if lo < hi:
            total[:, lo:hi] += x[:, lo + shift:hi + shift]
    return total


def _lrn_divisor(x: Array, size: int, alpha: float, k: float) -> Array:
    # The window of an even size reaches one channel further down than up, as in PyTorch.
    divisor = _window_sum(x * x, size // 2, (size - 1) // 2)
    divisor *= alpha / size
    divisor += k
    return divisor


def _check_lrn(x: Array, size: int, op: str) -> None:
    if x.ndim < 3:
        raise ValueError(f"{op}: input has shape {x.shape}, but (N, C, *spatial) is needed: at least 3 axes. "
                         "Hint: add the missing axes with input[None]")
    if size < 1:
        raise ValueError(f"{op}: size is {size}, but it counts the channels of a window: size >= 1 is needed. "
                         "Hint: size=5 as in AlexNet")


@quiet
def local_response_norm(input: Array, size: int, alpha: float = 1e-4, beta: float = 0.75,
                        k: float = 1.0) -> Array:
    """Local response normalisation across channels (Krizhevsky, Sutskever and Hinton 2012, section 3.3).

    ``y[c] = x[c] / (k + alpha / size * sum(x[j]**2))**beta`` with j from ``c - size // 2`` to
    ``c + (size - 1) // 2``, as in PyTorch; the paper has no division by `size`, so that its alpha = 1e-4 with
    size 5 is ``alpha=5e-4`` here.

    Parameters
    ----------
    input : ndarray
        Shape (N, C, \\*spatial) with at least one spatial axis.
    size : int
        Number of neighbouring channels.
    alpha, beta, k : float
        Constants of the formula.

    Returns
    -------
    ndarray
        Shape, dtype and memory order of `input`.

    Raises
    ------
    ValueError
        For fewer than 3 axes or ``size < 1``.
    TypeError
        For another dtype than float32 and float64.
    """
    x = as_array(input, "input", "local_response_norm")
    _check_lrn(x, size, "local_response_norm")
    divisor = _lrn_divisor(x, size, alpha, k)
    np.power(divisor, beta, out=divisor)
    return np.divide(x, divisor, out=np.empty_like(x))


@quiet
def local_response_norm_grad(grad_output: Array, input: Array, size: int, alpha: float = 1e-4, beta: float = 0.75,
                             k: float = 1.0) -> Array:
    """Gradient of `local_response_norm`.

    With d the bracket of the formula there,
    ``dx[j] = dy[j] * d[j]**-beta - 2 * alpha * beta / size * x[j] * sum(dy[c] * x[c] * d[c]**(-beta - 1))``, the sum
    over the channels c whose window holds j.

    Parameters
    ----------
    grad_output, input : ndarray
        Shape (N, C, \\*spatial).
    size, alpha, beta, k
        As in `local_response_norm`.

    Returns
    -------
    ndarray
        Shape, dtype and memory order of `input`.

    Raises
    ------
    ValueError, TypeError
        As `local_response_norm`; if `grad_output` has another shape or dtype than `input`.
    """
    x = as_array(input, "input", "local_response_norm_grad")
    _check_lrn(x, size, "local_response_norm_grad")
    dy = check_grad(grad_output, x, "local_response_norm_grad")
    divisor = _lrn_divisor(x, size, alpha, k)
    scaled = np.multiply(dy, divisor**-beta, out=np.empty_like(x))
    ratio = np.multiply(scaled, x, out=np.empty_like(x))
    ratio /= divisor
    # j lies in the window of c iff c lies in the mirrored window of j.
    dx = _window_sum(ratio, (size - 1) // 2, size // 2)
    dx *= x
    dx *= -2 * alpha * beta / size
    dx += scaled
    return dx
