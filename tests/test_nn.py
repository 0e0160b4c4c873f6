"""Parameters, state, files, copies, threads, combinators: what layers promise beside their arithmetic."""

import copy
import gc
import os
import pickle
import threading
import weakref

import numpy as np
import pytest

import fastconv
from fastconv import nn
from fastconv.arrays import memory_order, to_channels_last
from fastconv.functional import conv2d
from fastconv.serialize import load_arrays, save_arrays

F64 = {"dtype": np.float64, "rng": 0}


def normal(*shape, dtype=np.float64):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def network(rng=0, dtype=np.float64):
    options = {"dtype": dtype, "rng": rng}
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False, **options)
    branch = nn.Sequential(conv, nn.BatchNorm2d(4, dtype=dtype), nn.ReLU())
    return nn.Sequential(stem=nn.Conv2d(3, 4, 3, **options), block=nn.Residual(branch, activation=nn.ReLU()),
                         drop=nn.Dropout2d(0.5, rng=1), pool=nn.GlobalAvgPool(), flatten=nn.Flatten(),
                         head=nn.Linear(4, 2, **options))


# ---- Parameter -----------------------------------------------------------------------------------------------------

def test_value_is_read_only_and_live():
    p = nn.Parameter(np.ones(3))
    value = p.value
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 2
    with pytest.raises(ValueError, match="read-only"):
        p.value += 1
    p.assign([1, 2, 3])
    np.testing.assert_array_equal(value, [1, 2, 3])


def test_a_parameter_owns_its_array():
    source = np.ones(3)
    p = nn.Parameter(source)
    source[0] = 5
    np.testing.assert_array_equal(p.value, np.ones(3))


def test_writing_bumps_the_version():
    p = nn.Parameter(np.ones(3))
    versions = [p.version]
    with p.write() as value:
        value[0] = 7
        versions.append(p.version)
    versions.append(p.version)
    p.assign(np.zeros(3))
    versions.append(p.version)
    assert versions == sorted(set(versions))
    with pytest.raises(ValueError, match="read-only"):
        value[1] = 7
    with pytest.raises(IndexError), p.write() as value:
        value[[0, 3]] = 8
    assert p.version > versions[-1]
    np.testing.assert_array_equal(p.value, np.zeros(3))
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 7


def test_assign_checks_shape_and_kind():
    p = nn.Parameter(np.ones(3, np.float32))
    p.assign(np.arange(3.0))
    assert p.dtype == np.float32
    with pytest.raises(ValueError, match=r"array has shape \(2,\), but the value has shape \(3,\)"):
        p.assign(np.ones(2))
    with pytest.raises(TypeError):
        p.assign(np.ones(3, complex))
    with pytest.raises(TypeError, match="float32 or float64"):
        nn.Parameter(np.ones(3, int))


def test_gradients_add_up():
    layer = nn.Conv2d(2, 3, 3, **F64)
    x = normal(2, 2, 5, 5)
    y, backward = layer.forward(x)
    backward(np.ones_like(y))
    once = layer.weight.grad.copy()
    backward(np.ones_like(y))
    np.testing.assert_allclose(layer.weight.grad, 2 * once)
    layer.zero_grad()
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_two_pending_passes_do_not_disturb_each_other():
    net = nn.Sequential(nn.Conv2d(2, 3, 3, **F64), nn.Tanh(), nn.MaxPool2d(2))
    a, b = normal(2, 2, 2, 6, 6)
    dy = normal(2, 3, 2, 2)
    _, backward_a = net.forward(a)
    _, backward_b = net.forward(b)
    da = backward_a(dy)
    grad_a = net[0].weight.grad.copy()
    net.zero_grad()
    db = backward_b(dy)
    for x, dx, grad in ((a, da, grad_a), (b, db, net[0].weight.grad)):
        other = nn.Sequential(nn.Conv2d(2, 3, 3, **F64), nn.Tanh(), nn.MaxPool2d(2))
        _, backward = other.forward(x)
        np.testing.assert_array_equal(backward(dy), dx)
        np.testing.assert_array_equal(other[0].weight.grad, grad)


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 3, 3, **F64), nn.ConvTranspose2d(2, 3, 3, **F64),
                                   nn.Linear(6, 3, **F64), nn.BatchNorm2d(2, dtype=np.float64)])
