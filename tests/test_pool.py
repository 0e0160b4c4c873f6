"""The public pools and their gradients: against PyTorch where it has them, else against loops over windows."""

import inspect
import itertools

import numpy as np
import pytest
from tolerance import assert_close

import fastconv.functional as F
from fastconv import config, nn
from fastconv.arrays import memory_order, to_channels_last
from fastconv.backends import _cpu

NDIMS = [1, 2, 3]
# Names and order of PyTorch's parameters, by the documentation of torch.nn.functional.
PARAMETERS = {
    "max_pool": ["input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"],
    "avg_pool": ["input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"],
    "lp_pool": ["input", "norm_type", "kernel_size", "stride", "ceil_mode"],
    "adaptive_avg_pool": ["input", "output_size"],
    "adaptive_max_pool": ["input", "output_size", "return_indices"],
    "max_unpool": ["input", "indices", "kernel_size", "stride", "padding", "output_size"],
}


def normal(rng: np.random.Generator, *shape: int, dtype: object = np.float64) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def cases(ndim: int, count: int):
    """Yield (rng, input, sliding-window parameters that PyTorch takes) in all memory orders, batched or not."""
    rng = np.random.default_rng(ndim)
    found = 0
    while found < count:
        size, kernel, stride = (tuple(int(v) for v in rng.integers(1, top, ndim)) for top in (10, 4, 4))
        padding = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
        if any(n < k for n, k in zip(size, kernel, strict=True)):
            continue
        found += 1
        dtype = (np.float32, np.float64)[found % 2]
        x = normal(rng, int(rng.integers(1, 4)), int(rng.integers(1, 6)), *size, dtype=dtype)
        if found % 3 == 0:
            x = to_channels_last(x)
        if found % 5 == 0:
            x = x[0]
        yield rng, x, kernel, stride, padding


def torch_of(x: np.ndarray):
    import torch

    return torch.from_numpy(x.copy()).requires_grad_()


def agree(ours, theirs, reduction: int) -> None:
    assert ours.shape == tuple(theirs.shape)
    assert_close(ours, theirs.detach().numpy().astype(np.float64), reduction, dtype=ours.dtype)


# ---- Against PyTorch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", NDIMS)
def test_max_pool_is_torchs(ndim: int) -> None:
    torch = pytest.importorskip("torch")
    theirs, unpool = (getattr(torch.nn.functional, f"max_{kind}{ndim}d") for kind in ("pool", "unpool"))
    ours = getattr(F, f"max_pool{ndim}d")
    for rng, x, kernel, stride, padding in cases(ndim, 60):
        dilation = tuple(int(v) for v in rng.integers(1, 3, ndim))
        if any(n + 2 * p < d * (k - 1) + 1
               for n, p, d, k in zip(x.shape[-ndim:], padding, dilation, kernel, strict=True)):
            dilation = 1
        ceil_mode = bool(rng.integers(2))
        t = torch_of(x)
        y_t, at_t = theirs(t, kernel, stride, padding, dilation, ceil_mode, True)
        y, at = ours(x, kernel, stride, padding, dilation, ceil_mode, True)
        np.testing.assert_array_equal(y, y_t.detach().numpy())
        np.testing.assert_array_equal(at, at_t.numpy())
        np.testing.assert_array_equal(ours(x, kernel, stride, padding, dilation, ceil_mode), y)
        dy = normal(rng, *y.shape, dtype=x.dtype)
        y_t.backward(torch.from_numpy(dy))
        agree(F.max_pool_grad(dy, at, x.shape, ndim=ndim), t.grad, 9)
        if not any(padding) and dilation == 1 and stride == kernel:
            up = unpool(y_t.detach(), at_t, kernel, stride, 0, x.shape[-ndim:])
            np.testing.assert_array_equal(getattr(F, f"max_unpool{ndim}d")(y, at, kernel, stride, 0, x.shape), up)


