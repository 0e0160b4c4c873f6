"""Checkpoint: the bits of the layer without it, in less memory."""

import numpy as np
import pytest

from fastconv import models, nn
from fastconv.arrays import empty, rehearsal
from fastconv.functional import conv2d
from fastconv.memory import step_memory


def stage(dropout=0.0, seed=0):
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, rng=seed), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout, rng=seed + 1),
        nn.Dropout2d(dropout), nn.Conv2d(6, 4, 3, padding=1, rng=seed + 2),
        nn.BatchNorm2d(4, momentum=None))  # fmt: skip


def nets(dropout=0.5):
    plain = nn.Sequential(stage(dropout), stage(dropout, 5))
    wrapped = nn.Sequential(nn.Checkpoint(stage(dropout)), nn.Checkpoint(stage(dropout, 5)))
    return plain, wrapped


def run(net, steps=3):
    nn.seed(3)  # of Dropout2d, which draws from the generator of the process
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(steps):
        y, backward = net.forward(rng.standard_normal((3, 4, 7, 9), np.float32))
        dx = backward(rng.standard_normal(y.shape, np.float32))
        seen += [y, dx]
    return [*seen, *(p.grad for p in net.parameters()), *net.state_dict().values(), nn.init.default_rng.random(4)]


def test_same_bits():
    """Outputs, gradients, running statistics, and what generators draw afterwards."""
    plain, wrapped = nets()
    for a, b in zip(run(plain), run(wrapped), strict=True):
        assert a.tobytes() == b.tobytes()


def test_a_wrong_mask_would_be_seen():
    """The masks do matter: another seed gives other bits."""
    plain, _ = nets()
    other = nn.Sequential(stage(0.5, 1), stage(0.5, 5))
    assert run(plain)[0].tobytes() != run(other)[0].tobytes()


def test_several_passes_pending():
    """Backward passes in another order than the forward ones, and twice."""
    results = []
    for net in nets(0.25):
        nn.seed(1)
        rng = np.random.default_rng(0)
        xs = [rng.standard_normal((2, 4, 5, 5), np.float32) for _ in range(2)]
        passes = [net.forward(x) for x in xs]
        dy = np.ones_like(passes[0][0])
        results.append([passes[i][1](dy) for i in (1, 0, 1)] + [p.grad for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        assert a.tobytes() == b.tobytes()


def test_names_are_those_of_the_layer():
    plain, wrapped = nets()
    assert list(plain.state_dict()) == list(wrapped.state_dict())
    assert wrapped.load_state_dict(plain.state_dict()) == ([], [], [])
    x = np.ones((1, 4, 6, 6), np.float32)
    assert np.array_equal(plain(x), wrapped(x))


def test_written_weights_are_refused():
    net = nn.Checkpoint(nn.Linear(3, 2, rng=0))
    y, backward = net.forward(np.ones((2, 3), np.float32))
    with net.layer.weight.write() as weight:
        weight *= 2
    with pytest.raises(RuntimeError, match="weight was written after the forward pass"):
        backward(np.ones_like(y))


def test_a_class_is_refused():
    with pytest.raises(TypeError, match="layer is a type"):
        nn.Checkpoint(nn.ReLU)


def test_the_input_gradient_of_the_first_layer_can_be_skipped():
    net = nn.Sequential(nn.Checkpoint(stage()), nn.ReLU())
    nn.skip_input_gradients(net)
    y, backward = net.forward(np.ones((2, 4, 5, 5), np.float32))
    assert backward(np.ones_like(y)) is None


def test_it_takes_less_memory():
    def net(wrap):
        return nn.Sequential(*(wrap(stage(seed=i)) for i in range(16)))

    plain, wrapped = (step_memory(net(wrap), (4, 64, 64), 8).arrays for wrap in (lambda layer: layer, nn.Checkpoint))
    assert wrapped < 0.5 * plain


def test_a_rehearsal_computes_nothing_and_leaves_no_trace():
    net = models.resnet_small(8, rng=0)
    state = net.state_dict()
    first = step_memory(net, (3, 32, 32), 8)
    assert step_memory(net, (3, 32, 32), 8) == first
    for name, value in net.state_dict().items():
        assert np.array_equal(value, state[name])
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(("options", "message"), [
    ({"batch": 0}, "step_memory: batch is 0, but at least 1 is needed"),
    ({"batch": 1.5}, "step_memory: batch is 1.5, but an integer is needed"),
    ({"state_arrays": -1}, "step_memory: state_arrays is -1, but at least 0 is needed"),
    ({"order": "nhwc"}, "step_memory: order is 'nhwc', but 'contiguous' or 'channels_last' is needed")])
def test_what_cannot_be_predicted_is_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        step_memory(nn.Linear(3, 2), (3,), **options)


def test_a_rehearsal_takes_memory_only():
    x, w, y = np.ones((1, 3, 9, 9), np.float32), np.ones((4, 3, 3, 3), np.float32), np.full((1, 4, 7, 7), np.nan)
    out = y.astype(np.float32)
    with rehearsal() as held:
        conv2d(x, w, out=out)
        empty((1024, 1024), np.float32)
        with pytest.raises(RuntimeError, match="rehearsing already"), rehearsal():
            pass
    assert np.isnan(out).all()
    assert 2**22 <= held[0] < 2**23
    conv2d(x, w, out=out)
    assert (out == 27).all()