def test_weights_written_before_backward_are_noticed(layer):
    y, backward = layer.forward(normal(2, 2, 6, 6))
    with layer.weight.write() as value:
        value *= 2
    with pytest.raises(RuntimeError, match="weight was written after the forward pass"):
        backward(np.ones_like(y))


def test_frozen_parameters_have_no_gradient():
    net = network().requires_grad_(False)
    net["head"].requires_grad_(True)
    y, backward = net.forward(normal(2, 3, 6, 6))
    dx = backward(np.ones_like(y))
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert dx.shape == (2, 3, 6, 6)
    assert net.num_parameters() == 10


# ---- State ---------------------------------------------------------------------------------------------------------

def test_names_are_pytorchs():
    assert list(network().state_dict()) == [
        "stem.weight", "stem.bias", "block.branch.0.weight", "block.branch.1.weight", "block.branch.1.bias",
        "block.branch.1.running_mean", "block.branch.1.running_var", "block.branch.1.num_batches_tracked",
        "head.weight", "head.bias"]
    assert [name for name, _ in network().named_buffers()] == [
        "block.branch.1.running_mean", "block.branch.1.running_var", "block.branch.1.num_batches_tracked"]
    assert [name for name, _ in network().named_layers()][:4] == ["", "stem", "block", "block.branch"]


def test_state_dict_is_a_snapshot():
    net = network()
    state = net.state_dict()
    before = {name: value.copy() for name, value in state.items()}
    net.forward(normal(2, 3, 6, 6))
    with net["stem"].weight.write() as value:
        value += 1
    assert all(np.array_equal(state[name], before[name]) for name in state)


def test_loading_reproduces_inference_exactly():
    net, other = network(0), network(1)
    net.forward(normal(2, 3, 6, 6))
    x = normal(2, 3, 6, 6)
    assert not np.array_equal(net(x), other(x))
    assert other.load_state_dict(net.state_dict()) == ([], [], [])
    np.testing.assert_array_equal(net(x), other(x))


def test_strict_loading_names_everything_and_changes_nothing():
    net = network()
    before = net.state_dict()
    state = {**net.state_dict(), "extra": np.ones(3), "head.bias": np.ones(3), "stem.weight": 0 * before["stem.weight"]}
    del state["stem.bias"]
    with pytest.raises(ValueError, match=r"missing \(1\): stem\.bias\nunexpected \(1\): extra\nmismatched \(1\): "
                                         r"head\.bias has shape \(3,\) and dtype float64, but \(2,\) and float64"):
        net.load_state_dict(state)
    assert all(np.array_equal(before[name], value) for name, value in net.state_dict().items())
    report = net.load_state_dict(state, strict=False)
    assert (report.missing, report.unexpected) == (["stem.bias"], ["extra"])
    assert len(report.mismatched) == 1
    assert not net.state_dict()["stem.weight"].any()
    np.testing.assert_array_equal(net.state_dict()["head.bias"], before["head.bias"])


def test_loading_converts_floats_but_not_kinds():
    layer = nn.Linear(2, 1)
    layer.load_state_dict({"weight": np.array([[1, 2]], np.float16), "bias": np.array([3])})
    np.testing.assert_array_equal(layer.weight.value, [[1, 2]])
    assert layer.weight.dtype == np.float32
    with pytest.raises(ValueError, match="complex"):
        layer.load_state_dict({"weight": np.ones((1, 2), complex), "bias": np.ones(1)})
    with pytest.raises(TypeError, match="weight is a dict"):
        layer.load_state_dict({"weight": {}, "bias": np.ones(1)})


def test_loading_torch_tensors():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Linear(3, 2)
    ours = nn.Linear(3, 2)
    ours.load_state_dict(dict(theirs.named_parameters()))  # these require gradients
    np.testing.assert_array_equal(ours.weight.value, theirs.weight.detach().numpy())
    with pytest.raises(TypeError, match=r"weight is a torch\.Tensor that NumPy cannot read"):
        ours.load_state_dict(theirs.bfloat16().state_dict())


