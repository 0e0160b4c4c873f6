"""Losses against PyTorch, values and gradients, with every option."""

import itertools

import numpy as np
import pytest

from fastconv import nn
from fastconv.arrays import memory_order, to_channels_last
from fastconv.gradient_check import gradcheck

torch = pytest.importorskip("torch")
F = torch.nn.functional
REDUCTIONS = ("mean", "sum", "none")


def check(ours, function, x, *args, **kwargs):
    """Compare (loss, gradient) with PyTorch's function on the same arguments."""
    tensors = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in args]
    options = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    their_x = torch.tensor(np.ascontiguousarray(x), requires_grad=True)
    theirs = function(their_x, *tensors, **options)
    theirs.sum().backward()
    loss, grad = ours
    rtol = 1e-5 if x.dtype == np.float32 else 1e-12
    np.testing.assert_allclose(loss, theirs.detach().numpy(), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(grad, their_x.grad.numpy(), rtol=rtol, atol=rtol)
    assert grad.shape == x.shape
    assert grad.dtype == x.dtype
    assert isinstance(loss, float) or loss.dtype == x.dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 3, 5), (2, 4, 2, 3, 2), (4,), (3, 1), (3, 1, 2)])
def test_cross_entropy_with_classes(shape, reduction, dtype):
    rng = np.random.default_rng(0)
    x = (3 * rng.standard_normal(shape)).astype(dtype)
    classes = shape[0] if len(shape) == 1 else shape[1]
    target = rng.integers(0, classes, () if len(shape) == 1 else shape[:1] + shape[2:])
    weight = rng.uniform(0.2, 2, classes).astype(dtype)
    ignored = int(target.flat[0])
    for w, smoothing, ignore in itertools.product((None, weight), (0.0, 0.1, 1.0), (-100, ignored)):
        if ignore == ignored and (target == ignored).all() and reduction == "mean":
            continue  # see test_nothing_to_average
        options = {"weight": w, "label_smoothing": smoothing, "ignore_index": ignore, "reduction": reduction}
        check(nn.cross_entropy(x, target, **options), F.cross_entropy, x, np.asarray(target), **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3, 5), (4,)])
def test_cross_entropy_with_probabilities(shape, reduction):
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape)
    axis = 0 if len(shape) == 1 else 1
    target = rng.uniform(0, 1, shape)
    target /= target.sum(axis, keepdims=True)
    for w, smoothing in itertools.product((None, rng.uniform(0.2, 2, shape[axis])), (0.0, 0.2)):
        options = {"weight": w, "label_smoothing": smoothing, "reduction": reduction}
        check(nn.cross_entropy(x, target, **options), F.cross_entropy, x, target, **options)


def test_cross_entropy_with_ignored_unusual_classes():
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((5, 3)), np.array([0, 255, 2, 255, 1], np.uint8)
    loss, grad = nn.cross_entropy(x, target, ignore_index=255)
    check((loss, grad), F.cross_entropy, x, target.astype(np.int64), ignore_index=255)
    assert not grad[[1, 3]].any()


def test_ignored_positions_may_hold_nan():
    x = np.random.default_rng(0).standard_normal((3, 4))
    expected = nn.cross_entropy(x, np.array([1, -100, 2]))
    x[1] = np.nan
    loss, grad = nn.cross_entropy(x, np.array([1, -100, 2]))
    assert loss == expected[0]
    np.testing.assert_array_equal(grad, expected[1])


def test_nothing_to_average():
    x, target = np.ones((2, 3)), np.array([-100, -100])
    loss, grad = nn.cross_entropy(x, target)
    assert np.isnan(loss)
    assert np.isnan(F.cross_entropy(torch.tensor(x), torch.tensor(target)).item())
    assert not grad.any()
    loss, grad = nn.cross_entropy(np.ones((0, 3)), np.zeros(0, np.int64))
    assert np.isnan(loss)
    assert grad.shape == (0, 3)
    assert nn.cross_entropy(np.ones((0, 3)), np.zeros(0, np.int64), reduction="sum")[0] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cross_entropy_is_stable(dtype):
    x = np.array([[1e4, -1e4, 0], [-3e4, 0, 3e4], [500, 501, 499]], dtype)
    for target in ([0, 2, 1], [1, 0, 2]):
        check(nn.cross_entropy(x, np.array(target)), F.cross_entropy, x, np.array(target))


def test_cross_entropy_sums_in_float64():
    x = np.random.default_rng(0).standard_normal((200_000, 2)).astype(np.float32)
    loss, _ = nn.cross_entropy(x, np.zeros(len(x), np.int64), reduction="sum")
    exact = F.cross_entropy(torch.tensor(x).double(), torch.zeros(len(x), dtype=torch.int64), reduction="sum").item()
    assert loss == pytest.approx(exact, rel=2e-8)


def test_cross_entropy_keeps_the_memory_order():
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 4, 3, 5)), rng.integers(0, 4, (2, 3, 5))
    loss, grad = nn.cross_entropy(to_channels_last(x), target, label_smoothing=0.1)
    expected_loss, expected_grad = nn.cross_entropy(x, target, label_smoothing=0.1)
    assert loss == pytest.approx(expected_loss, rel=1e-14)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-12)
    assert memory_order(grad) == "channels_last"


