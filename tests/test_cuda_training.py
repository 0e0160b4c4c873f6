"""Training, the command line, profiles and sliding windows on the GPU backend, run by the emulator."""

import numpy as np
import pytest
from cuda_emulator import DeviceArray, device, emulated, host
from test_cli import write_digits
from test_cuda_nets import close
from tolerance import assert_close
from training_cases import small_net, striped

import fastconv
from fastconv import cli, nn, training, tune
from fastconv.inference import sliding_window
from fastconv.models import WithCovariates
from fastconv.profiling import profile
from fastconv.training.data import Split


def trained(place, **options):
    """Two epochs; returns the network, the records, and an evaluation."""
    nn.init.seed(0)
    train, val = striped(48), striped(20, seed=1)
    net = small_net(dropout=0.25).to(place)
    normalise = training.Normalise.fit(train.images)
    optimizer = training.SGD(net.parameters(), lr=0.02, momentum=0.9)
    records = training.fit(net, train, optimizer, 2, normalise=normalise, val=val, batch_size=16, **options)
    return net, records, training.evaluate(net, val, normalise=normalise)


def test_fit_and_evaluate_as_on_the_cpu():
    stopping = [training.EarlyStopping("accuracy"), training.EarlyStopping("accuracy")]
    net, records, measured = trained("cpu", stopping=stopping[0])
    with emulated():
        there, records_there, measured_there = trained("cuda", stopping=stopping[1])
        assert there.place == "cuda"
        assert isinstance(there[0].weight.value, DeviceArray)
        assert there.to("cpu").place == "cpu"
    for record, other in zip(records, records_there, strict=True):
        np.testing.assert_allclose(other.train_loss, record.train_loss, rtol=1e-4)
        np.testing.assert_allclose(other.val_loss, record.val_loss, rtol=1e-4)
        assert (other.train_accuracy, other.val_accuracy) == (record.train_accuracy, record.val_accuracy)
    np.testing.assert_allclose(measured_there.probabilities, measured.probabilities, atol=1e-4)
    assert type(measured_there.probabilities) is np.ndarray
    assert stopping[0].best_epoch == stopping[1].best_epoch
    for key, value in net.state_dict().items():
        close(there.state_dict()[key], value, "float32")


def test_fit_with_a_table():
    images = striped(16)
    data = Split(images.images, images.labels, np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32))

    def losses(place):
        net = WithCovariates(small_net(), 3, rng=0)
        net.fit(data.table)
        net.to(place)
        optimizer = training.SGD(net.parameters(), lr=0.01)
        normalise = training.Normalise.fit(data.images)
        return training.fit(net, data, optimizer, 1, normalise=normalise, batch_size=8)[0].train_loss

    with emulated():
        there = losses("cuda")
    np.testing.assert_allclose(there, losses("cpu"), rtol=1e-4)


def printed(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_the_command_line_trains_there_and_goes_on_here(tmp_path, capsys):
    digits = write_digits(tmp_path / "digits.npz", 120, 28)
    common = ("train", "--model", "lenet5", "--data", digits, "--batch-size", 30, "--optimizer", "sgd",
              "--schedule", "constant")
    here = printed(capsys, *common, "--epochs", 2, "--out", tmp_path / "here")
    with emulated():
        there = printed(capsys, *common, "--epochs", 1, "--out", tmp_path / "there", "--device", "cuda")
    assert "on the GPU" in there
    resumed = printed(capsys, "train", "--resume", "--out", tmp_path / "there", "--epochs", 2, "--device", "cpu")
    assert "on the GPU" not in resumed
    losses = [float(text.split("test        loss ")[1].split()[0]) for text in (here, resumed)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_the_command_line_profiles_and_tunes_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_choices", {})
    with emulated():
        table = printed(capsys, "profile", "lenet5", "--train", "--repeats", 1, "--device", "cuda")
        assert "simt" in table
        inference = printed(capsys, "profile", "lenet5", "--repeats", 1, "--device", "cuda")
        assert "simt" in inference
        choices = printed(capsys, "tune", "lenet5", "--device", "cuda")
    assert "simt 64x64" in choices
    assert (tmp_path / "tune.json").exists()


def test_without_a_gpu_the_command_line_says_so(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    assert cli.main(["profile", "lenet5", "--device", "cuda"]) == 2
    assert 'pip install "fastconv[cuda13]"' in capsys.readouterr().err


def test_a_profile_has_the_algorithms_of_the_gpu():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(50, 3))
    with emulated():
        result = profile(net.to("cuda"), device(np.ones((2, 2, 6, 6), np.float32)), repeats=1)
    assert [row.algorithms for row in result.rows if row.algorithms] == [("simt",) * 3] * 3
    assert all(row.forward_seconds > 0 for row in result.rows)


# ---- sliding windows -------------------------------------------------------------------------------------------------


def dense(x):
    """Scores of three classes."""
    return np.concatenate([x.sum(1, keepdims=True), x[:, :1] * 2, x[:, -1:] ** 2], 1)


@pytest.mark.parametrize("argmax", [False, True])
@pytest.mark.parametrize("predict", [dense, lambda x: dense(x).sum((2, 3))], ids=["dense", "classifier"])
def test_sliding_windows(predict, argmax):
    image = np.random.default_rng(0).standard_normal((2, 3, 23, 18)).astype(np.float32)
    right = sliding_window(predict, image, (8, 6), batch_size=3, argmax=argmax)

    def agrees(y):
        if argmax:
            np.testing.assert_array_equal(host(y), right)
        else:
            assert_close(host(y), right, 3 * 8 * 6)  # a sum over a window at most

    with emulated():
        y = sliding_window(predict, device(image), (8, 6), batch_size=3, argmax=argmax)
        assert isinstance(y, DeviceArray)
        assert y.dtype == right.dtype
        agrees(y)
        out = device(np.zeros_like(right))
        assert sliding_window(predict, device(image), (8, 6), argmax=argmax, out=out) is out
        agrees(out)


def test_sliding_windows_in_one_place():
    image = np.ones((1, 9, 9), np.float32)
    net = nn.Conv2d(1, 2, 3, padding=1)
    right = sliding_window(net, image, (5, 5))
    with emulated():
        net.to("cuda")
        close(sliding_window(net, device(image), (5, 5)), right, "float32")
        close(sliding_window(lambda x: host(net(device(x))), image, (5, 5)), right, "float32")
        with pytest.raises(TypeError, match="in one place"):
            sliding_window(lambda x: net(device(x)), image, (5, 5))


def test_copies_keep_the_memory_order():
    x = fastconv.to_channels_last(np.random.default_rng(0).standard_normal((2, 3, 4, 5)))
    with emulated():
        y = fastconv.arrays.to_device(x)
        assert y.strides == x.strides
        assert fastconv.arrays.to_device(y) is y
    np.testing.assert_array_equal(host(y), x)
