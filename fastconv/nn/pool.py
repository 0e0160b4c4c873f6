"""Pools in 1D, 2D and 3D, global pools, and max unpooling.

Every layer takes (N, C, \\*spatial), and those with a number of axes in their name (C, \\*spatial) too. Gradients have
the memory order of the input.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fastconv.arrays import Array, as_array, on_device
from fastconv.functional import pool
from fastconv.nn.layer import Backward, Leaf, allocator, inherit_doc
from fastconv.problem.common import per_axis


class _Pool(Leaf):
    """A pool over a number of spatial axes; `None` is that of the input."""

    ndim: ClassVar[int | None] = None
    shown: ClassVar[tuple[str, ...]] = ()
    """Settings that `repr` shows."""

    def _sizes(self, name: str, value: Any, low: int) -> tuple[int, ...]:
        assert self.ndim is not None
        return per_axis(type(self).__name__, name, value, self.ndim, low)

    def extra_repr(self) -> str:
        """See `Layer.extra_repr`."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)


class _MaxLike(_Pool):
    """A pool that picks elements, so that its gradient goes where its indices say."""

    return_indices: bool = False

    def forward(self, x: Array, out: Array | None = None) -> tuple[Any, Backward]:
        """Run on `x`, into `out` if given.

        With `return_indices` the output is a tuple ``(y, indices)``, `backward` takes dy alone.
        """
        x, ndim, new_input = as_array(x, "input", type(self).__name__), self.ndim, allocator(x)
        y, indices = self._pool(x, True, out)

        def backward(dy: Array) -> Array:
            dx = new_input()
            return pool.max_pool_grad(dy, indices, dx.shape, ndim=ndim, out=dx)

        return ((y, indices) if self.return_indices else y), backward

    def __call__(self, x: Array, out: Array | None = None) -> Any:
        """Run inference, into `out` if given."""
        return self._pool(x, self.return_indices, out)

    def _pool(self, x: Array, indices: bool, out: Array | None) -> Any:
        raise NotImplementedError


class _MaxPool(_MaxLike):
    """Maximum of each window; see `fastconv.functional.max_pool`.

    Parameters
    ----------
    kernel_size, dilation : int or tuple of int
        Per axis.
    stride : int or tuple of int, optional
        Per axis; `kernel_size` if left out.
    padding : int, tuple or str
        Numbers, pairs or a name; never the maximum.
    return_indices : bool
        Whether the output is a tuple of the maxima and their positions, for the unpooling layer.
    ceil_mode : bool
        Whether to round the output size up.
    """

    shown = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
                 return_indices: bool = False, ceil_mode: bool = False) -> None:
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else self._sizes("stride", stride, 1)
        self.padding = padding
        self.dilation = self._sizes("dilation", dilation, 1)
        self.return_indices = return_indices
        self.ceil_mode = ceil_mode

    def _pool(self, x: Array, indices: bool, out: Array | None) -> Any:
        return pool.max_pool(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, indices,
                             ndim=self.ndim, out=out)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Any, Backward]:
        """Run on `x`, into `out` if given; with `return_indices` see `_MaxLike.forward`.

        Indices are 8 bytes for each output, and take longer than the maxima. Where windows do not overlap, `backward`
        finds these again quickly, in x, which the layer before has kept for itself; else one byte says which tap of its
        window an output took.
        """
        x = as_array(x, "input", type(self).__name__)
        if self.return_indices or on_device(x):
            return super().forward(x, out)
        settings: Any = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        ndim, new_input = self.ndim, allocator(x)
        taps = None
        axes = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        if all(step >= d * (k - 1) + 1 for k, step, d in axes):
            y = self._pool(x, False, out)
        else:
            y, taps = pool.max_pool_taps(x, *settings, ndim=ndim, out=out)
        if taps is None:
            return y, lambda dy: pool.max_pool_input_grad(dy, x, y, *settings, ndim=ndim, out=new_input())
        return y, lambda dy: pool.max_pool_taps_grad(dy, taps, out=new_input())


@inherit_doc
class MaxPool1d(_MaxPool):
    """Max pool of (N, C, L)."""

    ndim = 1


@inherit_doc
class MaxPool2d(_MaxPool):
    """Max pool of (N, C, H, W)."""

    ndim = 2


@inherit_doc
class MaxPool3d(_MaxPool):
    """Max pool of (N, C, D, H, W)."""

    ndim = 3


