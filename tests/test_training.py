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

from fastconv.training import checkpoint, data, metrics
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
