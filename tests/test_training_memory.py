"""Memory and bits of training steps: nothing grows from step to step, and threads change nothing."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastconv
from fastconv import functional, nn
from fastconv.arrays import empty, empty_like, release_memory
from fastconv.backends import _cpu
from fastconv.memory import step_memory
from fastconv.training import SGD, Adam

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))
from training_nets import NETS  # noqa: E402

MIB = 2**20


def resident():
    """Resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    pytest.skip("needs Linux's /proc")
    return 0


def network(order="channels_last"):
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False, rng=0), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Residual(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, rng=1), nn.BatchNorm2d(16)), activation=nn.ReLU()),
        nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, stride=2, padding=1, rng=2), nn.ReLU(), nn.GlobalAvgPool(),
        nn.Flatten(), nn.Linear(32, 3, rng=3))  # fmt: skip
    nn.skip_input_gradients(net)
    nn.use_channels_last(net, order == "channels_last")
    return net


def train(net, steps, optimizer=None, size=40):
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((8, 1, size, size), np.float32), rng.integers(0, 3, 8)
    optimizer = optimizer or SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        logits, backward = net.forward(x)
        loss, gradient = nn.cross_entropy(logits, target)
        backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


def test_200_steps_take_no_more_memory_than_50():
    net = network()
    optimizer = SGD(net.parameters(), lr=0.01, momentum=0.9)
    train(net, 50, optimizer)
    gc.collect()
    before = resident()
    train(net, 200, optimizer)
    gc.collect()
    assert resident() - before < 5 * MIB


def test_1000_shapes_leave_little_memory():
    rng = np.random.default_rng(0)

    def call():
        n, c, k, size = (int(rng.integers(low, high)) for low, high in ((1, 4), (1, 40), (1, 40), (5, 40)))
        x = rng.standard_normal((n, c, size, size), np.float32)
        w = rng.standard_normal((k, c, 3, 3), np.float32)
        y = functional.conv(x, w, padding=1)
        functional.conv_input_grad(x.shape, w, y, padding=1)
        functional.conv_weight_grad(x, w.shape, y, padding=1)

    for _ in range(50):
        call()
    gc.collect()
    before = resident()
    for _ in range(1000):
        call()
    gc.collect()
    assert resident() - before < 50 * MIB


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_bits_do_not_depend_on_threads_or_runs(order):
    states = []
    for threads in (1, 2, 3, 2):
        with fastconv.config(threads=threads):
            net = network(order)
            losses = train(net, 3, size=64)
        states.append([losses, *net.state_dict().values()])
    for state in states[1:]:
        for a, b in zip(states[0], state, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_adam_does_not_depend_on_threads():
    values = []
    for threads in (1, 2):
        with fastconv.config(threads=threads):
            parameter = nn.Parameter(np.linspace(-1, 1, 250_001, dtype=np.float32))
            optimizer = Adam([parameter], lr=0.1)
            for _ in range(3):
                parameter.grad = np.cos(parameter.value)
                optimizer.step()
        values.append(parameter.value.tobytes())
    assert values[0] == values[1]


def test_memory_is_kept_for_the_next_array():
    release_memory()
    first = empty((1000, 1000), np.float32)
    at = first.__array_interface__["data"][0]
    del first
    assert _cpu.idle_bytes() >= 4_000_000
    again = empty_like(np.empty((1000, 1000), np.float32).T)
    assert again.__array_interface__["data"][0] == at
    assert again.strides == (4, 4000)
    part = again[:10]
    del again
    assert _cpu.idle_bytes() == 0  # the view keeps it
    assert part.size == 10_000
    del part
    assert release_memory() >= 4_000_000
    assert _cpu.idle_bytes() == 0


def test_little_more_is_kept_than_was_in_use():
    release_memory()
    for size in range(1, 20):
        array = empty((size, 100_000), np.float32)
        most = 9 * array.nbytes // 8 + MIB + 4096
        del array
        assert _cpu.idle_bytes() <= most
    release_memory()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["lenet5", "vgg10", "densenet121", "googlenet", "resnet10_3d"])
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_peak_of_a_step_is_predicted(name, order):
    """Within 10 % of what a process of its own takes for three steps, and 1 MiB for pages and small objects."""
    net = next(net for net in NETS if net.name == name)
    job = {"what": "memory", "net": name, "peers": [{"contiguous": "fastconv"}.get(order, "fastconv_cl")], "threads": 2}
    child = subprocess.run([sys.executable, str(BENCH / "compare_training.py"), "--job", json.dumps(job)], text=True,
                           capture_output=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    measured = int(child.stdout.split()[-1])
    with fastconv.config(threads=2):
        predicted = step_memory(net.build(), net.shape[1:], net.shape[0], order=order).peak
    assert abs(predicted - measured) < 0.1 * measured + MIB, (predicted / MIB, measured / MIB)
