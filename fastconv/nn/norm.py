"""Normalisation layers: batch normalisation in 1D, 2D and 3D, local response normalisation."""

from __future__ import annotations

import operator
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array, as_array
from fastconv.backends import select
from fastconv.functional import norm
from fastconv.functional.pointwise import check_grad
from fastconv.nn.layer import Backward, Buffer, Layer, Leaf, Parameter, float_dtype, inherit_doc


class _BatchNorm(Layer):
    """Normalise each channel to zero mean and unit variance, then scale and shift (Ioffe and Szegedy 2015).

    `forward` normalises by the statistics of the batch and moves the running statistics towards them; calling the
    layer normalises by the running statistics.

    Parameters
    ----------
    num_features : int
        Number of channels.
    eps : float
        Added to the variance.
    momentum : float or None
        ``running = (1 - momentum) * running + momentum * batch``; None keeps the plain average of all batches.
    affine : bool
        Whether there are a trained scale and shift.
    track_running_stats : bool
        Whether to keep running statistics; without them inference takes the statistics of the batch too.
    frozen : bool
        Whether `forward` too uses the running statistics, as constants, and leaves them alone: for fine-tuning with
        small batches. An attribute that may be set at any time.
    dtype
        float32 or float64.

    Attributes
    ----------
    weight, bias : Parameter or None
        Shape (num_features,); ones and zeros at first.
    running_mean, running_var : Buffer or None
        Shape (num_features,).
    num_batches_tracked : Buffer or None
        int64 scalar.
    """

    ndims: ClassVar[tuple[int, ...]]
    """Numbers of axes that the input may have."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, *, frozen: bool = False, dtype: DTypeLike = np.float32) -> None:
        norm.check_eps(eps)
        self.num_features = operator.index(num_features)
        if self.num_features < 1:
            raise ValueError(f"{type(self).__name__}: num_features is {num_features}, but it counts channels: at least "
                             "1 is needed. Hint: the out_channels of the layer before")
        if frozen and not track_running_stats:
            raise ValueError(f"{type(self).__name__}: frozen=True uses running statistics, but "
                             "track_running_stats=False keeps none. Hint: set one of the two only")
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.frozen = frozen
        ones, zeros = np.ones(self.num_features, float_dtype(dtype)), np.zeros(self.num_features, float_dtype(dtype))
        self.weight = Parameter(ones) if affine else None
        self.bias = Parameter(zeros) if affine else None
        self.running_mean = Buffer(zeros) if track_running_stats else None
        self.running_var = Buffer(ones) if track_running_stats else None
        self.num_batches_tracked = Buffer(np.int64(0)) if track_running_stats else None

    def forward(self, x: Array, relu: bool = False) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, num_features, \\*spatial); see `Layer.forward`.

        With `relu` max(., 0) is applied to the result, in the same pass.
        """
        x = self._check(x)
        norm.check_eps(self.eps)
        training = not self.frozen
        weight, bias, eps = self.weight, self.bias, self.eps
        versions = [p.version if p else 0 for p in (weight, bias)]
        if training:
            norm.check_several_values(x)
            mean, var = np.empty(self.num_features, like=x), np.empty(self.num_features, like=x)
        else:
            mean, var = (a.astype(np.float64) for a in self._running())
        if x.size == 0:
            return np.empty_like(x), lambda dy: self._empty_grad(x)
        passes = select.training(type(self).__name__, ("input", x), ("weight", weight.value if weight else None))
        y = passes.batch_norm(x, mean, var, weight.value if weight else None, bias.value if bias else None, eps,
                                 training, relu)
        if training:
            self._track(mean, var, x.size // self.num_features)

        def backward(dy: Array) -> Array:
            for parameter, version, name in zip((weight, bias), versions, ("weight", "bias"), strict=True):
                if parameter is not None and (name == "weight" or relu):
                    parameter.check_version(version, name)
            dy = check_grad(dy, x, type(self).__name__)
            dx, dw, db = passes.batch_norm_grad(x, dy, mean, var, weight.value if weight else None,
                                                   bias.value if bias else None, eps, training, relu)
            for parameter, grad in ((weight, dw), (bias, db)):
                if parameter is not None:
                    parameter.add_grad(grad)
            return dx

        return y, backward

    def _empty_grad(self, x: Array) -> Array:
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.add_grad(np.zeros(self.num_features, x.dtype, like=x))
        return np.empty_like(x)

    def __call__(self, x: Array) -> Array:
        """Normalise by the running statistics; by those of the batch if none are kept."""
        x = self._check(x)
        if self.track_running_stats:
            return self._normalize(x, *self._running())
        norm.check_several_values(x)
        return self._normalize(x, *norm.batch_statistics(x))

    def _check(self, x: Array) -> Array:
        x = as_array(x, "input", type(self).__name__)
        if x.ndim not in self.ndims or x.shape[1] != self.num_features:
            ranks = " or ".join(map(str, self.ndims))
            raise ValueError(f"{type(self).__name__}: input has shape {x.shape}, but (N, C, *spatial) with {ranks} "
                             f"axes and C = {self.num_features} is needed. Hint: the channels are axis 1")
        return x

    def _running(self) -> tuple[Array, Array]:
        """Copies of the running statistics, which later forward passes cannot change under a pending backward."""
        assert self.running_mean is not None
        assert self.running_var is not None
        return self.running_mean.value.copy(), self.running_var.value.copy()

    def _normalize(self, x: Array, mean: Array, var: Array) -> Array:
        return norm.normalize(x, mean, var, self.weight.value if self.weight else None,
                              self.bias.value if self.bias else None, self.eps)

    def _track(self, mean: Array, var: Array, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        with self.num_batches_tracked.write() as batches:
            batches += 1
        momentum = 1 / int(batches) if self.momentum is None else self.momentum
        with self.running_mean.write() as running_mean, self.running_var.write() as running_var:
            norm.update_running(running_mean, running_var, mean, var, count, momentum)

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return (f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
                f"track_running_stats={self.track_running_stats}" + (", frozen=True" if self.frozen else ""))


@inherit_doc
class BatchNorm1d(_BatchNorm):
    """Batch normalisation of (N, C) or (N, C, L)."""

    ndims = (2, 3)


@inherit_doc
class BatchNorm2d(_BatchNorm):
    """Batch normalisation of (N, C, H, W)."""

    ndims = (4,)


@inherit_doc
class BatchNorm3d(_BatchNorm):
    """Batch normalisation of (N, C, D, H, W)."""

    ndims = (5,)


BATCH_NORM: dict[int, type[_BatchNorm]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
"""The batch normalisation for each number of spatial axes."""


class LocalResponseNorm(Leaf):
    """Normalise by the squares of neighbouring channels; see `fastconv.functional.local_response_norm`.

    Parameters
    ----------
    size : int
        Number of neighbouring channels.
    alpha, beta, k : float
        ``x / (k + alpha / size * sum(x**2))**beta``.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, C, \\*spatial); see `Layer.forward`."""
        constants = (self.size, self.alpha, self.beta, self.k)
        y = norm.local_response_norm(x, *constants)
        return y, lambda dy: norm.local_response_norm_grad(dy, x, *constants)

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
