"""The blocks that the networks of the literature are made of, in 1D, 2D and 3D.

Each is an expression in the layers and combinators of `fastconv.nn`; children carry torchvision's
names, so that its weights fit by name. All take ``ndim``, the number of spatial axes, ``dtype`` and
``rng`` as the layers do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array, as_array, empty, memory_order
from fastconv.nn import init
from fastconv.nn.basic import Dropout, Flatten, Identity, Linear, ReLU
from fastconv.nn.combine import Concat, Residual, Sequential
from fastconv.nn.conv import CONV, _Conv
from fastconv.nn.layer import Backward, Layer, Leaf, allocator
from fastconv.nn.norm import BATCH_NORM, _BatchNorm
from fastconv.nn.pool import (
    ADAPTIVE_AVG_POOL,
    AVG_POOL,
    MAX_POOL,
    _AdaptiveAvgPool,
    _AvgPool,
    _MaxPool,
)
from fastconv.problem import pool_problem

Rng = np.random.Generator | int | None

BOTTLENECK_EXPANSION = 4
"""Output channels of `bottleneck` for each channel inside."""


class Kind(TypedDict):
    """What all layers of a network have in common."""

    ndim: int
    dtype: DTypeLike
    rng: np.random.Generator


class Kit:
    """Makes the layers of one number of spatial axes and one dtype from one random generator.

    Raises
    ------
    ValueError
        If `ndim` is not 1, 2 or 3.
    """

    def __init__(self, ndim: int = 2, dtype: DTypeLike = np.float32, rng: Rng = None) -> None:
        if ndim not in CONV:
            raise ValueError(f"models: ndim is {ndim!r}, but {', '.join(map(str, CONV))} spatial axes are possible. "
                             "Hint: ndim=2 for images, ndim=3 for volumes")
        self.ndim = ndim
        self.dtype = dtype
        self.rng = init.generator(rng)

    @property
    def kind(self) -> Kind:
        """Keywords that hand the same settings on."""
        return {"ndim": self.ndim, "dtype": self.dtype, "rng": self.rng}

    def conv(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> _Conv:
        """Convolution."""
        return CONV[self.ndim](in_channels, out_channels, kernel_size, dtype=self.dtype, rng=self.rng, **options)

    def batch_norm(self, channels: int, **options: Any) -> _BatchNorm:
        """Batch normalisation."""
        return BATCH_NORM[self.ndim](channels, dtype=self.dtype, **options)

    def linear(self, in_features: int, out_features: int) -> Linear:
        """Linear layer."""
        return Linear(in_features, out_features, dtype=self.dtype, rng=self.rng)

    def max_pool(self, kernel_size: int, stride: int, **options: Any) -> _MaxPool:
        """Max pool."""
        return MAX_POOL[self.ndim](kernel_size, stride, **options)

    def avg_pool(self, kernel_size: int, stride: int) -> _AvgPool:
        """Average pool."""
        return AVG_POOL[self.ndim](kernel_size, stride)

    def adaptive_avg_pool(self, output_size: int) -> _AdaptiveAvgPool:
        """Average pool to a fixed size."""
        return ADAPTIVE_AVG_POOL[self.ndim](output_size)

    def dropout(self, p: float) -> Dropout:
        """Dropout from the network's generator."""
        return Dropout(p, rng=self.rng)


# ---- residual ----------------------------------------------------------------------------------------------------


class ResidualBlock(Residual):
    """A `Residual` whose layers are called ``conv1``, ``bn1``, ..., ``downsample``, as in torchvision."""

    def children(self) -> Iterator[tuple[str, Layer]]:
        """See `Layer.children`."""
        yield from self.branch.children()
        if not isinstance(self.shortcut, Identity):
            yield "downsample", self.shortcut
        yield "relu", self.activation


