"""The public convolutions: padding by name and mode, single samples, prepared weights, linear maps.

What the kernels compute is in test_matrix_conv; that PyTorch's calls work in test_opinfo.
"""

import threading

import numpy as np
import pytest
from cases import CONVS
from tolerance import assert_close

import fastconv
from fastconv import functional, prepare_conv
from fastconv.arrays import memory_order

PASSES = ("conv", "conv_input_grad", "conv_weight_grad")


@pytest.fixture(autouse=True)
def exact():
    """The tolerance of the plain sum is for the plain sum."""
    with fastconv.config(exact=True):
        yield


def normal(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, dtype) for shape in shapes]


# --------------------------------------------------------------------------------------------------
# padding="same", "same_lower", "valid"
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dilation", [1, 2])
def test_same_padding_is_that_of_onnx(stride, kernel, dilation):
    """pad = max((ceil(in / s) - 1) * s + d * (k - 1) + 1 - in, 0), its odd element at one end."""
    for size in (7, 8, 9):
        x, w = normal(size, (2, 3, size), (4, 3, kernel))
        out = -(-size // stride)
        pad = max((out - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
        for name, lo in (("same", pad // 2), ("same_lower", pad - pad // 2)):
            y = functional.conv1d(x, w, None, stride, name, dilation)
            assert y.shape == (2, 4, out)
            padded = np.pad(x, [(0, 0), (0, 0), (lo, pad - lo)])
            expected = functional.conv1d(padded, w, None, stride, "valid", dilation)
            assert_close(y, expected.astype(np.float64), w[0].size)


def test_valid_is_no_padding():
    x, w = normal(0, (2, 3, 8, 9), (4, 3, 3, 2))
    np.testing.assert_array_equal(functional.conv(x, w, padding="valid"), functional.conv(x, w, padding=0))


# --------------------------------------------------------------------------------------------------
# Padding modes
# --------------------------------------------------------------------------------------------------

MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_padding_modes(ndim, mode, order):
    """Forward as after numpy.pad; gradients by the identities of adjoints, exact in float64."""
    padding = ((2, 1), (0, 3), (1, 1))[:ndim]
    x, w, b = normal(ndim, (2, 4, *(5, 4, 6)[:ndim]), (6, 2, *(3, 2, 2)[:ndim]), (6,), dtype=float)
    if order == "channels_last":
        x = fastconv.to_channels_last(x)
    arguments = (2, padding, 1, 2)
    padded = np.pad(x, [(0, 0), (0, 0), *padding], mode=MODES[mode])
    y = functional.conv(x, w, b, *arguments, padding_mode=mode)
    assert_close(y, functional.conv(padded, w, b, 2, 0, 1, 2), w[0].size)
    assert memory_order(y) == order

    (dy,) = normal(0, y.shape, dtype=float)
    dx = functional.conv_input_grad(x.shape, w, dy, *arguments, padding_mode=mode)
    dw = functional.conv_weight_grad(x, w.shape, dy, *arguments, padding_mode=mode)
    linear_part = y - b.reshape(-1, *[1] * ndim)
    product = np.vdot(linear_part, dy)
    np.testing.assert_allclose([np.vdot(x, dx), np.vdot(w, dw)], product, rtol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients_of_padding_modes_agree_with_torch(ndim, mode):
    torch = pytest.importorskip("torch")
    x, w = normal(ndim, (2, 3, *(5, 4, 6)[:ndim]), (4, 3, *(3, 2, 2)[:ndim]), dtype=float)
    tx, tw = (torch.from_numpy(array).requires_grad_() for array in (x, w))
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[ndim - 1]
    padded = torch.nn.functional.pad(tx, (2, 2) * ndim, mode=mode)
    ty = conv(padded, tw)
    (dy,) = normal(0, tuple(ty.shape), dtype=float)
    tdx, tdw = torch.autograd.grad(ty, (tx, tw), torch.from_numpy(dy))
    options = {"padding": 2, "padding_mode": mode}
    assert_close(functional.conv(x, w, **options), ty.detach().numpy(), w[0].size)
    dx = functional.conv_input_grad(x.shape, w, dy, **options)
    assert_close(dx, tdx.numpy(), w.size)
    dw = functional.conv_weight_grad(x, w.shape, dy, **options)
    assert_close(dw, tdw.numpy(), dy.size)


# --------------------------------------------------------------------------------------------------
# One sample, foreign arrays, out=
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_sample_without_batch_is_a_batch_of_one(ndim):
    x, w, b = normal(ndim, (1, 4, *(7, 6, 5)[:ndim]), (6, 4, *(3, 2, 2)[:ndim]), (6,))
    y = functional.conv(x, w, b, 2, 1)
    (dy,) = normal(0, y.shape)
    transposed = functional.conv_transpose(dy, w, None, 2, 1)
    (dt,) = normal(1, transposed.shape)
    calls = [
        (functional.conv(x[0], w, b, 2, 1), y),
        (
            functional.conv_input_grad(x.shape[1:], w, dy[0], 2, 1),
            functional.conv_input_grad(x.shape, w, dy, 2, 1),
        ),
        (functional.conv_transpose(dy[0], w, None, 2, 1), transposed),
        (
            functional.conv_transpose_input_grad(dt[0], w, 2, 1),
            functional.conv_transpose_input_grad(dt, w, 2, 1),
        ),
    ]
    for alone, batch in calls:
        np.testing.assert_array_equal(alone, batch[0])
    np.testing.assert_array_equal(
        functional.conv_weight_grad(x[0], w.shape, dy[0], 2, 1),
        functional.conv_weight_grad(x, w.shape, dy, 2, 1),
    )
    out = np.empty_like(y[0])
    assert np.shares_memory(functional.conv(x[0], w, b, 2, 1, out=out), out)
    np.testing.assert_array_equal(out, y[0])


def test_named_dimensions_are_the_general_ones():
    for ndim, name in enumerate(("conv1d", "conv2d", "conv3d"), 1):
        x, w = normal(ndim, (2, 4, *(7, 6, 5)[:ndim]), (6, 4, *(3, 2, 2)[:ndim]))
        y = functional.conv(x, w, None, 2, 1)
        np.testing.assert_array_equal(getattr(functional, name)(x, w, None, 2, 1), y)
        transposed = getattr(functional, name.replace("conv", "conv_transpose"))
        np.testing.assert_array_equal(transposed(y, w, None, 2, 1, 1), functional.conv_transpose(y, w, None, 2, 1, 1))


def test_arrays_of_others_are_taken_without_a_copy():
    torch = pytest.importorskip("torch")
    x, w = normal(0, (2, 3, 6, 7), (4, 3, 3, 3))
    expected = functional.conv(x, w)
    tensor = torch.from_numpy(x)
    np.testing.assert_array_equal(functional.conv(tensor, torch.from_numpy(w)), expected)
    last = tensor.to(memory_format=torch.channels_last)
    y = functional.conv(last, w)
    assert_close(y, expected.astype(np.float64), w[0].size)
    assert y.transpose(0, 2, 3, 1).flags.c_contiguous
    out = torch.zeros(2, 4, 4, 5)
    functional.conv(x, w, out=out)
    np.testing.assert_array_equal(out.numpy(), expected)


def test_inputs_may_be_read_only():
    x, w = normal(0, (2, 3, 6, 7), (4, 3, 3, 3))
    expected = functional.conv(x, w)
    x.flags.writeable = w.flags.writeable = False
    np.testing.assert_array_equal(functional.conv(x, w), expected)


def test_bias_gradient():
    (dy,) = normal(0, (3, 4, 5, 6))
    expected = dy.astype(np.float64).sum((0, 2, 3))
    assert_close(functional.conv_bias_grad(dy), expected, 90)
    assert_close(functional.conv_bias_grad(dy[0], batched=False), dy[0].astype(np.float64).sum((1, 2)), 30)


# --------------------------------------------------------------------------------------------------
# What runs, and why
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONVS)
def test_the_reference_is_never_chosen_in_silence(name):
    case = CONVS[name]
    x, w = np.zeros(case.x, np.float32), np.zeros(case.w, np.float32)
    for array in (x, fastconv.to_channels_last(x), x[..., ::-1]):
        for op in PASSES:
            plan = fastconv.explain(array, w, *case.arguments, op=op)
            assert plan.algorithm != "reference"


def test_explain_gives_the_reason_of_every_row_above():
    x, w = np.zeros((1, 8, 9, 9), np.float32), np.zeros((4, 8, 3, 3), np.float32)
    plan = fastconv.explain(x, w, stride=2)
    names = [name for name, _ in plan.refused]
    assert plan.algorithm not in names
    assert all(reason for _, reason in plan.refused)
    assert "exact" in dict(plan.refused)["winograd"]
    for name, reason in plan.refused:
        assert f"not {name}: {reason}" in str(plan)
    assert fastconv.explain(x, w, algorithm="reference").algorithm == "reference"


def test_a_forced_row_that_refuses_says_why():
    x, w = np.zeros((1, 8, 9, 9), np.float32), np.zeros((4, 8, 3, 3), np.float32)
    with pytest.raises(ValueError, match=r"algorithm is 'winograd'.*exact=True"):
        functional.conv(x, w, algorithm="winograd")
    with pytest.raises(ValueError, match=r"algorithm is 'channelwise'.*8"):
        functional.conv(x, w, algorithm="channelwise")
    with (
        fastconv.config(algorithm="direct"),
        pytest.raises(ValueError, match=r"algorithm is 'direct'.*stride"),
    ):
        functional.conv(x[..., ::-1], w)


def test_the_call_overrides_the_setting():
    x, w = normal(0, (1, 8, 9, 9), (4, 8, 3, 3))
    with fastconv.config(algorithm="reference"):
        assert fastconv.explain(x, w).algorithm == "reference"
        assert fastconv.explain(x, w, algorithm="im2col").algorithm == "im2col"


# --------------------------------------------------------------------------------------------------
# Prepared weights
# --------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "leaky_relu": lambda y: np.where(y > 0, y, 0.01 * y),
    "sigmoid": lambda y: 1 / (1 + np.exp(-y)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["2 groups", "depthwise", "kernel 3", "3d stride 2", "1d kernel 9"])
def test_prepared_convolution_is_the_convolution(name, activation):
    case = CONVS[name]
    x, w, b = normal(0, case.x, case.w, case.w[:1])
    prepared = prepare_conv(w, b, *case.arguments, activation=activation)
    expected = ACTIVATIONS[activation](
        functional.conv(*(array.astype(np.float64) for array in (x, w, b)), *case.arguments)
    )
    n = case.reduction["conv"]
    # twice, from fewer samples, and in the other order
    for array in (x, x, x[:1], fastconv.to_channels_last(x)):
        assert_close(prepared(array), expected[: len(array)], n, magnitude=n**0.5)
    out = np.full(case.y, np.nan, np.float32)
    assert prepared(x, out=out) is out
    assert_close(out, expected, n, magnitude=n**0.5)
    assert prepared.nbytes >= w.nbytes or case.groups > 1


def test_prepared_convolution_keeps_its_own_weights():
    x, w, b = normal(0, (2, 8, 6, 6), (4, 8, 3, 3), (4,))
    prepared = prepare_conv(w, b, padding=1)
    before = prepared(x)
    w[...], b[...] = 0, 0
    np.testing.assert_array_equal(prepared(x), before)
    # also for layouts that it has not packed for yet
    assert_close(prepared(fastconv.to_channels_last(x)), before.astype(np.float64), 72)


def test_prepared_convolution_pads_by_mode():
    x, w = normal(0, (2, 8, 6, 6), (4, 8, 3, 3))
    prepared = prepare_conv(w, padding="same", padding_mode="circular")
    expected = functional.conv(x, w, padding="same", padding_mode="circular")
    np.testing.assert_array_equal(prepared(x), expected)


def test_prepared_convolution_serves_many_threads():
    w, b = normal(0, (16, 8, 3, 3), (16,))
    sizes = range(5, 25)
    inputs = [normal(size, (1, 8, size, size))[0] for size in sizes]
    inputs += [fastconv.to_channels_last(x) for x in inputs]
    alone = [prepare_conv(w, b, padding=1)(x) for x in inputs]
    prepared = prepare_conv(w, b, padding=1)
    start, wrong = threading.Barrier(8), []

    def work():
        start.wait()
        for x, expected in zip(inputs, alone, strict=True):
            if not np.array_equal(prepared(x), expected):
                wrong.append(x.shape)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("algorithm", ["direct", "im2col", "auto"])
def test_relu_passes_nan_on(algorithm):
    """max(NaN, 0) is NaN in NumPy and PyTorch, and not in C."""
    x, w = normal(0, (1, 16, 9, 20), (16, 16, 3, 3))
    x[0, 0, 4, 10] = np.nan
    x = fastconv.to_channels_last(x)
    y = prepare_conv(w, padding=1, activation="relu", algorithm=algorithm)(x)
    expected = np.zeros(y.shape, bool)
    expected[:, :, 3:6, 9:12] = True
    np.testing.assert_array_equal(np.isnan(y), expected)


# --------------------------------------------------------------------------------------------------
# Linear maps
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 12), (12,), (2, 3, 12), (0, 12), (1, 12), (33, 12)])
def test_linear_is_a_matrix_product(shape, dtype):
    x, w, b = normal(0, shape, (7, 12), (7,), dtype=dtype)
    exact_x, exact_w = x.astype(np.float64), w.astype(np.float64)
    y = functional.linear(x, w, b)
    assert y.dtype == dtype
    assert_close(y, exact_x @ exact_w.T + b, 13, magnitude=13**0.5)
    (dy,) = normal(1, y.shape, dtype=dtype)
    dx = functional.linear_input_grad(dy, w)
    assert_close(dx, dy.astype(np.float64) @ exact_w, 7, magnitude=7**0.5)
    dw = functional.linear_weight_grad(x, dy)
    expected = dy.reshape(-1, 7).astype(np.float64).T @ exact_x.reshape(-1, 12)
    rows = max(x.size // 12, 1)
    assert_close(dw, expected, rows, magnitude=rows**0.5)


def test_linear_takes_any_strides():
    x, w = normal(0, (24, 10), (14, 24))
    view, weight = x.T[::-2], w[::2, ::-2]
    y = functional.linear(view[:, ::2], weight)
    assert_close(y, view[:, ::2].astype(np.float64) @ weight.T.astype(np.float64), 12)