def test_arguments_are_left_alone():
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((4, 3)), rng.uniform(0, 1, (4, 3))
    copies = x.copy(), target.copy()
    nn.cross_entropy(x, target, label_smoothing=0.1)
    nn.cross_entropy(x, target)
    nn.binary_cross_entropy_with_logits(x, target)
    nn.mse_loss(x, target)
    np.testing.assert_array_equal((x, target), copies)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_binary_cross_entropy(reduction, dtype):
    rng = np.random.default_rng(0)
    x, t = (4 * rng.standard_normal((5, 3, 2))).astype(dtype), rng.uniform(0, 1, (5, 3, 2)).astype(dtype)
    t[0] = 0
    t[1] = 1
    weights = (None, rng.uniform(0.2, 2, (5, 1, 1)).astype(dtype), rng.uniform(0.2, 2, (5, 3, 2)).astype(dtype))
    for weight, pos_weight in itertools.product(weights, (None, rng.uniform(0.5, 9, (3, 1)).astype(dtype))):
        options = {"weight": weight, "reduction": reduction, "pos_weight": pos_weight}
        check(nn.binary_cross_entropy_with_logits(x, t, **options), F.binary_cross_entropy_with_logits, x, t, **options)


def test_binary_cross_entropy_is_stable():
    x = np.array([-1e30, -500, -90, 0, 90, 500, 1e30], np.float32)
    for t in (np.zeros_like(x), np.ones_like(x)):
        check(nn.binary_cross_entropy_with_logits(x, t, reduction="none"), F.binary_cross_entropy_with_logits, x, t,
              reduction="none")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mse(reduction, dtype):
    x, t = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(dtype)
    check(nn.mse_loss(x, t, reduction=reduction), F.mse_loss, x, t, reduction=reduction)


@pytest.mark.parametrize("loss", [
    lambda x: nn.cross_entropy(x, np.array([0, 2, -100, 1]), np.array([0.5, 1, 2]), label_smoothing=0.2),
    lambda x: nn.binary_cross_entropy_with_logits(x, np.full((4, 3), 0.3), pos_weight=np.array([1.0, 2, 3])),
    lambda x: nn.mse_loss(x, np.full((4, 3), 0.3)),
])
def test_gradients_by_differences(loss):
    def function(x):
        value, grad = loss(x)
        return np.asarray(value), lambda dy: dy * grad

    gradcheck(function, np.random.default_rng(0).standard_normal((4, 3)))


X = np.zeros((4, 3))
BAD = [
    (nn.cross_entropy, (X, np.array([0, 1, 2, 3])), {}, ValueError, r"class 3, but logits have 3 classes"),
    (nn.cross_entropy, (X, np.array([0, -1, 2, 1])), {}, ValueError, r"class -1"),
    (nn.cross_entropy, (X, np.zeros((4, 1), int)), {}, ValueError, r"target has shape \(4, 1\).* \(4,\)"),
    (nn.cross_entropy, (X, np.zeros((3, 4))), {}, ValueError, r"target has shape \(3, 4\)"),
    (nn.cross_entropy, (X, np.zeros((4, 3), np.float32)), {}, TypeError, "target has dtype float32"),
    (nn.cross_entropy, (X, np.zeros(4, bool)), {}, TypeError, "target has dtype bool"),
    (nn.cross_entropy, (X.astype(int), np.zeros(4, int)), {}, TypeError, "logits has dtype int64"),
    (nn.cross_entropy, (X, np.zeros(4, int)), {"weight": np.ones(4)}, ValueError, r"weight has shape \(4,\)"),
    (nn.cross_entropy, (X, np.zeros(4, int)), {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
    (nn.cross_entropy, (X, np.zeros(4, int)), {"reduction": "avg"}, ValueError, "reduction is 'avg'"),
    (nn.cross_entropy, (np.ones(()), np.zeros((), int)), {}, ValueError, r"logits has shape \(\)"),
    (nn.binary_cross_entropy_with_logits, (X, np.zeros((4, 1))), {}, ValueError, r"target has shape \(4, 1\)"),
    (nn.binary_cross_entropy_with_logits, (X, np.zeros((4, 3), int)), {}, TypeError, "target has dtype int64"),
    (nn.binary_cross_entropy_with_logits, (X, X), {"pos_weight": np.ones(4)}, ValueError, "does not broadcast"),
    (nn.binary_cross_entropy_with_logits, (X, X), {"reduction": None}, ValueError, "reduction is None"),
    (nn.mse_loss, (X, X[:1]), {}, ValueError, r"target has shape \(1, 3\)"),
    (nn.mse_loss, (X, X.astype(np.float32)), {}, TypeError, "target has dtype float32"),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "error", "message"), BAD)
def test_bad_arguments(function, args, kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        function(*args, **kwargs)
    assert "Hint: " in str(caught.value)
