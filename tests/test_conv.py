"""The public convolutions: padding by name and mode, single samples, repeated calls, linear maps.

What the kernels compute is in test_matrix_conv; that PyTorch's calls work in test_opinfo.
"""

import itertools

import numpy as np
import pytest
from cases import CONVS
from tolerance import assert_close

import fastconv
from fastconv import functional
from fastconv.arrays import memory_order
from fastconv.backends import _cpu, cpu, lattice, reference
from fastconv.plan import plan_for
from fastconv.problem import conv_problem

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
    with pytest.raises(ValueError, match=r"algorithm is 'channelwise'.*80"):
        functional.conv(x.repeat(10, 1), w.repeat(10, 1), algorithm="channelwise")
    wide = np.zeros((1, 8, 1, 400_000), np.float32)
    with (
        fastconv.config(algorithm="direct"),
        pytest.raises(ValueError, match=r"algorithm is 'direct'.*MiB, more than 8"),
    ):
        functional.conv(wide, w[:, :, :1], dilation=180_000)


def test_the_call_overrides_the_setting():
    x, w = normal(0, (1, 8, 9, 9), (4, 8, 3, 3))
    with fastconv.config(algorithm="reference"):
        assert fastconv.explain(x, w).algorithm == "reference"
        assert fastconv.explain(x, w, algorithm="im2col").algorithm == "im2col"


# --------------------------------------------------------------------------------------------------
# Repeated calls, which are recognised by their layouts and options
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("batch", [2, None])
def test_a_repeated_call_computes_again(order, batch):
    w, b = normal(0, (16, 6, 3, 3), (16,))
    for seed in range(3):
        (x,) = normal(seed, (batch or 1, 6, 10, 12))
        if order == "channels_last":
            x = fastconv.to_channels_last(x)
        elif order == "sliced":
            x = np.repeat(x, 2, axis=3)[..., ::2]
        y = functional.conv2d(x if batch else x[0], w, b, padding=1)
        padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        expected = np.einsum("nchwij,kcij->nkhw", windows, w.astype(np.float64)) + b[:, None, None]
        assert_close(y, expected if batch else expected[0], 54)
        if batch:
            assert memory_order(y) == memory_order(x)


def test_a_repeated_call_checks_what_is_new():
    """After a call that was right, wrong ones with equal, or equally hashed, arguments are still refused."""
    x, w, b = normal(0, (1, 8, 6, 6), (8, 8, 3, 3), (8,))
    for _ in range(2):
        functional.conv2d(x, w, b, 1, 1)
    for wrong in ((1.0, 1), (True, 1), (1, 1.0), (np.float64(1), 1)):
        with pytest.raises(TypeError, match="integer is needed"):
            functional.conv2d(x, w, b, *wrong)
    for arrays in ((x.astype(">f4"), w, b), (x, w.astype(np.float64), b), (x, w, b.astype(np.float64)),
                   (x.astype(np.int32), w, b), (x.view(np.int32), w, b), (x, w.tolist(), b)):
        with pytest.raises(TypeError):
            functional.conv2d(*arrays, 1, 1)
    unaligned = np.frombuffer(b"\0" * (x.nbytes + 1), np.uint8)[1:].view(np.float32).reshape(x.shape)
    with pytest.raises(ValueError, match="aligned"):
        functional.conv2d(unaligned, w, b, 1, 1)
    with pytest.raises(ValueError, match="bias"):
        functional.conv2d(x, w, b[:4], 1, 1)
    with pytest.raises(ValueError, match="axes"):
        functional.conv1d(x, w, b, 1, 1)
    for same in ((np.int64(1), 1), ([1, 1], [1, 1]), ((1, 1), ((1, 1), (1, 1)))):
        np.testing.assert_array_equal(functional.conv2d(x, w, b, *same), functional.conv2d(x, w, b, 1, 1))


def test_a_repeated_call_obeys_the_settings():
    x, w = normal(0, (1, 64, 24, 24), (64, 64, 3, 3))
    with fastconv.config(exact=False):
        fast = [functional.conv2d(x, w, padding=1) for _ in range(2)]
    plain = [functional.conv2d(x, w, padding=1) for _ in range(2)]
    with fastconv.config(exact=False):
        again = functional.conv2d(x, w, padding=1)
    assert not np.array_equal(fast[0], plain[0])
    for a, b in ((fast[0], fast[1]), (fast[0], again), (plain[0], plain[1])):
        np.testing.assert_array_equal(a, b)


def test_a_repeated_call_meets_nan():
    """Winograd refuses data that are not finite when it sees them; the next call may bring some."""
    x, w = normal(0, (1, 64, 24, 24), (64, 64, 3, 3))
    with fastconv.config(exact=False):
        assert fastconv.explain(x, w, padding=1).algorithm == "winograd"
        functional.conv2d(x, w, padding=1)
        x[0, 5, 12, 12] = np.nan
        y = functional.conv2d(x, w, padding=1)
    expected = np.zeros(y.shape, bool)
    expected[:, :, 11:14, 11:14] = True
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


