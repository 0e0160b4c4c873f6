"""Every layer against the PyTorch layer of the same name: same arguments, same weights by state_dict, same results."""

import numpy as np
import pytest
from tolerance import assert_close

from fastconv import config, nn
from fastconv.arrays import to_channels_last

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def exact():
    """Winograd has a bound of its own, tested with the kernels; here layers are held to that of plain sums."""
    with config(exact=True):
        yield


SIZES = {1: (11,), 2: (9, 8), 3: (6, 7, 5)}


def layers(ndim):
    """(class, arguments, keywords) that mean the same in both libraries; inputs are (3, 4, *SIZES[ndim])."""
    d = f"{ndim}d"
    return [
        (f"Conv{d}", (4, 6, 3), {}),
        (f"Conv{d}", (4, 6, 3, 2, 1, 1, 2, False), {}),
        (f"Conv{d}", (4, 8, 2), {"padding": 1, "dilation": 2, "groups": 4}),
        (f"Conv{d}", (4, 2, 3), {"padding": "same", "dilation": 2}),
        (f"Conv{d}", (4, 2, 4), {"padding": "same"}),
        (f"Conv{d}", (4, 2, 3), {"padding": "valid"}),
        *((f"Conv{d}", (4, 2, 3), {"padding": 2, "padding_mode": mode})
          for mode in ("reflect", "replicate", "circular")),
        (f"ConvTranspose{d}", (4, 6, 3), {}),
        (f"ConvTranspose{d}", (4, 6, 3, 2, 1, 1, 2, False), {}),
        (f"ConvTranspose{d}", (4, 6, 2), {"dilation": 2, "padding": 1}),
        (f"MaxPool{d}", (2,), {}),
        (f"MaxPool{d}", (3, 2, 1), {"ceil_mode": True}),
        (f"MaxPool{d}", (2,), {"stride": 1, "dilation": 2}),
        (f"AvgPool{d}", (2,), {}),
        (f"AvgPool{d}", (3, 2, 1), {"ceil_mode": True}),
        (f"AvgPool{d}", (3, 2, 1), {"count_include_pad": False}),
        (f"LPPool{d}", (2, 3), {"stride": 2}),
        (f"AdaptiveAvgPool{d}", (3,), {}),
        (f"AdaptiveMaxPool{d}", (3,), {}),
        (f"BatchNorm{d}", (4,), {}),
        (f"BatchNorm{d}", (4, 1e-3, None), {}),
        (f"BatchNorm{d}", (4,), {"affine": False, "momentum": 0.3}),
        (f"BatchNorm{d}", (4,), {"track_running_stats": False}),
    ]


OTHERS = [
    ("Linear", (8, 5), {}), ("Linear", (8, 5, False), {}), ("ReLU", (), {}), ("LeakyReLU", (), {}),
    ("LeakyReLU", (0.3,), {}), ("Sigmoid", (), {}), ("Tanh", (), {}), ("Softmax", (1,), {}), ("Softmax", (-1,), {}),
    ("Flatten", (), {}), ("Flatten", (2,), {}), ("Flatten", (0, 2), {}), ("Identity", (), {}),
    ("LocalResponseNorm", (3,), {}), ("LocalResponseNorm", (4, 0.5, 0.6, 2.0), {}),
]
CASES = [pytest.param(ndim, *case, id=f"{case[0]}-{i}") for ndim in SIZES for i, case in enumerate(layers(ndim))]
CASES += [pytest.param(2, *case, id=f"{case[0]}-{i}") for i, case in enumerate(OTHERS)]