@pytest.mark.parametrize("ndim", NDIMS)
def test_avg_pool_is_torchs(ndim: int) -> None:
    torch = pytest.importorskip("torch")
    theirs, ours = (getattr(place, f"avg_pool{ndim}d") for place in (torch.nn.functional, F))
    for rng, x, kernel, stride, padding in cases(ndim, 60):
        options = [kernel, stride, padding, bool(rng.integers(2)), bool(rng.integers(2))]
        if ndim > 1:
            options.append([None, 3, -2][int(rng.integers(3))])
        t = torch_of(x)
        y_t = theirs(t, *options)
        y = ours(x, *options)
        agree(y, y_t, 27)
        dy = normal(rng, *y.shape, dtype=x.dtype)
        y_t.backward(torch.from_numpy(dy))
        agree(F.avg_pool_grad(dy, x.shape, *options, ndim=ndim), t.grad, 27)


@pytest.mark.parametrize("ndim", NDIMS)
@pytest.mark.parametrize("p", [1, 2, 3, 1.5])
def test_lp_pool_is_torchs(ndim: int, p: float) -> None:
    torch = pytest.importorskip("torch")
    theirs, ours = (getattr(place, f"lp_pool{ndim}d") for place in (torch.nn.functional, F))
    for rng, x, kernel, stride, _ in cases(ndim, 20):
        # In float64, because both sides round powers and roots; away from 0, where roots have no derivative.
        x = np.abs(x.astype(np.float64)) + 0.1
        ceil_mode = bool(rng.integers(2))
        t = torch_of(x)
        if ndim == 1:  # PyTorch's takes no tuples
            kernel, stride = kernel[0], stride[0]
        y_t = theirs(t, p, kernel, stride, ceil_mode)
        y = ours(x, p, kernel, stride, ceil_mode)
        np.testing.assert_allclose(y, y_t.detach(), rtol=1e-13)
        dy = normal(rng, *y.shape, dtype=x.dtype)
        y_t.backward(torch.from_numpy(dy))
        dx = F.lp_pool_grad(dy, x, y, p, kernel, stride, ceil_mode, ndim=ndim)
        np.testing.assert_allclose(dx, t.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ndim", NDIMS)
def test_adaptive_pools_are_torchs(ndim: int) -> None:
    torch = pytest.importorskip("torch")
    avg_t, avg = (getattr(place, f"adaptive_avg_pool{ndim}d") for place in (torch.nn.functional, F))
    max_t, maximum = (getattr(place, f"adaptive_max_pool{ndim}d") for place in (torch.nn.functional, F))
    for rng, x, *_ in cases(ndim, 40):
        output_size = tuple(int(v) for v in rng.integers(1, 12, ndim))
        t, s = torch_of(x), torch_of(x)
        y_t, (z_t, at_t) = avg_t(t, output_size), max_t(s, output_size, return_indices=True)
        y, (z, at) = avg(x, output_size), maximum(x, output_size, True)
        agree(y, y_t, 27)
        np.testing.assert_array_equal(z, z_t.detach().numpy())
        np.testing.assert_array_equal(at, at_t.numpy())
        dy = normal(rng, *y.shape, dtype=x.dtype)
        y_t.backward(torch.from_numpy(dy))
        z_t.backward(torch.from_numpy(dy))
        agree(F.adaptive_avg_pool_grad(dy, x.shape, ndim=ndim), t.grad, 27)
        agree(F.max_pool_grad(dy, at, x.shape, ndim=ndim), s.grad, 27)


# ---- Beyond PyTorch ---------------------------------------------------------------------------------------------


def sliding(x: np.ndarray, kernel: tuple[int, ...], stride: int, pads: tuple[tuple[int, int], ...],
            dilation: int) -> np.ndarray:
    """All windows of `x` (N, C, *spatial) padded with NaN: (N, C, *out_size, taps)."""
    padded = np.pad(x, ((0, 0), (0, 0), *pads), constant_values=np.nan)
    outputs = [range(0, n - dilation * (k - 1), stride) for n, k in zip(padded.shape[2:], kernel, strict=True)]
    taps = [[padded[(..., *(slice(o + t * dilation, o + t * dilation + 1) for o, t in zip(at, tap, strict=True)))]
             for tap in np.ndindex(*kernel)] for at in itertools.product(*outputs)]
    stacked = np.array(taps).reshape(*map(len, outputs), len(taps[0]), *x.shape[:2])
    return np.moveaxis(stacked, (-2, -1), (0, 1))


@pytest.mark.parametrize("ndim", NDIMS)
def test_asymmetric_padding_and_dilation(ndim: int) -> None:
    x = normal(np.random.default_rng(0), 2, 3, *(7, 8, 9)[:ndim])
    kernel, pads = (3, 2, 2)[:ndim], ((1, 2), (0, 2), (2, 0))[:ndim]
    windows = sliding(x, kernel, 2, pads, 2)
    volume = windows.shape[-1]
    np.testing.assert_array_equal(F.max_pool(x, kernel, 2, pads, 2), np.nanmax(windows, -1))
    total, inside = np.nansum(windows, -1), np.sum(~np.isnan(windows), -1)
    for options, divisor in (((True, None), volume), ((False, None), inside), ((True, 5), 5)):
        y = F.avg_pool(x, kernel, 2, pads, False, *options, dilation=2)
        np.testing.assert_allclose(y, total / divisor, rtol=1e-13, atol=1e-14)
        # The gradient is the transpose: <pool(x), dy> = <x, pool_grad(dy)>.
        dy = normal(np.random.default_rng(1), *y.shape)
        dx = F.avg_pool_grad(dy, x.shape, kernel, 2, pads, False, *options, dilation=2)
        np.testing.assert_allclose(np.vdot(y, dy), np.vdot(x, dx), rtol=1e-12)


@pytest.mark.parametrize("padding", ["same", "same_lower", "valid"])
def test_named_padding(padding: str) -> None:
    x = normal(np.random.default_rng(0), 1, 2, 7, 10)
    y = F.max_pool2d(x, (3, 4), 3, padding)
    # Height: (3 - 1) * 3 + 3 - 7 = 2 elements; width: (4 - 1) * 3 + 4 - 10 = 3 elements.
    pads = {"same": ((1, 1), (1, 2)), "same_lower": ((1, 1), (2, 1)), "valid": ((0, 0), (0, 0))}[padding]
    np.testing.assert_array_equal(y, np.nanmax(sliding(x, (3, 4), 3, pads, 1), -1))


@pytest.mark.parametrize("ndim", NDIMS)
def test_global_pools(ndim: int) -> None:
    x = normal(np.random.default_rng(0), 2, 3, *(4, 5, 6)[:ndim])
    axes = tuple(range(2, 2 + ndim))
    np.testing.assert_allclose(F.global_avg_pool(x), x.mean(axes, keepdims=True), rtol=1e-12)
    y, at = F.global_max_pool(x, return_indices=True)
    np.testing.assert_array_equal(y, x.max(axes, keepdims=True))
    np.testing.assert_array_equal(at.reshape(2, 3), x.reshape(2, 3, -1).argmax(-1))
    dy = normal(np.random.default_rng(1), *y.shape)
    np.testing.assert_allclose(F.adaptive_avg_pool_grad(dy, x.shape), np.broadcast_to(dy, x.shape) / x[0, 0].size)


def test_max_unpool_grad_gathers() -> None:
    rng = np.random.default_rng(0)
    x = normal(rng, 2, 3, 6, 8)
    y, at = F.max_pool2d(x, 2, return_indices=True)
    np.testing.assert_array_equal(F.max_unpool_grad(x, at), y)
    # The transpose of max_unpool, as of every gather.
    dy = normal(rng, *x.shape)
    up = F.max_unpool2d(y, at, 2)
    np.testing.assert_allclose(np.vdot(up, dy), np.vdot(y, F.max_unpool_grad(dy, at)), rtol=1e-12)


def test_nan_and_infinity() -> None:
    x = np.array([[[1, np.nan, 0, -np.inf, np.inf, 2, -np.inf, -np.inf]]])
    y, at = F.max_pool1d(x, 2, return_indices=True)
    np.testing.assert_array_equal(y, [[[np.nan, 0, np.inf, -np.inf]]])
    assert at.tolist() == [[[1, 2, 4, 6]]]
    np.testing.assert_array_equal(F.avg_pool1d(x, 2), [[[np.nan, -np.inf, np.inf, -np.inf]]])


# ---- Conventions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_results_keep_order_and_dtype(order: str, dtype: type) -> None:
    x = normal(np.random.default_rng(0), 2, 4, 6, 8, dtype=dtype)
    if order == "channels_last":
        x = to_channels_last(x)
    y, at = F.max_pool2d(x, 2, return_indices=True)
    results = [y, F.avg_pool2d(x, 3, 1, 1), F.lp_pool2d(x, 2, 2), F.adaptive_avg_pool2d(x, 3),
               F.adaptive_max_pool2d(x, (2, None)), F.max_pool_grad(y, at, x.shape), F.max_unpool2d(y, at, 2),
               F.max_unpool_grad(x, at), F.avg_pool_grad(y, x.shape, 2), F.lp_pool_grad(y, x, y, 2, 2),
               F.adaptive_avg_pool_grad(y, x.shape)]
    assert {r.dtype for r in results} == {np.dtype(dtype)}
    assert at.dtype == np.int64
    assert {memory_order(r) for r in (*results, at)} == {order}


def test_empty_batches() -> None:
    x = np.zeros((0, 3, 6, 8), np.float32)
    y, at = F.max_pool2d(x, 2, return_indices=True)
    assert y.shape == at.shape == (0, 3, 3, 4)
    assert F.max_pool_grad(y, at, x.shape).shape == x.shape
    assert F.max_unpool2d(y, at, 2).shape == x.shape
    for pooled in (F.avg_pool2d(x, 2), F.lp_pool2d(x, 2, 2), F.adaptive_avg_pool2d(x, (3, 4))):
        assert pooled.shape == (0, 3, 3, 4)
    assert F.avg_pool_grad(y, x.shape, 2).shape == x.shape
    assert F.adaptive_avg_pool2d(np.zeros((2, 3, 6, 8), np.float32), (0, 4)).shape == (2, 3, 0, 4)


@pytest.mark.parametrize("ndim", NDIMS)
def test_without_a_batch(ndim: int) -> None:
    x = normal(np.random.default_rng(0), 3, *(6, 8, 4)[:ndim])
    whole = x[None]

    def same(kind: str, *arguments: object, **options: object) -> None:
        function = getattr(F, f"{kind}{ndim}d")
        np.testing.assert_array_equal(function(x, *arguments, **options), function(whole, *arguments, **options)[0])

    same("max_pool", 2)
    same("avg_pool", 3, 2, 1)
    same("lp_pool", 2, 2)
    same("adaptive_avg_pool", 3)
    same("adaptive_max_pool", 3)
    y, at = F.max_pool(x, 2, return_indices=True, ndim=ndim)
    for alone, batched in (
        (F.max_pool_grad(y, at, x.shape, ndim=ndim), F.max_pool_grad(y[None], at[None], whole.shape)),
        (F.avg_pool_grad(y, x.shape, 2, ndim=ndim), F.avg_pool_grad(y[None], whole.shape, 2)),
        (F.lp_pool_grad(y, x, y, 2, 2, ndim=ndim), F.lp_pool_grad(y[None], whole, y[None], 2, 2)),
        (F.adaptive_avg_pool_grad(y, x.shape, ndim=ndim), F.adaptive_avg_pool_grad(y[None], whole.shape)),
        (F.max_unpool_grad(x, at, ndim=ndim), F.max_unpool_grad(whole, at[None])),
        (F.max_unpool(y, at, 2, ndim=ndim), F.max_unpool(y[None], at[None], 2)),
    ):
        np.testing.assert_array_equal(alone, batched[0])


def test_out_is_written_and_returned() -> None:
    x = normal(np.random.default_rng(0), 2, 4, 6, 8)
    y, at = F.max_pool2d(x, 2, return_indices=True)
    calls = [  # with what is summed, in another order where memory lies otherwise
        (y.shape, 1, lambda out: F.max_pool2d(x, 2, out=out)),
        (y.shape, 4, lambda out: F.avg_pool2d(x, 2, out=out)),
        (y.shape, 4, lambda out: F.lp_pool2d(x, 2, 2, out=out)),
        (y.shape, 6, lambda out: F.adaptive_avg_pool2d(x, (3, 4), out=out)),
        (y.shape, 1, lambda out: F.adaptive_max_pool2d(x, (3, 4), out=out)),
        (x.shape, 1, lambda out: F.max_pool_grad(y, at, x.shape, out=out)),
        (x.shape, 1, lambda out: F.avg_pool_grad(y, x.shape, 2, out=out)),
        (x.shape, 1, lambda out: F.lp_pool_grad(y, x, y, 2, 2, out=out)),
        (x.shape, 4, lambda out: F.adaptive_avg_pool_grad(y, x.shape, out=out)),
        (x.shape, 1, lambda out: F.max_unpool2d(y, at, 2, out=out)),
        (y.shape, 1, lambda out: F.max_unpool_grad(x, at, out=out)),
    ]
    for shape, terms, call in calls:
        expected = call(None)
        # A slice of the channels of a larger array, as blocks that concatenate use it.
        larger = np.full((shape[0], 2 * shape[1], *shape[2:]), np.nan)
        for out in (larger[:, ::2], to_channels_last(larger)[:, 3:7]):
            result = call(out)
            assert np.shares_memory(result, out)
            if terms == 1:
                np.testing.assert_array_equal(out, expected)
            else:
                assert_close(out, expected, terms)
        assert np.isnan(larger[:, 1::2]).all()


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("ndim", NDIMS)
def test_each_dimension_has_a_real_signature(kind: str, ndim: int) -> None:
    general, fixed = getattr(F, kind), getattr(F, f"{kind}{ndim}d")
    assert fixed.__name__ == f"{kind}{ndim}d"
    expected = [p for p in inspect.signature(general).parameters.values() if p.name != "ndim"]
    assert list(inspect.signature(fixed).parameters.values()) == expected
    assert "Parameters" in fixed.__doc__
    assert [p.name for p in expected][: len(PARAMETERS[kind])] == PARAMETERS[kind]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding"),
    [
        ((5, 13, 10, 10), 2, 2, 0),  # windows that tile the input, planes of all images together
        ((3, 17, 9, 7), 3, 2, 1),
        ((2, 20, 28, 28), 3, 1, 1),
        ((1, 16, 101, 110), 3, 2, 1),  # a forward pass in bands of rows
        ((1, 33, 130), 4, 4, 0),
        ((2, 9, 20, 21, 22), (3, 2, 3), (2, 1, 2), 1),  # and of slices
        ((1, 40, 61, 67), 3, 1, 1),  # a gradient in bands of rows, with blocks of channels
        ((1, 17, 37, 19, 23), 3, 2, 1),
        ((1, 16, 70, 33), 7, 2, 3),
    ],
)
def test_memory_orders_agree(shape, kernel, stride, padding, dtype):
    """Short rows of contiguous memory are pooled as lanes of planes; images need not lie side by side."""
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, shape).astype(dtype)  # with ties
    x[0, 1].flat[::7] = np.nan
    finite = rng.standard_normal(shape).astype(dtype)
    args = (kernel, stride, padding)
    last, finite_last = to_channels_last(x), to_channels_last(finite)
    spaced = np.full((shape[0], shape[1] + 2, *shape[2:]), np.nan, dtype)[:, 1:-1]
    spaced[...] = x
    for contiguous in (x, spaced):
        y = F.max_pool(contiguous, *args)
        np.testing.assert_array_equal(y, F.max_pool(last, *args))
        grid = rng.integers(-64, 65, y.shape).astype(dtype) / 8  # whose sums are exact, in any order
        expected = F.max_pool_grad(grid, F.max_pool(last, *args, return_indices=True)[1], shape)
        out = np.full(shape, np.nan, dtype)
        np.testing.assert_array_equal(F.max_pool_input_grad(grid, contiguous, y, *args, out=out), expected)
        np.testing.assert_array_equal(
            F.max_pool_input_grad(to_channels_last(grid), last, to_channels_last(y), *args), expected)
    dy = rng.standard_normal(y.shape).astype(dtype)
    assert_close(F.avg_pool(finite, *args), F.avg_pool(finite_last, *args), 27)
    assert_close(F.avg_pool_grad(dy, shape, *args, out=out), F.avg_pool_grad(to_channels_last(dy), shape, *args), 27)
    y = F.lp_pool(finite, 2, kernel, stride)
    dy = rng.standard_normal(y.shape).astype(dtype)
    y_last = F.lp_pool(finite_last, 2, kernel, stride)
    assert_close(y, y_last, 27)
    assert_close(F.lp_pool_grad(dy, finite, y, 2, kernel, stride, out=out),
                 F.lp_pool_grad(to_channels_last(dy), finite_last, y_last, 2, kernel, stride), 27)


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("count", [1, 16, 17, 35])
def test_means_of_whole_planes(isa, count):
    """Sums of several planes are merged in a vector."""
    rng = np.random.default_rng(count)
    sizes = ((3, 3), (2, 8), (7, 7), (8, 9), (16, 16), (4, 5, 6))
    for dtype, size in itertools.product((np.float32, np.float64), sizes):
        x = np.full((2, count + 1, *size), np.nan, dtype)[:, 1:]
        x[...] = rng.standard_normal(x.shape)
        with config(isa=isa):
            y = F.global_avg_pool(x)
        axes = tuple(range(2, x.ndim))
        assert_close(y, x.astype(np.float64).mean(axes, keepdims=True).astype(dtype), x[0, 0].size)


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_two_columns(isa, dtype):
    """The same bits as in channels_last for divisors that are powers of two, and for others."""
    rng = np.random.default_rng(0)
    widths = (30, 31, 32, 33, 34, 36, 63, 64, 65, 66, 68, 100, 127, 128, 130, 224)
    for width, size, kernel in itertools.product(widths, ((6,), (3, 4)), (2, (3, 2), (1, 2))):
        kernel = (2,) * (len(size) - 1) + kernel if isinstance(kernel, tuple) else kernel
        for padding, ceil_mode in ((0, False), (0, True), ((0,) * len(size) + (1,), True)):
            x = rng.integers(-9, 10, (1, 9, *size, width)).astype(dtype)  # whose sums are exact
            x[0, 1].flat[::5] = np.nan
            x[0, 2] = -np.inf
            x_last = to_channels_last(x)
            with config(isa=isa, threads=1):
                args = (kernel, 2, padding, ceil_mode)
                np.testing.assert_array_equal(F.avg_pool(x, *args), F.avg_pool(x_last, *args))
                np.testing.assert_array_equal(F.max_pool(x, kernel, 2, padding, 1, ceil_mode),
                                              F.max_pool(x_last, kernel, 2, padding, 1, ceil_mode))


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_three_columns(isa, dtype, stride):
    """Rows of contiguous memory are pooled in registers, several a call, the windows over the padding with them."""
    rng = np.random.default_rng(0)
    widths = (5, 7, 8, 9, *range(11, 19), *range(24, 28), *range(32, 37), *range(47, 50), *range(63, 67), 100, 103, 113)
    for width, padding, size in itertools.product(widths, (0, 1, (0, 1), (1, 0)), ((5,), (3, 4))):
        last = padding if isinstance(padding, tuple) else (padding, padding)
        pads = ((1, 1),) * len(size) + (last,)
        x = rng.integers(-3, 4, (1, 9, *size, width)).astype(dtype)
        x_last = to_channels_last(x)
        kernels = (3, (2,) * len(size) + (3,))
        for kernel, with_padding in itertools.product(kernels, (True, False)):
            with config(isa=isa, threads=1):
                y = F.avg_pool(x, kernel, stride, pads, count_include_pad=with_padding)
                assert_close(y, F.avg_pool(x_last, kernel, stride, pads, count_include_pad=with_padding), 27)
        x[0, 1].flat[::5] = np.nan
        x[0, 2] = -np.inf
        x_last = to_channels_last(x)
        for kernel in kernels:
            with config(isa=isa, threads=1):
                y = F.max_pool(x, kernel, stride, pads)
                np.testing.assert_array_equal(y, F.max_pool(x_last, kernel, stride, pads))


POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "dilation", "kept"),
    [
        ((2, 16, 33), 3, 2, 1, 1, True),
        ((1, 64, 40, 36), 3, 2, 1, 1, True),  # bands of rows: windows reach into two
        ((3, 20, 9, 31), (3, 2), (1, 3), (1, 0), (2, 1), True),
        ((1, 72, 24, 26, 20), 3, 2, 1, 1, True),  # bands of slices
        ((2, 2, 16, 16), 3, 2, 1, 1, False),  # in NCHW too few planes
        ((1, 16, 40, 40), 17, 3, 8, 1, False),  # more than 256 taps
    ],
)
def test_layers_give_to_the_tap_that_was_taken(shape, kernel, stride, padding, dilation, kept, order):
    """Of equal maxima to the first, of NaNs to the last one, whatever order dy has."""
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, shape).astype(np.float32)  # with ties
    x[0, 1].flat[::11] = np.nan
    x = to_channels_last(x) if order == "channels_last" else x
    expected, indices = F.max_pool(x, kernel, stride, padding, dilation, return_indices=True)
    y, backward = POOLS[len(shape) - 2](kernel, stride, padding, dilation).forward(x)
    np.testing.assert_array_equal(y, expected)
    dy = rng.integers(-64, 65, y.shape).astype(np.float32) / 8
    _, backward_alone = POOLS[len(shape) - 2](kernel, stride, padding, dilation).forward(x[0])
    if kept:
        x[...] = 0  # nobody looks there again
    right = F.max_pool_grad(dy, indices, shape)
    for each in (dy, to_channels_last(dy)):
        dx = backward(each)
        assert memory_order(dx) == order
        np.testing.assert_array_equal(dx, right)
    np.testing.assert_array_equal(backward_alone(dy[0]), right[0])


def test_taps_know_their_layout():
    """Forward and backward may run with vectors of other lengths."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 20, 30, 31), np.float32)
    with config(isa="generic"):
        _, backward = nn.MaxPool2d(3, 2, 1).forward(x)
    y, indices = F.max_pool(x, 3, 2, 1, return_indices=True)
    dy = rng.standard_normal(y.shape, np.float32)
    np.testing.assert_array_equal(backward(dy), F.max_pool_grad(dy, indices, x.shape))
    with pytest.raises(ValueError, match=r"grad_output has shape .* Hint"):
        backward(dy[..., :-1])