class PaddedShortcut(Leaf):
    """Every `stride`-th pixel, and channels of zeros behind those that there are (He et al. 2016, option A).

    Parameters
    ----------
    out_channels, stride : int
        Channels of the output, and step along each spatial axis.
    """

    def __init__(self, out_channels: int, stride: int) -> None:
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, C, \\*spatial), C <= out_channels; see `Layer.forward`."""
        x = as_array(x, "input", "PaddedShortcut")
        channels, new_gradient = x.shape[1], allocator(x)
        if channels > self.out_channels:
            raise ValueError(f"PaddedShortcut: input has {channels} channels, but at most out_channels = "
                             f"{self.out_channels} can be filled up. Hint: a 1x1 convolution can reduce them")
        picked = (slice(None), slice(channels), *(slice(None, None, self.stride),) * (x.ndim - 2))
        read = x[picked]
        y = empty((x.shape[0], self.out_channels, *read.shape[2:]), x.dtype, memory_order(x), like=x)
        y[:, :channels] = read
        y[:, channels:] = 0

        def backward(dy: Array) -> Array:
            dx = new_gradient()
            dx[...] = 0
            dx[picked] = dy[:, :channels]
            return dx

        return y, backward

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return f"{self.out_channels}, stride={self.stride}"


# What a residual block adds where size or channels change: a projection (option B of the paper), without a bias, which
# its normalisation would take away again, or with it for the weights of networks that have one; or padding (option A).
SHORTCUTS: dict[str, Callable[[Kit, int, int, int], Layer]] = {
    "projection": lambda kit, before, after, stride: Sequential(
        kit.conv(before, after, 1, stride=stride, bias=False), kit.batch_norm(after)),
    "biased projection": lambda kit, before, after, stride: Sequential(
        kit.conv(before, after, 1, stride=stride), kit.batch_norm(after)),
    "padding": lambda kit, before, after, stride: PaddedShortcut(after, stride),
}


def basic_block(in_channels: int, channels: int, stride: int = 1, *, residual: bool = True,
                shortcut: str = "projection", ndim: int = 2, dtype: DTypeLike = np.float32, rng: Rng = None) -> Layer:
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left): ``relu(z + a)``.

    With a^l the input and z^(l+1) the second convolution's normalised output, this is
    ``a^(l+2) = relu(z^(l+2) + a^l)``.

    Parameters
    ----------
    in_channels, channels : int
        Channels of input and output.
    stride : int
        Of the first convolution.
    residual : bool
        False leaves the shortcut out: the paper's plain network.
    shortcut : str
        What the shortcut is where channels differ or the stride is not 1: ``"projection"`` (1x1 convolution and batch
        norm, option B of the paper), ``"biased projection"`` (the convolution has a bias, as in MONAI) or
        ``"padding"`` (`PaddedShortcut`, option A).
    ndim, dtype, rng
        See the module.

    Returns
    -------
    Layer
        From (N, in_channels, \\*spatial) to (N, channels, \\*ceil(spatial / stride)).
    """
    kit = Kit(ndim, dtype, rng)
    branch = Sequential(
        conv1=kit.conv(in_channels, channels, 3, stride=stride, padding=1, bias=False),
        bn1=kit.batch_norm(channels), relu1=ReLU(),
        conv2=kit.conv(channels, channels, 3, padding=1, bias=False),
        bn2=kit.batch_norm(channels))
    return _with_shortcut(kit, branch, in_channels, channels, stride, residual, shortcut)


def bottleneck(in_channels: int, channels: int, stride: int = 1, *, variant: str = "torchvision",
               residual: bool = True, shortcut: str = "projection", ndim: int = 2, dtype: DTypeLike = np.float32,
               rng: Rng = None) -> Layer:
    """1x1, 3x3 and 1x1 convolutions and a shortcut (He et al. 2016, figure 5 right).

    Parameters
    ----------
    in_channels, channels : int
        Channels of the input and of the 3x3 convolution.
    stride : int
        Of one of the convolutions.
    variant : str
        Of which: ``"paper"`` the first, which leaves three of four pixels unread, ``"torchvision"`` the 3x3 one.
    residual, shortcut, ndim, dtype, rng
        As in `basic_block`.

    Returns
    -------
    Layer
        From (N, in_channels, \\*spatial) to (N, 4 * channels, \\*ceil(spatial / stride)).
    """
    kit = Kit(ndim, dtype, rng)
    out_channels = BOTTLENECK_EXPANSION * channels
    strides = (stride, 1) if check_variant("bottleneck", variant) == "paper" else (1, stride)
    branch = Sequential(
        conv1=kit.conv(in_channels, channels, 1, stride=strides[0], bias=False),
        bn1=kit.batch_norm(channels), relu1=ReLU(),
        conv2=kit.conv(channels, channels, 3, stride=strides[1], padding=1, bias=False),
        bn2=kit.batch_norm(channels), relu2=ReLU(),
        conv3=kit.conv(channels, out_channels, 1, bias=False),
        bn3=kit.batch_norm(out_channels))
    return _with_shortcut(kit, branch, in_channels, out_channels, stride, residual, shortcut)