def pair(name, args, kwargs, dtype):
    """The layer in both libraries, with PyTorch's weights in both."""
    theirs = getattr(torch.nn, name)(*args, **kwargs).to(getattr(torch, dtype))
    has_state = hasattr(theirs, "weight") or hasattr(theirs, "running_mean")
    ours = getattr(nn, name)(*args, **kwargs, **({"dtype": np.dtype(dtype)} if has_state else {}))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def reduction(ours, x):
    """Length of the longest sum in the layer: over the weights, or over all positions, of batch and space."""
    if isinstance(ours, (nn.Identity, nn.Flatten, nn.ReLU)):
        return 1
    return max(x.size // x.shape[1], *(p.value.size for p in ours.parameters()), 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("ndim", "name", "args", "kwargs"), CASES)
def test_values_and_gradients(ndim, name, args, kwargs, dtype):
    torch.manual_seed(0)
    ours, theirs = pair(name, args, kwargs, dtype)
    rng = np.random.default_rng(0)
    shape = (3, 4, *SIZES[ndim])
    # distinct positive values: no ties for max pools, and powers have real roots
    x = ((rng.permutation(int(np.prod(shape))) + 1) / np.prod(shape)).reshape(shape).astype(dtype)
    if not name.startswith("LPPool"):
        x -= np.asarray(0.5, dtype)
    if len(shape) > 3 or "norm" in name.lower():
        x = to_channels_last(x)
    for _ in range(2):  # the second pass sees running statistics that the first one moved, and adds to gradients
        y, backward = ours.forward(x)
        their_x = torch.tensor(np.ascontiguousarray(x), requires_grad=True)
        their_y = theirs(their_x)
        dy = rng.standard_normal(y.shape).astype(dtype)
        their_y.backward(torch.tensor(dy))
        dx = backward(dy)
        n = reduction(ours, x)
        assert_close(y, their_y.detach().numpy(), n)
        assert_close(dx, their_x.grad.numpy(), n)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(ours_p.grad, theirs_p.grad.numpy(), n)
    theirs.eval()
    assert_close(ours(x), theirs(torch.tensor(np.ascontiguousarray(x))).detach().numpy(), n)
    state = theirs.state_dict()
    mine = ours.state_dict()
    assert list(mine) == list(state)
    for key, value in mine.items():
        assert value.dtype == state[key].numpy().dtype
        np.testing.assert_allclose(value, state[key].numpy(), rtol=2e-6 if dtype == "float32" else 1e-14, atol=1e-7)


@pytest.mark.parametrize("ndim", SIZES)
def test_unbatched_convolutions(ndim):
    for name in ("Conv", "ConvTranspose"):
        ours, theirs = pair(f"{name}{ndim}d", (4, 6, 3), {"stride": 2}, "float64")
        x = np.random.default_rng(0).standard_normal((4, *SIZES[ndim]))
        their_x = torch.tensor(x, requires_grad=True)
        their_y = theirs(their_x)
        y, backward = ours.forward(x)
        dy = np.random.default_rng(1).standard_normal(y.shape)
        their_y.backward(torch.tensor(dy))
        dx = backward(dy)
        np.testing.assert_allclose(y, their_y.detach().numpy(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(dx, their_x.grad.numpy(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(ours.bias.grad, theirs.bias.grad.numpy(), rtol=1e-10)
        np.testing.assert_allclose(ours.weight.grad, theirs.weight.grad.numpy(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(ours(x), y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ndim", SIZES)
def test_max_unpool(ndim):
    x = np.random.default_rng(0).standard_normal((2, 3, *(8,) * ndim))
    their_x = torch.tensor(x, requires_grad=True)
    pooled, indices = getattr(torch.nn, f"MaxPool{ndim}d")(2, return_indices=True)(their_x)
    expected = getattr(torch.nn, f"MaxUnpool{ndim}d")(2)(pooled, indices)
    net = nn.Sequential(nn.MAX_POOL[ndim](2, return_indices=True), getattr(nn, f"MaxUnpool{ndim}d")(2))
    y, backward = net.forward(x)
    dy = np.random.default_rng(1).standard_normal(y.shape)
    expected.backward(torch.tensor(dy))
    np.testing.assert_array_equal(y, expected.detach().numpy())
    np.testing.assert_array_equal(backward(dy), their_x.grad.numpy())
    np.testing.assert_array_equal(net[0](x)[1], indices.numpy())


def test_extreme_inputs_of_activations():
    x = np.array([-np.inf, -1e30, -200, -88.5, -1e-30, -0.0, 0.0, 1e-30, 1, 89, 200, 1e30, np.inf, np.nan], np.float32)
    for name in ("ReLU", "LeakyReLU", "Sigmoid", "Tanh"):
        their_x = torch.tensor(x, requires_grad=True)
        their_y = getattr(torch.nn, name)()(their_x)
        their_y.backward(torch.ones(len(x)))
        y, backward = getattr(nn, name)().forward(x)
        np.testing.assert_allclose(y, their_y.detach().numpy(), rtol=3e-7, atol=1e-38, err_msg=name)
        np.testing.assert_allclose(backward(np.ones_like(x)), their_x.grad.numpy(), rtol=1e-6, atol=1e-37, err_msg=name)


def test_extreme_inputs_of_softmax():
    x = np.array([[1e30, -1e30, 0], [-200, -201, -1e30], [3e4, 3e4, 3e4]], np.float32)
    np.testing.assert_allclose(nn.Softmax(1)(x), torch.softmax(torch.tensor(x), 1).numpy(), rtol=1e-6)
    assert np.isnan(nn.Softmax(1)(np.array([[1, np.nan]], np.float32))).all()


def test_relu_blocks_infinite_gradients():
    _, backward = nn.ReLU().forward(np.array([-1.0, 0.0, 2.0]))
    np.testing.assert_array_equal(backward(np.array([np.inf, np.nan, np.inf])), [0, 0, np.inf])


def test_frozen_batch_norm_is_pytorchs_eval_mode_with_gradients():
    ours, theirs = pair("BatchNorm2d", (4,), {}, "float64")
    rng = np.random.default_rng(0)
    ours.running_mean.assign(rng.standard_normal(4))
    ours.running_var.assign(rng.uniform(0.5, 2, 4))
    theirs.load_state_dict({key: torch.tensor(value) for key, value in ours.state_dict().items()})
    ours.frozen = True
    theirs.eval()
    x, dy = rng.standard_normal((2, 2, 4, 3, 3))
    their_x = torch.tensor(x, requires_grad=True)
    theirs(their_x).backward(torch.tensor(dy))
    y, backward = ours.forward(x)
    np.testing.assert_allclose(backward(dy), their_x.grad.numpy(), rtol=1e-12)
    np.testing.assert_allclose(ours.weight.grad, theirs.weight.grad.numpy(), rtol=1e-12)
    np.testing.assert_array_equal(y, ours(x))
    assert ours.num_batches_tracked.value == 0


def test_a_network_trains_alike():
    """Three steps of a small network with a residual block: the same losses and weights as PyTorch in float64."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = torch.nn.Sequential(torch.nn.Conv2d(5, 5, 3, padding=1), torch.nn.BatchNorm2d(5))

        def forward(self, x):
            return torch.relu(self.branch(x) + x)

    torch.manual_seed(0)
    theirs = torch.nn.Sequential(torch.nn.Conv2d(2, 5, 3), Block(), torch.nn.AvgPool2d(2), torch.nn.Flatten(),
                                 torch.nn.Linear(45, 4)).double()
    f64 = {"dtype": np.float64}
    branch = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1, **f64), nn.BatchNorm2d(5, **f64))
    block = nn.Residual(branch, activation=nn.ReLU())
    ours = nn.Sequential(nn.Conv2d(2, 5, 3, **f64), block, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, 4, **f64))
    ours.load_state_dict(theirs.state_dict())
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    rng = np.random.default_rng(0)
    for _ in range(3):
        x, labels = rng.standard_normal((6, 2, 8, 8)), rng.integers(0, 4, 6)
        loss = torch.nn.functional.cross_entropy(theirs(torch.tensor(x)), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logits, backward = ours.forward(x)
        our_loss, dlogits = nn.cross_entropy(logits, labels)
        ours.zero_grad()
        backward(dlogits)
        for parameter in ours.parameters():
            with parameter.write() as value:
                value -= 0.1 * parameter.grad
        assert our_loss == pytest.approx(loss.item(), rel=1e-10)
    for name, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[name], value.numpy(), rtol=1e-8, atol=1e-10, err_msg=name)
