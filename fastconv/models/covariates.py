"""Image and table together: networks that also see age, test scores and the like."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from fastconv.arrays import Array, as_array
from fastconv.models.googlenet import WithHeads
from fastconv.nn import init
from fastconv.nn.basic import Flatten, Linear, ReLU
from fastconv.nn.blocks import Rng
from fastconv.nn.combine import Concat, Sequential
from fastconv.nn.layer import Backward, Buffer, Layer, Leaf


class Standardise(Leaf):
    """Covariates in units of their standard deviation; what is missing (NaN) is the mean, and marked.

    Parameters
    ----------
    n_covariates : int
        Number of columns.
    dtype
        float32 or float64.

    Attributes
    ----------
    mean, std : Buffer
        Shape (n_covariates,); zeros and ones until `fit`. They are part of the state dict.
    """

    def __init__(self, n_covariates: int, dtype: Any = np.float32) -> None:
        self.mean = Buffer(np.zeros(n_covariates, dtype))
        self.std = Buffer(np.ones(n_covariates, dtype))

    def fit(self, covariates: Array) -> None:
        """Take mean and standard deviation of `covariates` (N, n_covariates), ignoring NaN; see `WithCovariates.fit`.

        Raises
        ------
        ValueError
            If a column has no finite value to learn from, holds an infinity, or varies by less than the dtype of the
            layer resolves at its size, such as seconds since 1970 in float32.
        """
        table = np.asarray(covariates, np.float64)
        self._check(table)
        counts = np.sum(~np.isnan(table), 0)
        if np.isinf(table).any() or not counts.all():
            bad = np.flatnonzero(np.isinf(table).any(0) | (counts == 0)).tolist()
            raise ValueError(f"Standardise: columns {bad} of covariates hold an infinity or no number at all, but "
                             "mean and deviation are needed. Hint: leave these columns out")
        low, high, mean, std = (f(table, 0) for f in (np.nanmin, np.nanmax, np.nanmean, np.nanstd))
        # A constant column says nothing; dividing by one keeps it at zero. Its deviation may be 1e-17 by rounding.
        std = np.where(high > low, std, 1)
        resolution = np.finfo(self.std.dtype).eps * np.maximum(abs(low), abs(high))
        if np.any((high > low) & (std <= resolution)):
            bad = np.flatnonzero((high > low) & (std <= resolution)).tolist()
            raise ValueError(f"Standardise: columns {bad} of covariates deviate by {std[bad].tolist()}, but "
                             f"{self.std.dtype} resolves {resolution[bad].tolist()} at their size. "
                             "Hint: subtract a round number near the mean first")
        self.mean.assign(mean)
        self.std.assign(std)

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` (N, n_covariates); gives (N, 2 * n_covariates): values, then ones where they are missing."""
        x = as_array(x, "covariates", "Standardise")
        self._check(x)
        missing, std = np.isnan(x), self.std.value.copy()
        values = np.where(missing, 0, (x - self.mean.value) / std)
        y = np.concatenate([values, missing.astype(x.dtype)], 1)
        return y, lambda dy: np.where(missing, 0, dy[:, :len(std)] / std)

    def _check(self, x: Array) -> None:
        if x.ndim != 2 or x.shape[1:] != self.mean.shape:
            raise ValueError(f"Standardise: covariates have shape {x.shape}, but (N, {self.mean.shape[0]}) is needed. "
                             "Hint: one row for each image, NaN where a value is missing")


