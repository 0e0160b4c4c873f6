"""Data files, batches, metrics, progress, checkpoints and the training loop."""

from __future__ import annotations

import io
import itertools
import os
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from fastconv import models, nn
from fastconv.models import cnn3d
from fastconv.profiling import profile, profile_table
from fastconv.training import checkpoint, data, loop, metrics, optim, run
from fastconv.training.progress import Progress


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def images(count: int, *size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size), dtype=np.uint8)


def labels(count: int, classes: int = 2) -> np.ndarray:
    return (np.arange(count) % classes).astype(np.uint8)


class TestFiles:
    @pytest.mark.parametrize(
        ("size", "channels", "spatial"),
        [
            ((28, 28), 1, (28, 28)),
            ((28, 28, 3), 3, (28, 28)),
            ((28, 28, 1), 1, (28, 28)),
            ((9, 9, 9), 1, (9, 9, 9)),
            ((9, 9, 9, 3), 3, (9, 9, 9)),
            ((100,), 1, (100,)),
        ],
    )
    def test_shapes(self, tmp_path, size, channels, spatial):
        train, test = images(20, *size), images(6, *size, seed=1)
        path = write_npz(
            tmp_path / "a.npz", x_train=train, y_train=labels(20), x_test=test, y_test=labels(6)
        )
        dataset = data.load_npz(path, val_fraction=0.25, seed=3)
        assert (dataset.in_channels, dataset.input_size, dataset.num_classes) == (channels, spatial, 2)
        assert [len(p) for p in (dataset.train, dataset.val, dataset.test)] == [15, 5, 6]
        expected = test if test.ndim == len(spatial) + 1 else np.moveaxis(test, -1, 1)
        np.testing.assert_array_equal(
            dataset.test.images.reshape(6, channels, *spatial), expected.reshape(6, channels, *spatial)
        )

    def test_held_out_images_leave_the_training_part(self, tmp_path):
        train = np.arange(40, dtype=np.uint8)[:, None, None] + np.zeros((4, 4), np.uint8)
        path = write_npz(
            tmp_path / "a.npz", x_train=train, y_train=labels(40), x_test=train, y_test=labels(40)
        )
        dataset = data.load_npz(path, val_fraction=0.2, seed=5)
        kept, held = dataset.train.images[:, 0, 0, 0], dataset.val.images[:, 0, 0, 0]
        assert sorted([*kept, *held]) == list(range(40))
        np.testing.assert_array_equal(dataset.val.labels, held % 2)
        other = data.load_npz(path, val_fraction=0.2, seed=6).val.images[:, 0, 0, 0]
        assert set(other) != set(held)
        assert data.load_npz(path, val_fraction=0).val is None

    def test_medmnist_keeps_its_own_validation_part(self, tmp_path):
        parts = {"train": 12, "val": 4, "test": 6}
        arrays = {f"{part}_images": images(n, 8, 8, 8) for part, n in parts.items()}
        arrays |= {f"{part}_labels": labels(n, 3)[:, None] for part, n in parts.items()}
        dataset = data.load_npz(write_npz(tmp_path / "m.npz", **arrays), val_fraction=0.5)
        assert [len(p) for p in (dataset.train, dataset.val, dataset.test)] == [12, 4, 6]
        assert dataset.num_classes == 3
        assert dataset.train.labels.shape == (12,)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x_train": None}, r"needs \(MNIST: x_train, y_train, x_test, y_test or MedMNIST: "),
            ({"y_train": labels(19)}, "20 images, but .*y_train 19 labels"),
            ({"y_train": np.zeros((20, 14), np.uint8)}, "several labels per image are not supported"),
            ({"y_train": np.linspace(0, 1, 20)}, "dtype float64"),
            ({"y_train": -labels(20).astype(int)}, "label -1, but classes count from 0"),
            ({"x_test": images(6, 9, 8)}, r"test images have shape \(1, 9, 8\)"),
            ({"x_train": images(20, 2, 2, 2, 2)}, "5 axes"),
            ({"x_train": np.full((20, 8, 8), np.nan, np.float32)}, "NaN or infinity"),
            ({"x_train": np.array([None] * 20)}, "pickle"),
            ({"x_train": images(0, 8, 8), "y_train": labels(0)}, "no pixel"),
            ({"y_train": labels(20, 1), "y_test": labels(6, 1)}, "two classes"),
        ],
    )
    def test_bad_arrays(self, tmp_path, change, message):
        arrays = {
            "x_train": images(20, 8, 8),
            "y_train": labels(20),
            "x_test": images(6, 8, 8),
            "y_test": labels(6),
        }
        arrays = {name: value for name, value in (arrays | change).items() if value is not None}
        path = write_npz(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message) as error:
            data.load_npz(path)
        assert str(path) in str(error.value)

    def test_bad_files(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            data.load_npz(tmp_path / "none.npz")
        path = tmp_path / "bad.npz"
        good = write_npz(tmp_path / "good.npz", x=images(9, 9)).read_bytes()
        np.save(tmp_path / "array.npy", np.zeros(3))
        for content in (b"", b"no zip at all", good[:60], (tmp_path / "array.npy").read_bytes()):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(str(path))):
                data.load_npz(path)