def _with_shortcut(kit: Kit, branch: Sequential, in_channels: int, out_channels: int, stride: int,
                   residual: bool, shortcut: str) -> Layer:
    if not residual:
        return Sequential(dict(branch.children()), relu=ReLU())
    if shortcut not in SHORTCUTS:
        raise ValueError(f"models: shortcut is {shortcut!r}, but one of {', '.join(map(repr, SHORTCUTS))} is needed. "
                         "Hint: 'projection' is what torchvision has")
    changes = stride != 1 or in_channels != out_channels
    skipped = SHORTCUTS[shortcut](kit, in_channels, out_channels, stride) if changes else None
    return ResidualBlock(branch, skipped, ReLU())


# ---- dense -------------------------------------------------------------------------------------------------------


class DenseLayer(Sequential):
    """Batch norm, ReLU, 1x1 convolution, batch norm, ReLU, 3x3 convolution (Huang et al. 2017, DenseNet-B).

    Parameters
    ----------
    in_channels, growth_rate : int
        Channels of input and output.
    expansion : int
        The 1x1 convolution has ``expansion * growth_rate`` channels.
    dropout : float
        Share of the output that training drops; the paper's 0.2 for small data sets.
    ndim, dtype, rng
        See the module.
    """

    def __init__(self, in_channels: int, growth_rate: int, *, expansion: int = 4, dropout: float = 0.0, ndim: int = 2,
                 dtype: DTypeLike = np.float32, rng: Rng = None) -> None:
        kit = Kit(ndim, dtype, rng)
        hidden = expansion * growth_rate
        self.conv = kit.conv(hidden, growth_rate, 3, padding=1, bias=False)
        self.dropout: Layer = kit.dropout(dropout) if dropout else Identity()
        self.hidden = Sequential(
            norm1=kit.batch_norm(in_channels), relu1=ReLU(),
            conv1=kit.conv(in_channels, hidden, 1, bias=False),
            norm2=kit.batch_norm(hidden), relu2=ReLU())
        ending = {"conv2": self.conv} | ({"dropout": self.dropout} if dropout else {})
        super().__init__(dict(self.hidden.children()), ending)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, in_channels, \\*spatial), into `out` if given; see `Layer.forward`."""
        hidden, hidden_backward = self.hidden.forward(x)
        y, conv_backward = self.conv.forward(hidden, out)
        kept, dropout_backward = self.dropout.forward(y)
        if kept is not y:
            y[...] = kept
        return y, lambda dy: hidden_backward(conv_backward(dropout_backward(dy)))

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run inference, into `out` if given."""
        return self.conv(self.hidden(x), out)