@pytest.mark.parametrize(("x_shape", "w_shape", "stride", "padding"), [
    ((2, 1, 50), (5, 1, 8), 4, 3),
    ((1, 1, 37), (130, 1, 4), 2, 0),
    ((3, 1, 24), (2, 1, 3), 3, 2),
    ((2, 1, 9, 31), (4, 1, 3, 6), (2, 3), (1, 4)),
    ((1, 1, 5, 6, 23), (7, 1, 2, 1, 4), (2, 1, 4), (0, 2, 1)),
])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_of_one_channel_whose_phases_are_channels(x_shape, w_shape, stride, padding, dtype):
    x, w = normal(1, x_shape, w_shape, dtype=dtype)
    problem = conv_problem(x, w, stride=stride, padding=padding)
    assert lattice.interleaved_input_grad(problem)
    dy, bias = normal(2, problem.y_shape, (1,), dtype=dtype)
    for b in (None, bias):
        expected = reference.conv_input_grad(problem, dy, w) + (0 if b is None else b)
        out = np.full(x_shape, np.nan, dtype)
        cpu.conv_input_grad(problem, dy, w, bias=b, out=out, algorithm="direct")
        assert_close(out, expected, w.size)


@pytest.mark.parametrize("op", PASSES)
def test_the_choice_does_not_depend_on_the_threads(op):
    with fastconv.config(exact=False):
        for channels in (64, 128, 192, 256):
            for size in (14, 28, 35, 56):
                x, w = np.zeros((1, channels, size, size), np.float32), np.zeros((channels, channels, 3, 3), np.float32)
                problem = conv_problem(fastconv.to_channels_last(x), w, stride=2, padding=1)
                chosen = set()
                for threads in (1, 2, 4, 16, 64):
                    with fastconv.config(threads=threads):
                        plan = plan_for(problem, op)
                        chosen.add((plan.algorithm, plan.variant))
                assert len(chosen) == 1, (channels, size, chosen)


# --------------------------------------------------------------------------------------------------
# Lanes of pixels, and what threads get
# --------------------------------------------------------------------------------------------------


def reference_conv(*args):
    with fastconv.config(algorithm="reference"):
        return functional.conv(*args)


def surrounded(x):
    """The values of x in rows with a NaN behind each."""
    wide = np.full((*x.shape[:-1], x.shape[-1] + 1), np.nan, x.dtype)
    wide[..., :-1] = x
    return wide[..., :-1]


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("stride", [1, 2])
def test_few_inputs_are_copied_for_lanes_of_pixels(isa, stride):
    """Tiles of a row go to the output at once, where vectors fit; panels of output channels are of even height."""
    for width, channels, out_channels in itertools.product((15, 16, 31, 33, 48, 50), (1, 3), (1, 7, 13, 15, 29)):
        x, w, b = normal(width, (2, channels, 7, width), (out_channels, channels, 3, 3), (out_channels,))
        expected = reference_conv(x, w, b, stride, 1)
        out = np.full(expected.shape, np.nan, np.float32)
        with fastconv.config(isa=isa, algorithm="direct"):
            functional.conv(surrounded(x), w, b, stride, 1, out=out)
        assert_close(out, expected, 9 * channels)


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("size", [(5,), (33,), (4, 9), (6, 16), (7, 31), (3, 5, 7)])
def test_phases_of_one_tap_read_their_inputs_in_place(isa, size):
    """Nothing is copied if rows lie side by side; the last tile overlaps the one before."""
    x, b = normal(0, (2, 5, *size), (6,))
    w = normal(1, (5, 6) + (2,) * len(size))[0]
    with fastconv.config(algorithm="reference"):
        expected = functional.conv_transpose(x, w, b, 2)
    for given in (x, surrounded(x)):
        out = np.full(expected.shape, np.nan, np.float32)
        with fastconv.config(isa=isa):
            functional.conv_transpose(given, w, b, 2, out=out)
        assert_close(out, expected, 5)


@pytest.mark.parametrize(("threads", "order"), [(2, "contiguous"), (2, "channels_last"), (4, "channels_last")])
@pytest.mark.parametrize("pixels", [28, 56, 100, 112])
def test_threads_get_as_many_tasks(pixels, threads, order):
    """13 tasks would be 7 for one of two threads."""
    x, w = normal(0, (1, 64, pixels, pixels), (96, 64, 1, 1))
    if order == "channels_last":
        x = fastconv.to_channels_last(x)
    with fastconv.config(threads=threads):
        assert plan_for(conv_problem(x, w), "conv").engine.tasks % threads == 0