class _AdaptiveMaxPool(_MaxLike):
    """Maximum of each of `output_size` windows of about equal size; see `fastconv.functional.adaptive_max_pool`.

    Parameters
    ----------
    output_size : int, None, or tuple of these
        Per axis; None keeps the size of the axis.
    return_indices : bool
        Whether the output is a tuple of the maxima and their positions.
    """

    shown = ("output_size",)

    def __init__(self, output_size: Any, return_indices: bool = False) -> None:
        self.output_size = output_size
        self.return_indices = return_indices

    def _pool(self, x: Array, indices: bool, out: Array | None) -> Any:
        return pool.adaptive_max_pool(x, self.output_size, indices, ndim=self.ndim, out=out)


@inherit_doc
class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """Adaptive max pool of (N, C, L)."""

    ndim = 1


@inherit_doc
class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """Adaptive max pool of (N, C, H, W)."""

    ndim = 2


@inherit_doc
class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """Adaptive max pool of (N, C, D, H, W)."""

    ndim = 3


class GlobalMaxPool(_MaxLike):
    """Maximum of each channel of (N, C, \\*spatial) in any number of axes, as (N, C, 1, ...)."""

    def _pool(self, x: Array, indices: bool, out: Array | None) -> Any:
        return pool.global_max_pool(x, indices, out=out)


class _AvgPool(_Pool):
    """Mean of each window; see `fastconv.functional.avg_pool`.

    Parameters
    ----------
    kernel_size, dilation : int or tuple of int
        Per axis.
    stride : int or tuple of int, optional
        Per axis; `kernel_size` if left out.
    padding : int, tuple or str
        Numbers, pairs or a name.
    ceil_mode : bool
        Whether to round the output size up.
    count_include_pad : bool
        Whether padding counts in the divisor.
    divisor_override : int, optional
        The divisor of every window.
    """

    shown = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override", "dilation")

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
                 count_include_pad: bool = True, divisor_override: int | None = None, *, dilation: Any = 1) -> None:
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else self._sizes("stride", stride, 1)
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override
        self.dilation = self._sizes("dilation", dilation, 1)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Array, Backward]:
        """Run on `x`, into `out` if given; see `Layer.forward`."""
        x, ndim, dilation = as_array(x, "input", type(self).__name__), self.ndim, self.dilation
        settings = (self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad,
                    self.divisor_override)
        y = pool.avg_pool(x, *settings, dilation=dilation, ndim=ndim, out=out)
        new_input = allocator(x)

        def backward(dy: Array) -> Array:
            dx = new_input()
            return pool.avg_pool_grad(dy, dx.shape, *settings, dilation=dilation, ndim=ndim, out=dx)

        return y, backward

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run inference, into `out` if given."""
        return self.forward(x, out)[0]


@inherit_doc
class AvgPool1d(_AvgPool):
    """Average pool of (N, C, L)."""

    ndim = 1


@inherit_doc
class AvgPool2d(_AvgPool):
    """Average pool of (N, C, H, W)."""

    ndim = 2


@inherit_doc
class AvgPool3d(_AvgPool):
    """Average pool of (N, C, D, H, W)."""

    ndim = 3


class _LPPool(_Pool):
    """``sum(x**p)**(1/p)`` of each window; see `fastconv.functional.lp_pool`.

    Parameters
    ----------
    norm_type : float
        The power p.
    kernel_size : int or tuple of int
        Per axis.
    stride : int or tuple of int, optional
        Per axis; `kernel_size` if left out.
    ceil_mode : bool
        Whether to round the output size up.
    padding, dilation
        As in the average pool.
    """

    shown = ("norm_type", "kernel_size", "stride", "ceil_mode", "padding", "dilation")

    def __init__(self, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False, *,
                 padding: Any = 0, dilation: Any = 1) -> None:
        self.norm_type = norm_type
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else self._sizes("stride", stride, 1)
        self.ceil_mode = ceil_mode
        self.padding = padding
        self.dilation = self._sizes("dilation", dilation, 1)

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x`; see `Layer.forward`."""
        x = as_array(x, "input", type(self).__name__)
        settings = (self.norm_type, self.kernel_size, self.stride, self.ceil_mode)
        options: dict[str, Any] = {"padding": self.padding, "dilation": self.dilation, "ndim": self.ndim}
        y = pool.lp_pool(x, *settings, **options)
        return y, lambda dy: pool.lp_pool_grad(dy, x, y, *settings, **options, out=allocator(x)())


@inherit_doc
class LPPool1d(_LPPool):
    """Power-average pool of (N, C, L)."""

    ndim = 1


@inherit_doc
class LPPool2d(_LPPool):
    """Power-average pool of (N, C, H, W)."""

    ndim = 2