class TestBatches:
    SPLIT = data.Split(images(23, 1, 5, 5), np.arange(23))

    @staticmethod
    def identity(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    def test_every_image_once_with_its_label(self):
        seen = []
        for x, y in data.batches(
            self.SPLIT, 5, normalise=self.identity, rng=np.random.default_rng(1)
        ):
            np.testing.assert_array_equal(x, self.SPLIT.images[y])
            seen.append(y)
        assert [len(y) for y in seen] == [5, 5, 5, 5, 3]
        order = np.concatenate(seen)
        assert sorted(order) == list(range(23))
        assert list(order) != list(range(23))

    def test_order_without_rng_and_seed(self):
        plain = [y for _, y in data.batches(self.SPLIT, 7, normalise=self.identity)]
        np.testing.assert_array_equal(np.concatenate(plain), np.arange(23))

        def order(seed: int) -> list[int]:
            rng = np.random.default_rng(seed)
            chunks = [y for _, y in data.batches(self.SPLIT, 7, normalise=self.identity, rng=rng)]
            return np.concatenate(chunks).tolist()

        assert order(1) == order(1) != order(2)

    def test_colour_batches_are_channels_last_in_memory(self):
        split = data.Split(np.moveaxis(images(6, 5, 7, 3), -1, 1), np.arange(6))
        for name in (None, "shift", "flip"):
            augment = name and data.AUGMENTATIONS[name]
            rng = np.random.default_rng(0)
            batch = data.batches(
                split, 4, normalise=data.Normalise.fit(split.images), rng=rng, augment=augment
            )
            x, _ = next(batch)
            assert x.shape == (4, 3, 5, 7)
            assert np.moveaxis(x, 1, -1).flags.c_contiguous, name

    def test_errors(self):
        with pytest.raises(ValueError, match="batch_size is 0"):
            next(data.batches(self.SPLIT, 0, normalise=self.identity))
        with pytest.raises(ValueError, match="augment needs rng"):
            next(data.batches(self.SPLIT, 2, normalise=self.identity, augment=data.flip))

    def test_normalise(self):
        raw = images(3000, 3, 4, 5)
        raw[:, 2] = 7
        normalise = data.Normalise.fit(raw)
        np.testing.assert_allclose(normalise.mean, raw.mean(axis=(0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(normalise.std[:2], raw[:, :2].std(axis=(0, 2, 3)), rtol=1e-10)
        x = normalise(raw)
        assert x.dtype == np.float32
        np.testing.assert_allclose(x.mean(axis=(0, 2, 3)), 0, atol=1e-4)
        np.testing.assert_allclose(x.std(axis=(0, 2, 3)), [1, 1, 0], atol=1e-4)


class TestAugmentation:
    @pytest.mark.parametrize("size", [(28,), (28, 28), (14, 15, 16)])
    def test_shift_moves_by_at_most_a_fourteenth(self, size):
        centre = tuple(n // 2 for n in size)
        x = np.zeros((200, 1, *size), np.float32)
        x[(slice(None), 0, *centre)] = 1
        y = data.shift(x, np.random.default_rng(0))
        assert (y.reshape(200, -1).sum(axis=1) == 1).all()
        places = np.argwhere(y)[:, 2:] - centre
        for offsets, n in zip(places.T, size, strict=True):
            reach = max(1, n // 14)
            assert set(offsets) == set(range(-reach, reach + 1))

    def test_shift_repeats_the_border(self):
        x = np.full((50, 2, 28, 28), 3, np.float32)
        np.testing.assert_array_equal(data.shift(x, np.random.default_rng(0)), x)

    def test_flip_gives_all_mirror_images_and_leaves_its_input(self):
        x = np.tile(np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3), (64, 1, 1, 1))
        y = data.flip(x, np.random.default_rng(0))
        image = x[0, 0].copy()
        wanted = {image[::a, ::b].tobytes() for a, b in itertools.product((1, -1), (1, -1))}
        assert {picture.tobytes() for picture in y[:, 0]} == wanted
        assert (x == image).all()


class TestMetrics:
    def test_auc_of_known_cases(self):
        truth = np.array([0, 0, 1, 1])

        def area(*score: float) -> float:
            second = np.array(score)
            return metrics.auc(np.stack([1 - second, second], axis=1), truth)

        assert area(0.1, 0.2, 0.8, 0.9) == 1
        assert area(0.9, 0.8, 0.2, 0.1) == 0
        assert area(0.5, 0.5, 0.5, 0.5) == 0.5
        assert area(0.1, 0.4, 0.35, 0.8) == 0.75
        assert np.isnan(metrics.auc(np.full((3, 2), 0.5), np.zeros(3, int)))

    @pytest.mark.parametrize("classes", [2, 3, 7])
    def test_auc_agrees_with_scikit_learn(self, classes):
        sklearn_metrics = pytest.importorskip("sklearn.metrics")
        rng = np.random.default_rng(classes)
        truth = rng.integers(0, classes, 300)
        score = np.round(rng.random((300, classes)) + 0.3 * (truth[:, None] == np.arange(classes)), 1)
        score /= score.sum(axis=1, keepdims=True)  # rounded above, so that ties occur
        if classes == 2:
            expected = sklearn_metrics.roc_auc_score(truth, score[:, 1])
        else:
            expected = sklearn_metrics.roc_auc_score(truth, score, multi_class="ovr", average="macro")
        assert metrics.auc(score, truth) == pytest.approx(expected, abs=1e-12)

    def test_confusion_and_accuracy(self):
        probabilities = np.eye(3)[[0, 1, 1, 2, 2, 2]]
        result = metrics.Evaluation(0.5, probabilities, np.array([0, 1, 2, 2, 2, 0]))
        np.testing.assert_array_equal(result.confusion, [[1, 0, 1], [0, 1, 0], [0, 1, 2]])
        assert result.accuracy == pytest.approx(4 / 6)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(stream: io.StringIO) -> str:
    with Progress(12, stream) as progress:
        for step in range(1, 5):
            progress.step(9, step, 4, "loss 0.5")
        progress.epoch(9, "loss 0.4")
        progress.step(10, 4, 4, "loss 0.3")
    return stream.getvalue()


class TestProgress:
    def test_log_file_gets_a_line_per_epoch(self):
        assert report(io.StringIO()) == "epoch  9/12  loss 0.4\n"

    def test_terminal_rewrites_its_line(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        text = report(Terminal())
        shown = [line.rsplit("\r")[-1].rstrip() for line in text.split("\n")]
        assert shown[0] == "epoch  9/12  loss 0.4"
        assert shown[1] == "epoch 10/12 [########################] 4/4  loss 0.3"
        assert shown[2:] == [""], "an interrupted line must end before other output"
        covered = [len(part) for part in text.split("\n")[0].split("\r")[1:]]
        assert covered[-1] >= max(covered[:-1]), "the last line must cover what stood there"

    def test_narrow_terminal(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "30")
        text = report(Terminal())
        assert max(len(part) for part in re.split("[\r\n]", text)) < 30

    def test_time_that_is_left(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        now = iter([100.0, 101.0, 104.0, 105.0, 300.0, 302.0])
        monkeypatch.setattr("time.monotonic", lambda: next(now))
        stream = Terminal()
        progress = Progress(2, stream)
        for epoch, done in ((1, 1), (1, 2), (1, 5), (1, 6), (2, 1), (2, 2)):
            progress.step(epoch, done, 6)
        # One step a second in the first epoch, one in two seconds in the second.
        left = [re.findall(r"(\d+) s left", line) for line in stream.getvalue().split("\r")[1:]]
        assert left == [[], ["4"], ["1"], [], [], ["8"]]

    def test_redraws_are_rare(self):
        stream = Terminal()
        with Progress(1, stream) as progress:
            for step in range(1, 10_001):
                progress.step(1, step, 100_000)
        assert stream.getvalue().count("\r") < 1000


class TestCheckpoint:
    STATE: ClassVar = {
        "model": {"conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(3)},
        "optimizer": {"lr": 0.1 + 0.2, "moments": [np.zeros(0), np.float64(1e-300)]},
        "rng": 2**127 + 1,
        "history": [{"loss": float("inf"), "val": None, "done": True}],
        "name": "lenet5 ü",
        "file": np.ones(1),
    }

    def test_round_trip(self, tmp_path):
        path = tmp_path / "a.npz"
        checkpoint.save_checkpoint(path, self.STATE)
        back = checkpoint.load_checkpoint(path)
        weight = back["model"]["conv.weight"]
        assert weight.dtype == np.float32
        np.testing.assert_array_equal(weight, self.STATE["model"]["conv.weight"])
        assert back["model"]["count"].shape == ()
        assert back["optimizer"]["lr"] == 0.1 + 0.2
        assert back["optimizer"]["moments"][0].shape == (0,)
        assert back["optimizer"]["moments"][1] == 1e-300
        for name in ("rng", "history", "name"):
            assert back[name] == self.STATE[name]
        assert os.listdir(tmp_path) == ["a.npz"]

    @pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
    def test_interrupted_write_keeps_the_old_checkpoint(self, tmp_path, monkeypatch, moment):
        path = tmp_path / "a.npz"
        checkpoint.save_checkpoint(path, {"epoch": 1})
        target = {"write": (np, "savez"), "fsync": (os, "fsync"), "replace": (os, "replace")}[moment]

        def interrupt(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(*target, interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save_checkpoint(path, {"epoch": 2})
        monkeypatch.undo()
        assert checkpoint.load_checkpoint(path) == {"epoch": 1}
        assert os.listdir(tmp_path) == ["a.npz"]

    def test_every_damage_is_noticed(self, tmp_path):
        path = tmp_path / "a.npz"
        checkpoint.save_checkpoint(path, {"w": np.arange(100.0)})
        whole = path.read_bytes()
        middle = whole.index(np.arange(100.0).tobytes()) + 400
        changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for content in (b"", whole[:-1], whole[: len(whole) // 2], changed):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="not a whole fastconv checkpoint"):
                checkpoint.load_checkpoint(path)

    def test_foreign_files_and_values(self, tmp_path):
        path = write_npz(tmp_path / "a.npz", x=np.zeros(3))
        with pytest.raises(ValueError, match="not a whole fastconv checkpoint"):
            checkpoint.load_checkpoint(path)
        with pytest.raises(FileNotFoundError):
            checkpoint.load_checkpoint(tmp_path / "none.npz")
        for bad in ({1: 2}, {"a": object()}, {"a": [{1, 2}]}, {"a": np.array([None])}):
            with pytest.raises(TypeError, match="save_checkpoint: tree"):
                checkpoint.save_checkpoint(path, bad)


def striped(count: int, size: int = 12, seed: int = 0) -> data.Split:
    """Noisy stripes: across for class 0, down for class 1."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 2, count)
    wave = 60 * np.sin(np.arange(size) * 1.5 + rng.uniform(0, 6, (count, 1)))
    stripes = np.where(classes[:, None, None], wave[:, None, :], wave[:, :, None])
    noisy = 128 + stripes + rng.normal(0, 30, (count, size, size))
    return data.Split(np.clip(noisy, 0, 255).astype(np.uint8)[:, None], classes)


def small_net(dropout: float = 0.0, seed: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, rng=seed), nn.ReLU(), nn.MaxPool2d(5), nn.Flatten(),
        nn.Dropout(dropout, rng=seed), nn.Dropout(dropout), nn.Linear(16, 2, rng=seed),
    )  # fmt: skip


class TestLoop:
    TRAIN, VAL = striped(192), striped(64, seed=1)
    NORMALISE = data.Normalise.fit(TRAIN.images)

    def fit(self, net: nn.Sequential, epochs: int, **options: object) -> list[loop.EpochRecord]:
        optimizer = options.pop("optimizer", None) or optim.AdamW(net.parameters(), lr=1e-2)
        return loop.fit(net, self.TRAIN, optimizer, epochs, normalise=self.NORMALISE, batch_size=50, **options)

    def test_learns_and_records(self):
        net = small_net()
        before = loop.evaluate(net, self.VAL, normalise=self.NORMALISE)
        calls = []
        history = self.fit(net, 8, val=self.VAL, after_epoch=lambda records: calls.append(len(records)))
        after = loop.evaluate(net, self.VAL, normalise=self.NORMALISE)
        assert [record.epoch for record in history] == calls == list(range(1, 9))
        assert before.accuracy < 0.8
        assert after.accuracy > 0.95
        assert after.auc > 0.98
        assert history[-1].val_loss == after.loss < before.loss
        assert history[-1].val_accuracy == after.accuracy
        assert history[-1].train_loss < history[0].train_loss

    def test_same_as_the_loop_written_out(self):
        net, by_hand = small_net(), small_net()
        self.fit(net, 2, seed=9)
        optimizer = optim.AdamW(by_hand.parameters(), lr=1e-2)
        for epoch in (1, 2):
            rng = np.random.default_rng((9, epoch))
            for x, target in data.batches(self.TRAIN, 50, normalise=self.NORMALISE, rng=rng):
                logits, backward = by_hand.forward(x)
                _, dlogits = nn.cross_entropy(logits, target)
                backward(dlogits)
                optimizer.step()
                optimizer.zero_grad()
        for name, value in net.state_dict().items():
            np.testing.assert_array_equal(value, by_hand.state_dict()[name], err_msg=name)

    def test_evaluation_does_not_depend_on_the_batch_size(self):
        net = small_net()
        whole = loop.evaluate(net, self.VAL, normalise=self.NORMALISE, batch_size=64)
        pieces = loop.evaluate(net, self.VAL, normalise=self.NORMALISE, batch_size=7)
        np.testing.assert_allclose(pieces.probabilities, whole.probabilities, atol=1e-6)
        assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)
        np.testing.assert_allclose(whole.probabilities.sum(axis=1), 1)

    def test_schedule_steps_per_batch(self):
        net = small_net()
        optimizer = optim.SGD(net.parameters(), lr=0.1)
        schedule = optim.CosineLR(optimizer, total_steps=8)
        history = self.fit(net, 2, optimizer=optimizer, schedule=schedule)
        assert schedule.count == 8  # 192 images in batches of 50 are 4
        assert [record.lr for record in history] == pytest.approx([0.1, 0.05])
        assert optimizer.lr == pytest.approx(0)

    def test_divergence_is_reported(self):
        net = small_net()
        with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in epoch 1, step .*lower the learning"):
            self.fit(net, 9, optimizer=optim.SGD(net.parameters(), lr=1e30))


@pytest.fixture
def stripes_npz(tmp_path: Path) -> Path:
    train, test = striped(150), striped(40, seed=2)
    return write_npz(
        tmp_path / "stripes.npz",
        x_train=train.images[:, 0], y_train=train.labels, x_test=test.images[:, 0], y_test=test.labels,
    )  # fmt: skip


def without_times(state: dict) -> dict:
    for record in state["history"]:
        del record["seconds"]
    return state


def assert_same_bits(a: object, b: object, path: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{path}/{i}")
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), path
    else:
        assert a == b, path


class TestResume:
    """A run that is stopped and resumed ends in the same bits as one that was not."""

    @pytest.fixture(autouse=True)
    def network_with_dropout(self, monkeypatch):
        model = models.Model(lambda **options: small_net(dropout=0.3), 1, 12, ndims=(2,))
        monkeypatch.setitem(models.MODELS, "stripes", model)

    @pytest.mark.parametrize("schedule", run.SCHEDULES)
    @pytest.mark.parametrize("optimizer", run.OPTIMIZERS)
    def test_bit_for_bit(self, tmp_path, stripes_npz, monkeypatch, optimizer, schedule):
        recipe = run.Recipe(
            "stripes", str(stripes_npz), epochs=3, batch_size=32, optimizer=optimizer, schedule=schedule,
            augment=("shift", "flip"), seed=4,
        )  # fmt: skip
        straight, stopped = tmp_path / "straight.npz", tmp_path / "stopped.npz"
        run.Run(recipe).train(straight)

        step, steps = loop.train_step, []

        def interrupted(*args: object, **kwargs: object) -> object:
            steps.append(1)
            if len(steps) == 8:  # of 5 an epoch: in the middle of the second
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        monkeypatch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.Run(recipe).train(stopped)
        monkeypatch.setattr(loop, "train_step", step)
        nn.seed(99)  # a new process would not have the state of the old one's generator
        resumed = run.Run.resume(stopped, {})
        assert len(resumed.history) == 1
        resumed.train(stopped)
        states = [without_times(checkpoint.load_checkpoint(path)) for path in (straight, stopped)]
        assert len(states[0]["history"]) == 3
        assert_same_bits(*states)

    def test_seed_matters(self, tmp_path, stripes_npz):
        weights = []
        for seed in (0, 0, 1):
            one = run.Run(run.Recipe("stripes", str(stripes_npz), epochs=1, seed=seed))
            one.train(tmp_path / "a.npz")
            weights.append(one.model.state_dict()["6.weight"].tobytes())
        assert weights[0] == weights[1] != weights[2]

    def test_more_epochs(self, tmp_path, stripes_npz):
        path = tmp_path / "a.npz"
        run.Run(run.Recipe("stripes", str(stripes_npz), epochs=1)).train(path)
        run.Run.resume(path, {"epochs": 3}).train(path)
        state = checkpoint.load_checkpoint(path)
        assert [record["epoch"] for record in state["history"]] == [1, 2, 3]
        assert state["recipe"]["epochs"] == 3

    def test_refusals(self, tmp_path, stripes_npz):
        path = tmp_path / "a.npz"
        one = run.Run(run.Recipe("stripes", str(stripes_npz), epochs=1))
        one.save(path)
        with pytest.raises(ValueError, match="made with batch_size 64, but 32 is given"):
            run.Run.resume(path, {"batch_size": 32})
        with np.load(stripes_npz) as file:
            other = write_npz(tmp_path / "other.npz", **dict(file) | {"x_train": 255 - file["x_train"]})
        with pytest.raises(ValueError, match="other data"):
            run.Run.resume(path, {"data": str(other)})
        moved = stripes_npz.rename(tmp_path / "moved.npz")
        assert run.Run.resume(path, {"data": str(moved)}).history == []

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ((9, 9, 9), "stripes does not take images of 1 x 9 x 9 x 9: .* 2 spatial axes"),
            ((5, 6), "stripes does not take images of 1 x 5 x 6: .*kernel"),  # a pool of 5 over 3 x 4
        ],
    )
    def test_images_that_the_network_cannot_take(self, tmp_path, size, message):
        path = write_npz(
            tmp_path / "a.npz", x_train=images(9, *size), y_train=labels(9), x_test=images(9, *size), y_test=labels(9)
        )
        with pytest.raises(ValueError, match=message):
            run.Run(run.Recipe("stripes", str(path)))


def test_cnn3d_has_the_parameters_that_it_promises():
    net = cnn3d()
    assert net.num_parameters() == 27 * (1 * 8 + 8 * 16 + 16 * 32) + 2 * (8 + 16 + 32) + 32 * 2 + 2 == 17_674
    x = np.zeros((2, 1, 9, 10, 11), np.float32)
    assert net(x).shape == (2, 2)
    assert net.forward(x)[0].shape == (2, 2)


def test_profile_counts_every_layer_and_leaves_the_model_alone():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.GlobalAvgPool(), nn.Flatten(), nn.Linear(8, 5)
    )
    before = net.state_dict()
    rows = profile(net, np.ones((4, 3, 10, 12), np.float32), repeats=1)
    assert [row.name.split()[1] for row in rows] == [type(layer).__name__ for layer in net]
    assert rows[0].macs == 4 * 8 * 3 * 9 * 10 * 12
    assert rows[-1].macs == 4 * 8 * 5
    assert {len(row.algorithms) for row in rows if row.macs} == {3}
    assert all(row.algorithms == () for row in rows if not row.macs)
    assert_same_bits(before, net.state_dict())
    assert all(parameter.grad is None for parameter in net.parameters())
    table = profile_table(rows).splitlines()
    assert len(table) == len(rows) + 2
    assert "4x8x10x12" in table[1]
