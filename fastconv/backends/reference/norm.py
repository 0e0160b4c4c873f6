"""Normalisation and its gradients, as NumPy formulas."""

import numpy as np

from fastconv.arrays import Array
from fastconv.backends.reference._arrays import quiet, rank5, write_result


def batch_statistics(x: Array) -> tuple[Array, Array]:
    """Return the mean and the biased variance (divided by the count) of every channel.

    Parameters
    ----------
    x : (N, C, *spatial)

    Returns
    -------
    mean, variance : (C,), float64
    """
    axes = (0, *range(2, x.ndim))
    return x.mean(axes, dtype=np.float64), x.astype(np.float64).var(axes)


@quiet
def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """Return x normalised by channel.

    ``y[n, c, i] = weight[c] * x_hat[n, c, i] + bias[c]``,
    ``x_hat[n, c, i] = (x[n, c, i] - mean[c]) / sqrt(variance[c] + eps)``

    Parameters
    ----------
    x : (N, C, *spatial)
    mean, variance : (C,)
        Of the batch (`batch_statistics`) in training, running statistics in inference.
    weight, bias : (C,), optional
        1 and 0 if absent.
    eps
        Keeps the root away from zero.

    Returns
    -------
    y : like x

    References
    ----------
    Ioffe and Szegedy, "Batch normalization", ICML 2015, https://arxiv.org/abs/1502.03167,
    algorithm 1.
    """
    y = _normalised(x, mean, variance, eps)
    if weight is not None:
        y = y * _by_channel(weight, x)
    if bias is not None:
        y = y + _by_channel(bias, x)
    return write_result(rank5(y), like=x)


@quiet
def batch_norm_grad(
    x: Array,
    dy: Array,
    mean: Array,
    variance: Array,
    weight: Array | None = None,
    eps: float = 1e-5,
    *,
    training: bool,
) -> tuple[Array, Array, Array]:
    """Return the gradients of `batch_norm`.

    ``dweight[c] = sum over n, i of dy * x_hat``,  ``dbias[c] = sum over n, i of dy``,
    ``dx = weight[c] / sqrt(variance[c] + eps) * (dy - dbias[c] / m - x_hat * dweight[c] / m)``

    where m is the number of elements of a channel, and the two subtracted terms, which are the
    paths through mean and variance, are absent if those are constants (``training=False``).

    Parameters
    ----------
    x, dy : (N, C, *spatial)
    mean, variance, weight, eps
        As in the forward pass.
    training
        Whether mean and variance are those of x itself.

    Returns
    -------
    dx : like x
    dweight, dbias : (C,), of x's dtype

    References
    ----------
    Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167, section 3 (the six chain rules,
    summed up).
    """
    axes = (0, *range(2, x.ndim))
    x_hat = _normalised(x, mean, variance, eps)
    dweight = (dy * x_hat).sum(axes)
    dbias = dy.sum(axes, dtype=np.float64)
    dx = dy.astype(np.float64)
    if training:
        m = x.size / x.shape[1]
        dx -= _by_channel(dbias / m, x) + x_hat * _by_channel(dweight / m, x)
    dx /= np.sqrt(_by_channel(variance, x) + eps)
    if weight is not None:
        dx *= _by_channel(weight, x)
    return write_result(rank5(dx), like=x), dweight.astype(x.dtype), dbias.astype(x.dtype)


@quiet
def local_response_norm(
    x: Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Array:
    """Return x divided by a power of the mean square of its neighbouring channels.

    ``y[n, c, i] = x[n, c, i] / b[n, c, i] ** beta``,
    ``b[n, c, i] = k + alpha / size * sum of x[n, j, i] ** 2 over
    c - size // 2 <= j <= c + (size - 1) // 2``

    and channels outside x count as zeros. (The paper has alpha where PyTorch has alpha / size.)

    Parameters
    ----------
    x : (N, C, *spatial)
    size
        Number of neighbouring channels.
    alpha, beta, k
        As in the formula.

    Returns
    -------
    y : like x

    References
    ----------
    Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural
    networks", NIPS 2012, section 3.3.
    """
    b = _lrn_base(x, size, alpha, k)
    return write_result(rank5(x / b**beta), like=x)


@quiet
def local_response_norm_grad(
    x: Array, dy: Array, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Array:
    """Return the gradient of `local_response_norm`.

    ``dx[j] = dy[j] / b[j] ** beta - 2 * alpha * beta / size * x[j] * sum of
    dy[c] * x[c] / b[c] ** (beta + 1) over the channels c whose window holds j,
    j - (size - 1) // 2 <= c <= j + size // 2``

    Parameters
    ----------
    x, dy : (N, C, *spatial)
    size, alpha, beta, k
        As in the forward pass.

    Returns
    -------
    dx : like x
    """
    b = _lrn_base(x, size, alpha, k)
    through_b = _channel_sum(dy * x / b ** (beta + 1), (size - 1) // 2, size // 2)
    return write_result(rank5(dy / b**beta - 2 * alpha * beta / size * x * through_b), like=x)


def _normalised(x: Array, mean: Array, variance: Array, eps: float) -> Array:
    return (x - _by_channel(mean, x)) / np.sqrt(_by_channel(variance, x) + eps)


def _by_channel(values: Array, x: Array) -> Array:
    """View one value per channel as float64 that broadcasts to x."""
    return values.astype(np.float64).reshape(1, -1, *[1] * (x.ndim - 2))


def _lrn_base(x: Array, size: int, alpha: float, k: float) -> Array:
    return k + alpha / size * _channel_sum(x.astype(np.float64) ** 2, size // 2, (size - 1) // 2)


def _channel_sum(x: Array, before: int, after: int) -> Array:
    """Return for every channel c the sum of channels c - before to c + after."""
    padded = np.pad(x, [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)])
    total = np.zeros(x.shape)
    for shift in range(before + after + 1):
        total += padded[:, shift : shift + x.shape[1]]
    return total