def test_shared_layers_count_once():
    layer = nn.Linear(3, 3)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    assert net.num_parameters() == 12
    assert len(net.parameters()) == 2
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    net.load_state_dict(net.state_dict())


# ---- Files ---------------------------------------------------------------------------------------------------------

def test_files(tmp_path):
    net, other = network(0), network(1)
    net.save(tmp_path / "net.safetensors")
    assert other.load(tmp_path / "net.safetensors") == ([], [], [])
    x = normal(2, 3, 6, 6)
    np.testing.assert_array_equal(net(x), other(x))
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_files_of_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    safetensors.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours.load(tmp_path / "theirs.safetensors")
    np.testing.assert_array_equal(ours[0].weight.value, theirs[0].weight.detach().numpy())
    ours.save(tmp_path / "ours.safetensors")
    theirs.load_state_dict(safetensors.load_file(tmp_path / "ours.safetensors"))


def test_arrays_of_any_strides_are_stored(tmp_path):
    arrays = {"a": normal(4, 6)[::2, ::-1], "b": np.array(5), "c": normal(3, 4).T, "d": np.zeros((0, 2), np.float32)}
    save_arrays(tmp_path / "x.safetensors", arrays, {"note": "text"})
    loaded = load_arrays(tmp_path / "x.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].shape == array.shape
        assert loaded[name].dtype == array.dtype


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    net = network()
    path = tmp_path / "net.safetensors"
    net.save(path)
    content = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        network(1).save(path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_bad_files(tmp_path):
    path = tmp_path / "bad.safetensors"
    with pytest.raises(FileNotFoundError):
        network().load(path)
    path.write_bytes(b"this is no such file")
    with pytest.raises(ValueError, match=r"bad\.safetensors cannot be read as a safetensors file"):
        network().load(path)


# ---- Copies, memory, threads ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_independent(duplicate):
    net, x = network(), normal(2, 3, 6, 6)
    expected = net(x)
    other = duplicate(net)
    np.testing.assert_array_equal(other(x), expected)
    with other["stem"].weight.write() as value:
        value += 1
    with pytest.raises(ValueError, match="read-only"):
        other["stem"].weight.value[0] = 1
    np.testing.assert_array_equal(net(x), expected)
    assert not np.array_equal(other(x), expected)
    # the copied generator of the dropout layer goes on as the original does
    np.testing.assert_array_equal(net["drop"].forward(x)[0], other["drop"].forward(x)[0])


@pytest.fixture
def exact():
    """Winograd may be worth it for weights that are packed once, and not for others: the bits would differ."""
    with fastconv.config(exact=True):
        yield


@pytest.mark.usefixtures("exact")
def test_inference_sees_every_write():
    layer, x = nn.Conv2d(3, 4, 3, **F64), normal(2, 3, 6, 6)
    for change in range(3):
        np.testing.assert_array_equal(layer(x), conv2d(x, layer.weight.value, layer.bias.value))
        with (layer.weight if change < 2 else layer.bias).write() as value:
            value += 1
    np.testing.assert_array_equal(layer(x), conv2d(x, layer.weight.value, layer.bias.value))
    layer.weight.assign(np.zeros(layer.weight.shape))
    np.testing.assert_array_equal(layer(x), np.broadcast_to(layer.bias.value[:, None, None], (2, 4, 4, 4)))


@pytest.mark.usefixtures("exact")
def test_inference_inside_a_write_is_not_kept():
    layer, x = nn.Conv2d(3, 4, 3, **F64), normal(2, 3, 6, 6)
    with layer.weight.write() as value:
        layer(x)
        value *= 2
    np.testing.assert_array_equal(layer(x), conv2d(x, layer.weight.value, layer.bias.value))


def test_one_network_serves_many_threads():
    net = network(dtype=np.float32)
    inputs = [normal(2, 3, 8, 8, dtype=np.float32) * (i + 1) for i in range(8)]
    expected = [network(dtype=np.float32)(x) for x in inputs]
    results = [None] * len(inputs)
    start = threading.Barrier(len(inputs))

    def work(index):
        start.wait()
        for _ in range(20):
            results[index] = net(inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, right)


def test_dropping_backward_frees_the_activations_at_once():
    class Probe(nn.Leaf):
        def forward(self, x):
            y = x + 1
            alive.append(weakref.ref(y))
            return y, lambda dy: dy

    alive = []
    net = nn.Sequential(Probe(), network(), nn.Identity())
    gc.collect()
    gc.disable()
    try:
        y, backward = net.forward(normal(2, 3, 6, 6))
        assert alive[0]() is not None
        backward(np.ones_like(y))
        del y, backward
        assert alive[0]() is None
    finally:
        gc.enable()


# ---- Combinators ---------------------------------------------------------------------------------------------------

def test_sequential_is_a_sequence():
    a, b, c = nn.ReLU(), nn.Tanh(), nn.Sigmoid()
    net = nn.Sequential(a, {"squash": b}, last=c)
    assert len(net) == 3
    assert list(net) == [a, b, c]
    assert (net[0], net[-1], net["squash"], net["last"]) == (a, c, b, c)
    assert list(net[1:]) == [b, c]
    assert [name for name, _ in net[1:].children()] == ["squash", "last"]
    x = normal(2, 3)
    np.testing.assert_array_equal(net[:2](x), np.tanh(np.maximum(x, 0)))


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: nn.Sequential(nn.ReLU), TypeError, "0 is a type, but a Layer is needed"),
    (lambda: nn.Sequential({"a.b": nn.ReLU()}), ValueError, "called 'a.b'"),
    (lambda: nn.Concat({"": nn.ReLU()}), ValueError, "called ''"),
    (lambda: nn.Branches(nn.ReLU(), nn.ReLU())((np.ones(2),)), ValueError, "tuple of 1, but there are 2"),
    (lambda: nn.Branches(nn.ReLU()).forward(np.ones(2))[1]((1, 2)), ValueError, "got 2 gradients"),
    (lambda: nn.Residual(nn.Linear(3, 2))(np.ones((1, 3), np.float32)), ValueError, r"branch gives shape \(1, 2\)"),
    (lambda: nn.Concat(nn.Identity(), nn.MaxPool2d(2))(np.ones((1, 2, 4, 4))), ValueError, "all axes other"),
])
def test_combinators_check(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "Hint: " in str(caught.value)


def test_branches_without_a_gradient_are_skipped():
    heads = nn.Branches(main=nn.Linear(4, 2, **F64), aux=nn.Linear(4, 3, **F64))
    x, dy = normal(5, 4), normal(5, 2)
    (main, aux), backward = heads.forward(x)
    assert (main.shape, aux.shape) == ((5, 2), (5, 3))
    np.testing.assert_allclose(backward((dy, None)), dy @ heads.state_dict()["main.weight"])
    assert {name for name, p in heads.named_parameters() if p.grad is not None} == {"main.weight", "main.bias"}
    assert backward((None, None)) is None


def test_branches_do_not_write_into_shared_gradients():
    net = nn.Branches(nn.Identity(), nn.Identity(), nn.Identity())
    _, backward = net.forward(normal(2, 3))
    dys = tuple(np.full((2, 3), float(i)) for i in (1, 2, 4))
    np.testing.assert_array_equal(backward(dys), np.full((2, 3), 7.0))
    assert [dy[0, 0] for dy in dys] == [1, 2, 4]


def test_concat_of_single_channels_keeps_channels_last():
    x = to_channels_last(normal(2, 4, 5, 5))
    net = nn.Concat(nn.Conv2d(4, 1, 1, **F64), nn.Conv2d(4, 2, 1, **F64))
    assert memory_order(net(x)) == "channels_last"


def test_own_layers_are_found():
    class Gate(nn.Layer):
        def __init__(self):
            self.inner = nn.Linear(3, 3, **F64)
            self.scale = nn.Parameter(np.ones(1))

        def forward(self, x):
            h, back = self.inner.forward(x)

            def backward(dy):
                self.scale.add_grad(np.array([(dy * h).sum()]))
                return back(dy * self.scale.value)
            return h * self.scale.value, backward

        def __call__(self, x):
            return self.inner(x) * self.scale.value

    gate = nn.Sequential(Gate())
    assert set(gate.state_dict()) == {"0.scale", "0.inner.weight", "0.inner.bias"}
    with pytest.raises(NotImplementedError, match="Layer must define forward"):
        nn.Layer().forward(1)
    with pytest.raises(NotImplementedError, match="Layer must define __call__"):
        nn.Layer()(1)


# ---- Other ---------------------------------------------------------------------------------------------------------

def test_repr_is_pytorchs():
    torch = pytest.importorskip("torch")
    for name, args, kwargs in [
        ("Conv2d", (3, 4, 3), {}),
        ("Conv1d", (4, 4, (2,), 2), {"padding": 1, "dilation": 2, "groups": 2}),
        ("Conv2d", (4, 4, 3), {"padding": 2, "bias": False, "padding_mode": "reflect"}),
        ("Conv3d", (3, 4, 2), {"padding": "same"}),
        ("ConvTranspose2d", (3, 4, 3, 2), {"output_padding": 1}),
        ("Linear", (3, 4), {}), ("Linear", (3, 4, False), {}),
        ("ReLU", (), {}), ("LeakyReLU", (0.2,), {}), ("Softmax", (1,), {}),
        ("Flatten", (), {}), ("Sigmoid", (), {}), ("LocalResponseNorm", (5,), {}),
    ]:
        assert repr(getattr(nn, name)(*args, **kwargs)) == repr(getattr(torch.nn, name)(*args, **kwargs))
    ours = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Tanh())
    theirs = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()), torch.nn.Tanh())
    assert repr(ours) == repr(theirs)