class WithCovariates(Sequential):
    """A network that sees a table row next to each image, joined where its fully-connected layers begin.

    The input is a tuple ``(images, covariates)`` of shapes (N, C, \\*spatial) and (N, n_covariates), the gradient
    too. Covariates are standardised by `fit`'s numbers, which the state dict holds; NaN is a missing value: the mean,
    with a one in a column of its own, so that the network can learn what it means that a value is missing.

    Parameters
    ----------
    backbone : Sequential
        A network of `fastconv.models`: what follows its (last) `Flatten` are its fully-connected layers. Its layers
        are taken over, not copied, except for those that the join replaces.
    n_covariates : int
        Number of covariates.
    hidden : int, optional
        Units of a hidden layer that sees both; it takes the place of the backbone's fully-connected layers, with a
        linear layer for the classes after it. None keeps those layers and gives the first one columns for the
        covariates. Where it is the only one (as in ResNet) image and covariates can then only add up.

    Auxiliary heads of the backbone (GoogLeNet's) stay, and see the image alone: what they are there for is the gradient
    that they give to its features. ``forward`` gives their outputs behind that of the whole, as `WithHeads` does.

    rng : Generator, int or None
        Source of the new weights.

    Raises
    ------
    ValueError
        If the backbone has no `Flatten` followed by linear layers, or an auxiliary head behind that `Flatten`.

    Examples
    --------
    >>> net = WithCovariates(resnet18(in_channels=1, num_classes=2, ndim=3), n_covariates=3)
    >>> net.fit(train_table)
    >>> logits = net((volumes, table))
    """

    def __init__(self, backbone: Sequential, n_covariates: int, *, hidden: int | None = 64, rng: Rng = None) -> None:
        heads = backbone.heads if isinstance(backbone, WithHeads) else {}
        names = [name for name, _ in backbone.children() if name not in heads]
        flats = [name for name in names if isinstance(backbone[name], Flatten)]
        split = names.index(flats[-1]) + 1 if flats else 0
        linears = [layer for _, layer in backbone[split:].named_layers() if isinstance(layer, Linear)]
        if not flats or not linears:
            raise ValueError(f"WithCovariates: backbone is a {type(backbone).__name__} of the layers "
                             f"{', '.join(names)}, but a Flatten with linear layers behind it is needed. "
                             "Hint: the networks of fastconv.models have that")
        rng = init.generator(rng)
        first, last = linears[0], linears[-1]
        dtype = first.weight.dtype
        features = first.in_features + 2 * n_covariates
        head: Layer
        if hidden is None:
            _widen(first, features, rng)
            head = backbone[split:]
        else:
            head = Sequential(fc1=Linear(features, hidden, dtype=dtype, rng=rng), relu=ReLU(),
                              fc2=Linear(hidden, last.out_features, dtype=dtype, rng=rng))
            init.initialize(head, init.he_normal, rng)
        standardise = Standardise(n_covariates, dtype)
        image = WithHeads({name: backbone[name] for name in names[:split]}, heads)
        super().__init__(join=Concat(image=image, covariates=standardise), head=head)
        self._standardise = standardise

    def forward(self, x: Any) -> tuple[Any, Backward]:
        """Run on ``(images, covariates)``; with auxiliary heads gives ``(y, head1, ...)``. See `Layer.forward`."""
        image, standardise = cast(Concat, self["join"])
        if not cast(WithHeads, image).heads:
            return super().forward(x)
        images, table = x
        (features, *auxiliary), image_step = image.forward(images)
        values, table_step = standardise.forward(table)
        y, head_step = self["head"].forward(np.concatenate([features, values], 1))

        def backward(dys: tuple[Array | None, ...]) -> tuple[Array | None, Array]:
            joined = np.zeros((len(y), features.shape[1] + values.shape[1]), y.dtype) if dys[0] is None else (
                head_step(dys[0]))
            split = features.shape[1]
            return image_step((joined[:, :split], *dys[1:])), table_step(joined[:, split:])

        return (y, *auxiliary), backward

    def fit(self, covariates: Array) -> None:
        """Take mean and standard deviation of each covariate from the training set.

        Parameters
        ----------
        covariates : ndarray
            Shape (N, n_covariates), of any real dtype; NaN is a missing value.

        Raises
        ------
        ValueError
            For another number of columns, a column without a number, or one that its dtype does not resolve.
        """
        self._standardise.fit(covariates)


def _widen(layer: Linear, in_features: int, rng: np.random.Generator) -> None:
    """Give a linear layer more inputs behind those that it has, with new weights for them."""
    old = layer.weight
    wide = Linear(in_features, layer.out_features, dtype=old.dtype, rng=rng)
    with wide.weight.write() as weight:
        weight[:, :layer.in_features] = old.value
    layer.weight, layer.in_features = wide.weight, in_features