@inherit_doc
class LPPool3d(_LPPool):
    """Power-average pool of (N, C, D, H, W)."""

    ndim = 3


class _AdaptiveAvgPool(_Pool):
    """Mean of each of `output_size` windows of about equal size; see `fastconv.functional.adaptive_avg_pool`.

    Parameters
    ----------
    output_size : int, None, or tuple of these
        Per axis; None keeps the size of the axis.
    """

    shown: ClassVar[tuple[str, ...]] = ("output_size",)

    def __init__(self, output_size: Any) -> None:
        self.output_size = output_size

    def forward(self, x: Array) -> tuple[Array, Backward]:
        """Run on `x`; see `Layer.forward`."""
        x, ndim, new_input = as_array(x, "input", type(self).__name__), self.ndim, allocator(x)
        y = pool.adaptive_avg_pool(x, self.output_size, ndim=ndim)

        def backward(dy: Array) -> Array:
            dx = new_input()
            return pool.adaptive_avg_pool_grad(dy, dx.shape, ndim=ndim, out=dx)

        return y, backward


@inherit_doc
class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """Adaptive average pool of (N, C, L)."""

    ndim = 1


@inherit_doc
class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """Adaptive average pool of (N, C, H, W)."""

    ndim = 2


@inherit_doc
class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """Adaptive average pool of (N, C, D, H, W)."""

    ndim = 3


class GlobalAvgPool(_AdaptiveAvgPool):
    """Mean of each channel of (N, C, \\*spatial) in any number of axes, as (N, C, 1, ...) (Lin et al. 2014)."""

    shown = ()

    def __init__(self) -> None:
        super().__init__(1)


class _MaxUnpool(_Pool):
    """Zeros with every element of the input where its index says; see `fastconv.functional.max_unpool`.

    The input is the tuple ``(x, indices)`` that the max pool with ``return_indices=True`` gives; the gradient is that
    of x.

    Parameters
    ----------
    kernel_size : int or tuple of int
        That of the max pool.
    stride : int or tuple of int, optional
        That of the max pool; `kernel_size` if left out.
    padding : int or tuple of int
        That of the max pool.
    output_size : tuple of int, optional
        The unpooled spatial size, where the pool's rounding leaves a choice.
    """

    shown = ("kernel_size", "stride", "padding")

    def __init__(self, kernel_size: Any, stride: Any = None, padding: Any = 0, *, output_size: Any = None) -> None:
        self.kernel_size = self._sizes("kernel_size", kernel_size, 1)
        self.stride = self.kernel_size if stride is None else self._sizes("stride", stride, 1)
        self.padding = self._sizes("padding", padding, 0)
        self.output_size = output_size

    def forward(self, x: tuple[Array, Array]) -> tuple[Array, Backward]:
        """Run on ``(x, indices)``; see `Layer.forward`."""
        name, ndim = type(self).__name__, self.ndim
        if not isinstance(x, tuple) or len(x) != 2:
            raise TypeError(f"{name}: the input is a {type(x).__qualname__}, but a tuple (x, indices) is needed. "
                            "Hint: a max pool with return_indices=True gives one")
        values, indices = as_array(x[0], "input", name), x[1]
        y = pool.max_unpool(values, indices, self.kernel_size, self.stride, self.padding, self.output_size, ndim=ndim)
        new_input = allocator(values)
        return y, lambda dy: pool.max_unpool_grad(dy, indices, ndim=ndim, out=new_input())


@inherit_doc
class MaxUnpool1d(_MaxUnpool):
    """Partial inverse of the max pool of (N, C, L)."""

    ndim = 1


@inherit_doc
class MaxUnpool2d(_MaxUnpool):
    """Partial inverse of the max pool of (N, C, H, W)."""

    ndim = 2


@inherit_doc
class MaxUnpool3d(_MaxUnpool):
    """Partial inverse of the max pool of (N, C, D, H, W)."""

    ndim = 3


MAX_POOL: dict[int, type[_MaxPool]] = {1: MaxPool1d, 2: MaxPool2d, 3: MaxPool3d}
"""The max pool for each number of spatial axes, for networks that work in any."""

AVG_POOL: dict[int, type[_AvgPool]] = {1: AvgPool1d, 2: AvgPool2d, 3: AvgPool3d}
"""The average pool for each number of spatial axes."""

ADAPTIVE_AVG_POOL: dict[int, type[_AdaptiveAvgPool]] = {
    1: AdaptiveAvgPool1d, 2: AdaptiveAvgPool2d, 3: AdaptiveAvgPool3d}
"""The adaptive average pool for each number of spatial axes."""