def test_batch_norm_tracks_a_plain_average_without_momentum():
    layer = nn.BatchNorm1d(2, momentum=None, dtype=np.float64)
    batches = normal(3, 8, 2)
    for x in batches:
        layer.forward(x)
    np.testing.assert_allclose(layer.running_mean.value, batches.mean((0, 1)))
    np.testing.assert_allclose(layer.running_var.value, batches.var(1, ddof=1).mean(0))
    assert layer.num_batches_tracked.value == 3


def test_a_pending_backward_keeps_the_frozen_statistics_of_its_forward():
    layer, x = nn.BatchNorm1d(3, frozen=True, dtype=np.float64), normal(5, 3)
    _, backward = layer.forward(x)
    expected = backward(x)
    layer.frozen = False
    layer.forward(x + 7)
    np.testing.assert_array_equal(backward(x), expected)


def test_batch_norm_in_float32_is_exact_far_from_zero():
    x = (1e4 + np.random.default_rng(0).standard_normal((64, 3, 20))).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 2), keepdims=True)) / np.sqrt(exact.var((0, 2), keepdims=True) + 1e-5)
    y, _ = nn.BatchNorm1d(3).forward(x)
    # x - mean is rounded to the spacing of float32 at 1e4, about 1e-3, in the input itself
    np.testing.assert_allclose(y, exact, atol=1e-3)
    np.testing.assert_allclose(y.std((0, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_dropout_drops_and_scales(order):
    x = np.ones((50, 40, 10, 2), np.float32)
    x = to_channels_last(x) if order == "channels_last" else x
    y, backward = nn.Dropout(0.3, rng=0).forward(x)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs((y == 0).mean() - 0.3) < 0.01
    np.testing.assert_array_equal(backward(x), y)
    again, _ = nn.Dropout(0.3, rng=0).forward(np.ones_like(x, order="C"))
    np.testing.assert_array_equal(again, y)
    layer = nn.Dropout(0.3, rng=0)
    assert not np.array_equal(layer.forward(x)[0], layer.forward(x)[0])
    assert layer(x) is x


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_dropout_by_channel(ndim):
    x = np.ones((60, 50, *(3, 4, 2)[:ndim]))
    y, _ = nn.DROPOUT[ndim](0.4, rng=0).forward(x)
    channels = y.reshape(60, 50, -1)
    assert (channels == channels[:, :, :1]).all()
    assert abs((channels[:, :, 0] == 0).mean() - 0.4) < 0.04
    with pytest.raises(ValueError, match="Dropout takes any shape"):
        nn.DROPOUT[ndim](0.4).forward(np.ones((2,) * (ndim + 3)))


def test_the_process_generator_is_seeded():
    x = np.ones((5, 6))
    nn.seed(3)
    first = nn.Linear(4, 4).weight.value, nn.Dropout(0.5).forward(x)[0]
    nn.seed(3)
    again = nn.Linear(4, 4).weight.value, nn.Dropout(0.5).forward(x)[0]
    nn.seed(4)
    other = nn.Linear(4, 4).weight.value, nn.Dropout(0.5).forward(x)[0]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_asymmetric_and_strided_same_padding():
    x = normal(2, 3, 7, 8)
    pairs = nn.Conv2d(3, 4, 3, stride=2, padding=((1, 0), (0, 2)), **F64)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 0), (0, 2)))
    np.testing.assert_allclose(pairs(x), conv2d(padded, pairs.weight.value, pairs.bias.value, 2), rtol=1e-12)
    assert nn.Conv2d(3, 4, 3, stride=2, padding="same", **F64)(x).shape == (2, 4, 4, 4)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: nn.Conv2d(3, 4, 3, groups=2), ValueError, "groups is 2, which does not divide in_channels = 3"),
    (lambda: nn.Conv2d(4, 3, 3, groups=2), ValueError, "groups is 2, which does not divide out_channels = 3"),
    (lambda: nn.Conv2d(0, 4, 3), ValueError, "in_channels is 0"),
    (lambda: nn.Conv2d(3, 4, (3, 3, 3)), ValueError, "kernel_size is"),
    (lambda: nn.Conv2d(3, 4, 0), ValueError, "kernel_size is 0"),
    (lambda: nn.Conv2d(3, 4, 3, padding="some"), ValueError, "padding"),
    (lambda: nn.Conv2d(3, 4, 3, padding=-1), ValueError, "padding"),
    (lambda: nn.Conv2d(3, 4, 3, padding_mode="mirror"), ValueError, "padding_mode is 'mirror'"),
    (lambda: nn.Conv2d(3, 4, 3, dtype=np.float16), TypeError, "dtype is float16"),
    (lambda: nn.ConvTranspose2d(3, 4, 3, padding_mode="reflect"), ValueError, "padding_mode is 'reflect'"),
    (lambda: nn.Linear(0, 3), ValueError, "in_features is 0"),
    (lambda: nn.Dropout(1.5), ValueError, "p is 1.5"),
    (lambda: nn.BatchNorm2d(0), ValueError, "num_features is 0"),
    (lambda: nn.BatchNorm2d(3, eps=0), ValueError, "eps is 0"),
    (lambda: nn.BatchNorm2d(3, track_running_stats=False, frozen=True), ValueError, "frozen=True"),
    (lambda: nn.BatchNorm2d(3)(np.ones((2, 4, 3, 3))), ValueError, "C = 3 is needed"),
    (lambda: nn.BatchNorm1d(3)(np.ones((2, 3, 3, 3))), ValueError, "with 2 or 3 axes"),
    (lambda: nn.BatchNorm1d(3).forward(np.ones((1, 3))), ValueError, "1 value per channel"),
    (lambda: nn.LocalResponseNorm(0)(np.ones((1, 3, 2))), ValueError, "size is 0"),
    (lambda: nn.LocalResponseNorm(2)(np.ones((1, 3))), ValueError, "at least 3 axes"),
    (lambda: nn.Softmax(2)(np.ones((1, 3))), ValueError, "dim is 2"),
    (lambda: nn.Flatten(2, 1)(np.ones((1, 3, 4))), ValueError, "start_dim=2 comes after end_dim=1"),
    (lambda: nn.MaxUnpool2d(2)(np.ones((1, 3, 4, 4))), TypeError, r"a tuple \(x, indices\) is needed"),
    (lambda: nn.ReLU()([1.0, 2.0]), TypeError, "input is a"),
    (lambda: nn.ReLU().forward(np.ones((2, 3)))[1](np.ones(3)), ValueError, r"grad_output has shape \(3,\)"),
    (lambda: nn.ReLU().forward(np.ones(3))[1](np.ones(3, np.float32)), TypeError, "grad_output has dtype float32"),
])
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "Hint: " in str(caught.value)