class DenseBlock(Layer):
    """Dense layers, each of which sees the outputs of all before it (Huang et al. 2017, equation 2).

    Nothing is concatenated. One buffer holds all channels: `entry` and every layer write into their own
    slice of it, and read the slices before as a view. Backward, the gradients of all readers of a slice are
    added up in one buffer too.

        channels   0 ...... in_channels ...... + growth_rate ...... + 2 growth_rate ...
        written by   entry        |  denselayer1     |    denselayer2      |
        read by      denselayer1: [0, in_channels), denselayer2: [0, in_channels + growth_rate), ...

    Parameters
    ----------
    in_channels : int
        Channels of the input.
    num_layers, growth_rate : int
        Number of layers, and channels that each adds.
    expansion, dropout
        See `DenseLayer`.
    entry : pool, optional
        A max or average pool in front, which writes its output straight into the buffer. Without it the
        input is copied there, once.
    ndim, dtype, rng
        See the module.

    Raises
    ------
    ValueError
        If `num_layers` is less than 1.
    """

    def __init__(self, in_channels: int, num_layers: int, growth_rate: int, *, expansion: int = 4,
                 dropout: float = 0.0, entry: _MaxPool | _AvgPool | None = None, ndim: int = 2,
                 dtype: DTypeLike = np.float32, rng: Rng = None) -> None:
        if num_layers < 1:
            raise ValueError(f"DenseBlock: num_layers is {num_layers}, but at least 1 is needed. "
                             "Hint: leave a block without layers out")
        kit = Kit(ndim, dtype, rng)
        ends = [in_channels + i * growth_rate for i in range(num_layers + 1)]
        self.slices = tuple(itertools.pairwise(ends))
        self.layers = tuple(DenseLayer(lo, growth_rate, expansion=expansion, dropout=dropout, **kit.kind)
                            for lo, _ in self.slices)
        self.entry = entry
        self.in_channels = in_channels
        self.out_channels = ends[-1]

    def children(self) -> Iterator[tuple[str, Layer]]:
        """See `Layer.children`."""
        if self.entry is not None:
            yield "entry", self.entry
        for number, layer in enumerate(self.layers, 1):
            yield f"denselayer{number}", layer

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x` of shape (N, in_channels, \\*spatial); see `Layer.forward`."""
        x = self._check(x)
        y = self._buffer(x)
        entry_backward: Backward | None = None
        if self.entry is None:
            y[:, :self.in_channels] = x
        else:
            _, entry_backward = self.entry.forward(x, y[:, :self.in_channels])
        steps = [layer.forward(y[:, :lo], y[:, lo:hi])[1]
                 for layer, (lo, hi) in zip(self.layers, self.slices, strict=True)]

        def backward(dy: Array) -> Array:
            # The gradient that the last layer returns, an array of its own, becomes the buffer.
            lo, hi = self.slices[-1]
            total: Array = steps[-1](dy[:, lo:hi])
            total += dy[:, :lo]
            for (lo, hi), step in reversed(list(zip(self.slices[:-1], steps[:-1], strict=True))):
                total[:, :lo] += step(total[:, lo:hi])
            dx = total[:, :self.in_channels]
            return dx if entry_backward is None else entry_backward(dx)

        return y, backward

    def __call__(self, x: Array) -> Array:
        """Run inference."""
        x = self._check(x)
        y = self._buffer(x)
        if self.entry is None:
            y[:, :self.in_channels] = x
        else:
            self.entry(x, y[:, :self.in_channels])
        for layer, (lo, hi) in zip(self.layers, self.slices, strict=True):
            layer(y[:, :lo], y[:, lo:hi])
        return y

    def _check(self, x: Array) -> Array:
        x = as_array(x, "input", "DenseBlock")
        if x.ndim < 3 or x.shape[1] != self.in_channels:
            raise ValueError(f"DenseBlock: input has shape {x.shape}, but (N, {self.in_channels}, *spatial) is "
                             "needed. Hint: the channels are axis 1")
        return x

    def _buffer(self, x: Array) -> Array:
        """Uninitialised output: batch and, after the entry, size of `x`, all channels, the order of `x`."""
        size = x.shape[2:]
        if self.entry is not None:
            pool = self.entry
            size = pool_problem(x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode,
                                ndim=x.ndim - 2, op="DenseBlock").y_shape[2:]
        return empty((x.shape[0], self.out_channels, *size), x.dtype, memory_order(x), like=x)


def transition(in_channels: int, out_channels: int, *, ndim: int = 2, dtype: DTypeLike = np.float32,
               rng: Rng = None) -> Sequential:
    """Batch norm, ReLU, 1x1 convolution and 2x2 average pool between dense blocks (Huang et al. 2017).

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of input and output; the paper halves them.
    ndim, dtype, rng
        See the module.

    Returns
    -------
    Sequential
        From (N, in_channels, \\*spatial) to (N, out_channels, \\*spatial // 2). ``[:-1]`` is the part without
        the pool, for a `DenseBlock` with ``entry``.
    """
    kit = Kit(ndim, dtype, rng)
    return Sequential(norm=kit.batch_norm(in_channels), relu=ReLU(),
                      conv=kit.conv(in_channels, out_channels, 1, bias=False),
                      pool=kit.avg_pool(2, 2))


# ---- inception ---------------------------------------------------------------------------------------------------


def conv_relu(in_channels: int, out_channels: int, kernel_size: int, *, batch_norm: bool = False, ndim: int = 2,
              dtype: DTypeLike = np.float32, rng: Rng = None, **options: Any) -> Sequential:
    """Convolution and ReLU; with `batch_norm` a normalisation between them instead of the bias.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, **options
        Those of the convolution.
    batch_norm : bool
        Whether there is batch normalisation, with torchvision's eps = 0.001.
    ndim, dtype, rng
        See the module.
    """
    kit = Kit(ndim, dtype, rng)
    conv = kit.conv(in_channels, out_channels, kernel_size, bias=not batch_norm, **options)
    norm = {"bn": kit.batch_norm(out_channels, eps=1e-3)} if batch_norm else {}
    return Sequential({"conv": conv, **norm, "relu": ReLU()})


def inception(in_channels: int, c1: int, c3: tuple[int, int], c5: tuple[int, int], pool: int, *,
              variant: str = "paper", ndim: int = 2, dtype: DTypeLike = np.float32, rng: Rng = None) -> Concat:
    """Inception module with dimension reductions (Szegedy et al. 2015, figure 2b).

    ========  ============================================
    branch1   1x1
    branch2   1x1 reduction, 3x3
    branch3   1x1 reduction, 5x5 (torchvision: 3x3)
    branch4   3x3 max pool, 1x1 projection
    ========  ============================================

    Parameters
    ----------
    in_channels : int
        Channels of the input.
    c1, pool : int
        Channels of the 1x1 convolution and of the projection after the pool.
    c3, c5 : (int, int)
        Channels of the reduction, and of the convolution after it.
    variant : str
        ``"torchvision"`` has batch normalisation, and 3x3 in the third branch.
    ndim, dtype, rng
        See the module.

    Returns
    -------
    Concat
        From (N, in_channels, \\*spatial) to (N, c1 + c3[1] + c5[1] + pool, \\*spatial).
    """
    kit = Kit(ndim, dtype, rng)
    torchvision = check_variant("inception", variant) == "torchvision"
    large = 3 if torchvision else 5
    unit: Any = {"batch_norm": torchvision, **kit.kind}
    return Concat(
        branch1=conv_relu(in_channels, c1, 1, **unit),
        branch2=Sequential(conv_relu(in_channels, c3[0], 1, **unit), conv_relu(*c3, 3, padding=1, **unit)),
        branch3=Sequential(conv_relu(in_channels, c5[0], 1, **unit),
                           conv_relu(*c5, large, padding=large // 2, **unit)),
        branch4=Sequential(kit.max_pool(3, 1, padding=1), conv_relu(in_channels, pool, 1, **unit)))


def naive_inception(in_channels: int, c1: int, c3: int, c5: int, *, ndim: int = 2, dtype: DTypeLike = np.float32,
                    rng: Rng = None) -> Concat:
    """Inception module without reductions (Szegedy et al. 2015, figure 2a): 1x1, 3x3, 5x5 and max pool.

    Parameters
    ----------
    in_channels, c1, c3, c5 : int
        Channels of the input and of the three convolutions.
    ndim, dtype, rng
        See the module.

    Returns
    -------
    Concat
        From (N, in_channels, \\*spatial) to (N, c1 + c3 + c5 + in_channels, \\*spatial).
    """
    kit = Kit(ndim, dtype, rng)
    return Concat(
        branch1=conv_relu(in_channels, c1, 1, **kit.kind),
        branch2=conv_relu(in_channels, c3, 3, padding=1, **kit.kind),
        branch3=conv_relu(in_channels, c5, 5, padding=2, **kit.kind),
        branch4=kit.max_pool(3, 1, padding=1))


def auxiliary_classifier(in_channels: int, num_classes: int, *, width: float = 1.0, variant: str = "paper",
                         ndim: int = 2, dtype: DTypeLike = np.float32, rng: Rng = None) -> Sequential:
    """Classifier on a hidden layer, which gives its gradient a short way (Szegedy et al. 2015, section 5).

    Average pool, 1x1 convolution with 128 channels, linear with 1024 units, ReLU, dropout of 70 %, linear.

    Parameters
    ----------
    in_channels, num_classes : int
        Channels of the input and number of outputs.
    width : float
        Factor for the 128 channels and 1024 units.
    variant : str
        ``"paper"`` pools 5x5 with stride 3 and needs 14 to 16 pixels per axis; ``"torchvision"`` pools any size
        to 4x4 and normalises.
    ndim, dtype, rng
        See the module.

    Returns
    -------
    Sequential
        From (N, in_channels, \\*spatial) to logits (N, num_classes).
    """
    kit = Kit(ndim, dtype, rng)
    torchvision = check_variant("auxiliary_classifier", variant) == "torchvision"
    channels, units = scaled(128, width), scaled(1024, width)
    return Sequential(
        pool=kit.adaptive_avg_pool(4) if torchvision else kit.avg_pool(5, 3),
        conv=conv_relu(in_channels, channels, 1, batch_norm=torchvision, **kit.kind),
        flatten=Flatten(), fc1=kit.linear(channels * 4**ndim, units), relu=ReLU(),
        dropout=kit.dropout(0.7), fc2=kit.linear(units, num_classes))


# ---- network in network ------------------------------------------------------------------------------------------


def mlpconv(in_channels: int, channels: tuple[int, ...], kernel_size: int, *, stride: int = 1, padding: int = 0,
            ndim: int = 2, dtype: DTypeLike = np.float32, rng: Rng = None) -> Sequential:
    """A convolution and 1x1 convolutions, each with ReLU: a perceptron slid over the image (Lin et al. 2014).

    Parameters
    ----------
    in_channels : int
        Channels of the input.
    channels : tuple of int
        Channels of the convolution, then of each 1x1 convolution.
    kernel_size, stride, padding : int
        Of the first convolution.
    ndim, dtype, rng
        See the module.

    Returns
    -------
    Sequential
        From (N, in_channels, \\*spatial) to (N, channels[-1], \\*out_size).
    """
    kit = Kit(ndim, dtype, rng)
    layers: list[Layer] = [kit.conv(in_channels, channels[0], kernel_size, stride=stride, padding=padding), ReLU()]
    for before, after in itertools.pairwise(channels):
        layers += [kit.conv(before, after, 1), ReLU()]
    return Sequential(*layers)


# ---- settings ----------------------------------------------------------------------------------------------------


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """`channels` times `width`, rounded to a positive multiple of `multiple`."""
    return multiple * max(1, round(channels * width / multiple))


def stem_window(op: str, stem: str) -> dict[str, Any]:
    """Window of a network's first convolution, for `Kit.conv`; raises ValueError if `stem` is unknown.

    ``"large"``, for images of about 224 pixels, has a stride of 2, and a pool follows that halves the size once more;
    ``"small"``, for those of about 32, leaves the size as it is, and no pool follows.
    """
    if stem not in ("large", "small"):
        raise ValueError(f"{op}: stem is {stem!r}, but 'large' or 'small' is needed. "
                         "Hint: 'small' is for sizes of about 32")
    kernel_size, stride = (7, 2) if stem == "large" else (3, 1)
    return {"kernel_size": kernel_size, "stride": stride, "padding": kernel_size // 2}


def check_variant(op: str, variant: str) -> str:
    """Return `variant` if it is known; raises ValueError."""
    if variant not in ("paper", "torchvision"):
        raise ValueError(f"{op}: variant is {variant!r}, but 'paper' or 'torchvision' is needed. "
                         "Hint: 'torchvision' fits the weights that torchvision publishes")
    return variant
