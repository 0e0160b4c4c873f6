"""Losses: ``loss, gradient = function(prediction, target)``.

The gradient is that with respect to the prediction and is what `backward` takes: ::

    logits, backward = net.forward(x)
    loss, dlogits = cross_entropy(logits, labels)
    backward(dlogits)

`reduction` is ``"mean"`` or ``"sum"``, which give the loss as a float, or ``"none"``, which gives an array of losses
and the gradient of their sum. Losses are summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastconv.arrays import Array, as_array, check_same_place
from fastconv.functional.pointwise import log_softmax, quiet, sigmoid

_REDUCTIONS = ("mean", "sum", "none")


def _check_reduction(reduction: str, op: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, but one of {_REDUCTIONS} is needed. "
                         "Hint: 'mean' averages over the batch")


def _reduce(losses: Array, grad: Array, divisor: float, reduction: str) -> tuple[float | Array, Array]:
    """Apply the reduction to losses and, in place, to the gradient of their sum."""
    if reduction == "none":
        return losses, grad
    total = float(np.sum(losses, dtype=np.float64))
    if reduction == "sum":
        return total, grad
    if divisor == 0:
        # Nothing to average: the mean is NaN, as in PyTorch, but the gradient is zero and harms no weight.
        return float("nan"), grad
    grad *= 1 / divisor
    return total / divisor, grad


@quiet
def cross_entropy(logits: Array, target: Array, weight: Array | None = None, ignore_index: int = -100,
                  reduction: str = "mean", label_smoothing: float = 0.0) -> tuple[float | Array, Array]:
    """Cross-entropy of softmax(logits) against classes or class probabilities.

    With p the softmax and q the target distribution of a position, smoothed to
    ``(1 - label_smoothing) * q + label_smoothing / C`` (Szegedy et al. 2016, section 7), its loss is
    ``-sum(weight[c] * q[c] * log(p[c]))``.

    Parameters
    ----------
    logits : ndarray
        Shape (N, C, \\*spatial), or (C,) for a single sample; float32 or float64.
    target : ndarray
        Integer classes of shape (N, \\*spatial), or probabilities of the shape and dtype of `logits`.
    weight : ndarray, optional
        Shape (C,): weight of each class.
    ignore_index : int
        Positions with this class have no loss and no gradient. Not used with probabilities.
    reduction : str
        ``"mean"`` divides by the sum of ``weight[target]`` over the positions that are not ignored (with
        probabilities: by the number of positions), as PyTorch does; ``"sum"``; ``"none"``.
    label_smoothing : float
        In [0, 1].

    Returns
    -------
    loss : float, or ndarray of shape (N, \\*spatial)
    grad_logits : ndarray
        Shape, dtype and memory order of `logits`.

    Raises
    ------
    ValueError
        For shapes that do not fit, classes outside [0, C), a `label_smoothing` outside [0, 1], or an unknown
        reduction.
    TypeError
        If `target` is neither of integers nor of the dtype of `logits`.
    """
    _check_reduction(reduction, "cross_entropy")
    x = as_array(logits, "logits", "cross_entropy")
    y = _adopted("cross_entropy", "target", target, x)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}, but it is a share: "
                         "0 <= label_smoothing <= 1 is needed. Hint: 0.1")
    if x.ndim == 0:
        raise ValueError("cross_entropy: logits has shape (), but (N, C, *spatial) is needed. Hint: keep the classes")
    if x.ndim == 1:
        loss, grad = cross_entropy(x[None], y[None], weight, ignore_index, reduction, label_smoothing)
        return (loss if isinstance(loss, float) else loss[0]), grad[0]
    classes = x.shape[1]
    if weight is not None and np.shape(weight) != (classes,):
        raise ValueError(f"cross_entropy: weight has shape {np.shape(weight)}, but logits has {classes} classes: shape "
                         f"({classes},) is needed. Hint: one weight for each class")
    w = (np.ones_like(x, shape=(classes,)) if weight is None
         else _adopted("cross_entropy", "weight", weight, x, x.dtype))
    log_p = log_softmax(x, 1)
    if y.dtype.kind in "iu":
        return _cross_entropy_classes(x, log_p, y, w, ignore_index, reduction, label_smoothing)
    return _cross_entropy_probabilities(x, log_p, y, w, reduction, label_smoothing)


def _adopted(op: str, name: str, array: Any, like: Array, dtype: Any = None) -> Array:
    """A further argument, which may be a list or of integers, as an array where `like` lies."""
    if not hasattr(array, "__cuda_array_interface__"):
        array = np.asarray(array, dtype)
    elif dtype is not None:
        array = array.astype(dtype, copy=False)
    check_same_place(op, (name, array), ("the prediction", like))
    return array


def _cross_entropy_classes(x: Array, log_p: Array, y: Array, w: Array, ignore_index: int, reduction: str,
                           smoothing: float) -> tuple[float | Array, Array]:
    shape, classes = x.shape[:1] + x.shape[2:], x.shape[1]
    if y.shape != shape:
        raise ValueError(f"cross_entropy: target has shape {y.shape}, but logits {x.shape} need classes of shape "
                         f"{shape}. Hint: drop the axis of the classes, e.g. target.argmax(1) or target[:, 0]")
    kept = y != ignore_index
    wrong = y[kept & ((y < 0) | (y >= classes))]
    if wrong.size:
        raise ValueError(f"cross_entropy: target holds the class {int(wrong[0])}, but logits have {classes} classes: "
                         f"0 <= class < {classes} is needed. Hint: ignore_index={int(wrong[0])} skips it")
    # Ignored positions take part as class 0 with weight 0.
    index = np.where(kept, y, 0).astype(np.intp, copy=False)
    position_weight = np.where(kept, w[index], 0).astype(x.dtype, copy=False)
    index, each_weight = index[:, None], position_weight[:, None]
    losses = -(1 - smoothing) * position_weight * np.take_along_axis(log_p, index, 1)[:, 0]
    # grad = p * sum(q) - q, where q = weight * ((1 - smoothing) * onehot + smoothing / C)
    grad = np.exp(log_p)
    if smoothing:
        spread = (smoothing / classes * w).reshape(-1, *[1] * (x.ndim - 2))
        losses -= (spread * log_p).sum(1)
        grad *= (1 - smoothing) * each_weight + spread.sum()
        grad -= spread
    else:
        grad *= each_weight
    at_class = np.take_along_axis(grad, index, 1)
    np.put_along_axis(grad, index, at_class - (1 - smoothing) * each_weight, 1)
    if not kept.all():  # a NaN of ignored logits is ignored too
        losses[~kept] = 0
        np.copyto(grad, 0, where=~kept[:, None])
    return _reduce(losses, grad, float(np.sum(position_weight, dtype=np.float64)), reduction)


def _cross_entropy_probabilities(x: Array, log_p: Array, y: Array, w: Array, reduction: str,
                                 smoothing: float) -> tuple[float | Array, Array]:
    _check_target(x, y, "cross_entropy", "logits")
    q = y if not smoothing else (1 - smoothing) * y + smoothing / x.shape[1]
    q = q * w.reshape(-1, *[1] * (x.ndim - 2))
    losses = -(q * log_p).sum(1)
    grad = np.exp(log_p)
    grad *= q.sum(1, keepdims=True)
    grad -= q
    return _reduce(losses, grad, losses.size, reduction)


def _check_target(x: Array, y: Array, op: str, name: str) -> None:
    check_same_place(op, ("target", y), (name, x))
    if y.dtype != x.dtype:
        raise TypeError(f"{op}: target has dtype {y.dtype}, but {name} has dtype {x.dtype}. "
                        f"Hint: target.astype(np.{x.dtype})")
    if y.shape != x.shape:
        raise ValueError(f"{op}: target has shape {y.shape}, but {name} has shape {x.shape}; they must agree. "
                         "Hint: nothing is broadcast")


@quiet
def binary_cross_entropy_with_logits(logits: Array, target: Array, weight: Array | None = None,
                                     reduction: str = "mean",
                                     pos_weight: Array | None = None) -> tuple[float | Array, Array]:
    """Cross-entropy of sigmoid(logits) against probabilities of "yes", for each element.

    ``weight * ((1 - t) * x + (1 + (pos_weight - 1) * t) * log(1 + exp(-x)))``, in a form that never overflows.

    Parameters
    ----------
    logits, target : ndarray
        Same shape and dtype (float32 or float64); targets usually 0 or 1.
    weight : ndarray, optional
        Broadcasts to the shape of `logits`.
    reduction : str
        ``"mean"`` over the elements, ``"sum"`` or ``"none"``.
    pos_weight : ndarray, optional
        Weight of the positive term, against unbalanced classes; broadcasts to the shape of `logits`.

    Returns
    -------
    loss : float, or ndarray of the shape of `logits`
    grad_logits : ndarray
        Shape, dtype and memory order of `logits`.

    Raises
    ------
    ValueError
        For shapes that do not fit or an unknown reduction.
    TypeError
        For mixed dtypes.
    """
    op = "binary_cross_entropy_with_logits"
    _check_reduction(reduction, op)
    x, t = as_array(logits, "logits", op), as_array(target, "target", op)
    _check_target(x, t, op, "logits")
    log_weight: Array | float = 1.0
    if pos_weight is not None:
        log_weight = 1 + (_broadcast(pos_weight, x, "pos_weight") - 1) * t
    # log(1 + exp(-x)) = max(-x, 0) + log1p(exp(-|x|))
    softplus = np.log1p(np.exp(-np.abs(x))) + np.maximum(-x, 0)
    losses = (1 - t) * x + log_weight * softplus
    grad = np.subtract(1 - t, log_weight * sigmoid(-x), out=np.empty_like(x))
    if weight is not None:
        each_weight = _broadcast(weight, x, "weight")
        losses = losses * each_weight
        grad *= each_weight
    return _reduce(losses, grad, losses.size, reduction)


def _broadcast(weight: Array, x: Array, name: str) -> Array:
    try:
        return np.broadcast_to(_adopted("binary_cross_entropy_with_logits", name, weight, x, x.dtype), x.shape)
    except ValueError:
        raise ValueError(f"binary_cross_entropy_with_logits: {name} has shape {np.shape(weight)}, which does not "
                         f"broadcast to {x.shape}, the shape of logits. Hint: axes of length 1 broadcast") from None


@quiet
def mse_loss(input: Array, target: Array, reduction: str = "mean") -> tuple[float | Array, Array]:
    """Squared error, ``(input - target)**2``.

    Parameters
    ----------
    input, target : ndarray
        Same shape and dtype, float32 or float64.
    reduction : str
        ``"mean"`` over the elements, ``"sum"`` or ``"none"``.

    Returns
    -------
    loss : float, or ndarray of the shape of `input`
    grad_input : ndarray
        Shape, dtype and memory order of `input`.

    Raises
    ------
    ValueError
        For shapes that differ or an unknown reduction.
    TypeError
        For mixed dtypes.
    """
    _check_reduction(reduction, "mse_loss")
    x, t = as_array(input, "input", "mse_loss"), as_array(target, "target", "mse_loss")
    _check_target(x, t, "mse_loss", "input")
    difference = np.subtract(x, t, out=np.empty_like(x))
    losses = difference * difference
    difference *= 2
    return _reduce(losses, difference, losses.size, reduction)


def heads_loss(outputs: Any, target: Array, head_weights: float | Sequence[float],
               loss: Callable[[Array, Array], tuple[Any, Array]] = cross_entropy) -> tuple[Any, Any]:
    """Loss of a network with heads (Lee et al. 2015): of its first output, and of the others by their weights.

    Parameters
    ----------
    outputs : ndarray or tuple of ndarray
        What ``forward`` gives: logits, or logits and the outputs of heads.
    target
        Second argument of `loss`, the same for all outputs.
    head_weights : float or sequence of float
        By which the losses of the heads count: one for all, or one for each.
    loss : callable
        ``loss(output, target) -> (value, gradient)``.

    Returns
    -------
    value : float
        The weighted sum.
    gradients
        As `outputs`, for ``backward``.

    Raises
    ------
    ValueError
        If `head_weights` is a sequence of another length than there are heads.
    """
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    several = isinstance(head_weights, Sequence)
    factors = (1.0, *(head_weights if several else (head_weights,) * (len(heads) - 1)))  # type: ignore[misc]
    if len(factors) != len(heads):
        raise ValueError(
            f"heads_loss: head_weights is {factors[1:]}, {len(factors) - 1} numbers, but the model has "
            f"{len(heads) - 1} outputs beside its logits: one number for each is needed. "
            "Hint: one number alone is for all of them")
    losses, gradients = zip(*(loss(head, target) for head in heads), strict=True)
    scaled = tuple(gradient if factor == 1 else gradient * gradient.dtype.type(factor)
                   for factor, gradient in zip(factors, gradients, strict=True))
    value = sum(factor * each for factor, each in zip(factors, losses, strict=True))
    return value, scaled if isinstance(outputs, tuple) else scaled[0]
