"""Profiles: every layer has its time, its work and its algorithm, and the network stays as it is."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

import fastconv
from fastconv import cli, models, nn
from fastconv.profiling import profile
from fastconv.summary import summarize
from fastconv.watch import inference_copy, shared_copy


def test_counts_every_layer_and_leaves_the_network_alone():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.GlobalAvgPool(), nn.Flatten(), nn.Linear(8, 5)
    )
    before = net.state_dict()
    result = profile(net, np.ones((4, 3, 10, 12), np.float32), repeats=1)
    rows = result.rows[:-1]
    assert [row.kind for row in rows] == [type(layer).__name__ for layer in net]
    assert [row.name for row in result.rows] == ["0", "1", "2", "3", "4", "5", "(network)"]
    assert rows[0].macs == 4 * 8 * 3 * 9 * 10 * 12
    assert rows[-1].macs == 4 * 8 * 5
    assert {len(row.algorithms) for row in rows if row.macs} == {3}
    assert all(row.algorithms == () for row in rows if not row.macs)
    assert before.keys() == net.state_dict().keys()
    assert all(value.tobytes() == before[name].tobytes() for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    table = result.table().splitlines()
    assert table[1].split()[:2] == ["0", "Conv2d"]
    assert "8x10x12" in table[1]
    assert len(table) == 1 + 7 + 1 + 2


NETWORKS = {
    "resnet50": (2, 32, {"width": 1 / 16}),
    "densenet121": (1, 32, {"width": 1 / 16}),
    "googlenet": (2, 32, {"width": 1 / 16}),
    "lenet5": (2, 28, {"variant": "paper"}),
    "cnn3d": (3, 12, {}),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_work_is_that_of_the_summary(name, train):
    ndim, size, options = NETWORKS[name]
    shape = (1, *(size,) * ndim)
    net = models.create(name, 1, 3, shape[1:], rng=0, **options)
    result = profile(net, np.ones((2, *shape), np.float32), train=train, repeats=1)
    work = {row.name: 2 * row.macs for row in summarize(net, shape).rows if row.macs}
    assert {row.name: row.macs for row in result.rows if row.macs} == work
    for row in result.rows:
        assert len(row.algorithms) == (0 if not row.macs else 3 if train else 1)
        assert row.forward_seconds > 0
        assert (row.backward_seconds > 0) == train


class Sleeper(nn.Layer):
    """Takes its time, and holds another layer."""

    def __init__(self, forward, backward):
        self.seconds = forward, backward
        self.inside = nn.ReLU()

    def forward(self, x):
        time.sleep(self.seconds[0])
        y, inner = self.inside.forward(x)

        def backward(dy):
            time.sleep(self.seconds[1])
            return inner(dy)

        return y, backward

    def __call__(self, x):
        return self.forward(x)[0]


@pytest.mark.parametrize("train", [False, True])
def test_times_are_those_of_the_layer(train):
    net = nn.Sequential(a=Sleeper(0.06, 0.12), b=nn.Sequential(Sleeper(0.03, 0.0)))
    result = profile(net, np.ones((2, 3), np.float32), train=train, repeats=3)
    rows = {row.name: row for row in result.rows}
    expected = {"a": (0.06, 0.12), "a.inside": (0, 0), "b.0": (0.03, 0), "b": (0, 0)}
    for name, (forward, backward) in expected.items():
        for seconds, least in ((rows[name].forward_seconds, forward), (rows[name].backward_seconds, backward * train)):
            assert least <= seconds < least + 0.025, name
    assert result.seconds >= 0.09 + 0.12 * train
    outer = [line for line in result.table(depth=1).splitlines() if line.startswith("b ")]
    assert 30 <= float(outer[0].split()[3]) < 55


def test_trace_is_the_trace_event_format(tmp_path):
    net = models.resnet_small(8, 1, 3, rng=0)
    result = profile(net, np.ones((2, 1, 16, 16), np.float32), repeats=1)
    path = tmp_path / "trace.json"
    result.save_trace(path)
    events = json.loads(path.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    spans = [event for event in events if event["ph"] == "X"]
    for event in spans:
        assert event.keys() >= {"name", "cat", "ts", "dur", "pid", "tid"}
        assert event["ts"] >= 0
        assert event["dur"] >= 0
    assert {event["cat"] for event in spans} == {"forward", "backward"}
    for phase in ("forward", "backward"):
        whole = {event["name"]: event for event in spans if event["cat"] == phase}
        assert len(whole) == len([event for event in spans if event["cat"] == phase])
        assert whole.keys() == {row.name for row in result.rows}
        assert whole["(network)"]["dur"] < 1e6 * result.seconds
        for name, event in whole.items():
            parent = whole[name.rpartition(".")[0] or "(network)"]
            assert parent["ts"] <= event["ts"]
            assert event["ts"] + event["dur"] <= parent["ts"] + parent["dur"] + 1e-3
        order = sorted((name for name in whole if name.startswith("layer1.0.conv")), key=lambda n: whole[n]["ts"])
        assert order == sorted(order, reverse=phase == "backward")


@pytest.mark.parametrize("algorithm", ["im2col", "reference"])
def test_algorithms_are_those_that_run(algorithm):
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(),
                        nn.Linear(4 * 256, 3))
    x = np.ones((2, 4, 8, 8), np.float32)
    with fastconv.config(algorithm=algorithm):
        rows = [row for row in profile(net, x, repeats=1).rows if row.macs]
    assert [row.algorithms for row in rows] == [(algorithm,) * 3] * 3
    (row,) = [row for row in profile(net[:1], x, repeats=1).rows if row.macs]
    conv = net[0]
    assert row.algorithms == tuple(
        fastconv.explain(x, conv.weight.value, padding=1, op=op).algorithm
        for op in ("conv", "conv_input_grad", "conv_weight_grad")
    )


def test_inference_is_profiled_as_it_runs():
    """With what is fused; classes are changed meanwhile, and changed back whatever happens."""
    net = models.resnet_small(8, 1, 2, rng=0)
    x = np.ones((2, 1, 16, 16), np.float32)
    calls = {cls: cls.__call__ for layer in net for cls in type(layer).__mro__[:-1]}
    expected = net(x)
    rows = {row.name: row for row in profile(net, x, train=False, repeats=1).rows}
    assert rows["conv1"].kind == "Conv2d+norm+relu"
    assert "bn1" not in rows
    assert "relu" not in rows
    assert rows["layer2.0.conv2"].kind == "Conv2d+norm+add+relu"
    assert rows["layer2.0.downsample.0"].kind == "Conv2d+norm"
    assert {row.kind for row in rows.values()} >= {"Linear", "GlobalAvgPool", "ResidualBlock"}
    with pytest.raises(ValueError, match="channels"):
        profile(net, np.ones((2, 3, 16, 16), np.float32), train=False)
    assert all(cls.__call__ is call for cls, call in calls.items())
    assert all("prepared" not in vars(layer) and "forward" not in vars(layer) for _, layer in net.named_layers())
    np.testing.assert_array_equal(net(x), expected)


def test_speed_counts_the_passes_that_ran():
    net = nn.Conv2d(4, 8, 3)
    x = np.ones((1, 4, 10, 10), np.float32)
    macs = 8 * 4 * 9 * 64
    (row,) = profile(net, x, train=False).rows
    assert row.gflops == pytest.approx(2 * macs / row.forward_seconds / 1e9)
    (row,) = profile(net, x, train=True).rows
    assert row.gflops == pytest.approx(6 * macs / (row.forward_seconds + row.backward_seconds) / 1e9)
    with pytest.raises(ValueError, match="repeats is 0"):
        profile(net, x, repeats=0)


def test_several_inputs_and_heads():
    net = models.WithCovariates(models.resnet_small(8, 1, 2, rng=0), 3, hidden=5, rng=0)
    inputs = np.ones((2, 1, 16, 16), np.float32), np.ones((2, 3), np.float32)
    assert profile(net, inputs, repeats=1).batch == 2
    net = models.googlenet(1, 3, auxiliary=True, variant="torchvision", width=1 / 16, rng=0)
    rows = {row.name for row in profile(net, np.ones((2, 1, 32, 32), np.float32), repeats=1).rows}
    assert {"aux1.fc1", "aux2.fc2"} <= rows


def test_copies_share_weights_and_nothing_else():
    net = models.resnet_small(8, 1, 2, rng=0)
    x = np.random.default_rng(0).standard_normal((2, 1, 16, 16)).astype(np.float32)
    before = net.state_dict()
    for copied in (shared_copy(net), inference_copy(net)):
        for ours, theirs in zip(net.parameters(), copied.parameters(), strict=True):
            assert np.shares_memory(ours.value, theirs.value)
        y, backward = copied.forward(x)
        backward(np.ones_like(y))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(value.tobytes() == before[name].tobytes() for name, value in net.state_dict().items())
    np.testing.assert_allclose(inference_copy(net).forward(x)[0], net(x), rtol=1e-5, atol=1e-6)


def test_command(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    arguments = ["profile", "resnet_small", "--input", "1,16,16", "--batch", "2", "--repeats", "1", "--threads", "1"]
    threads = fastconv.get_num_threads()
    try:
        assert cli.main([*arguments, "--train", "--trace", str(trace)]) == 0
        text = capsys.readouterr().out
        assert text.startswith("resnet_small, batch of 2 of 1x16x16, training, fastest of 1 run; threads 1:")
        assert json.loads(trace.read_text())["traceEvents"]
        assert str(trace) in text
        assert max(map(len, text.splitlines()[2:-1])) <= 100
        head, first = text.splitlines()[2:4]
        assert head.split() == ["layer", "kind,", "algorithm", "output", "forward", "backward", "GFLOP/s", "share"]
        assert first.split()[:2] == ["conv1", "Conv2d"]
        assert cli.main([*arguments, "--channels-last"]) == 0
        assert capsys.readouterr().out.splitlines()[2].split()[-3:] == ["ms", "GFLOP/s", "share"]
        assert cli.main([*arguments, "--trace", str(tmp_path / "no" / "folder.json")]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert "No such file" in captured.err
        assert cli.main(["profile", "densenet121", "--input", "3,8,8"]) == 2
        assert "padded input has only" in capsys.readouterr().err
    finally:
        fastconv.set_num_threads(threads)
