"""Data files, batches, metrics, progress, checkpoints and the training loop."""

from __future__ import annotations

import io
import os
import re
from typing import ClassVar

import numpy as np
import pytest
from training_cases import assert_same_bits, images, labels, small_net, striped, write_npz

from fastconv import nn
from fastconv.models import cnn3d
from fastconv.training import augment, checkpoint, data, loop, metrics, optim
from fastconv.training import stopping as stop
from fastconv.training.progress import Progress


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

    def test_size(self, tmp_path):
        ramp = np.broadcast_to(np.arange(9, dtype=np.uint8) + 10, (20, 4, 9))
        path = write_npz(tmp_path / "s.npz", x_train=ramp, y_train=labels(20), x_test=ramp[:6], y_test=labels(6))
        dataset = data.load_npz(path, size=7)
        for part in (dataset.train, dataset.val, dataset.test):
            assert part.images.shape[1:] == (1, 7, 7)  # 4 rows padded, 9 columns cropped
            assert (part.images == np.arange(11, 18)).all()
        dataset = data.load_npz(path, size=12)
        assert (dataset.test.images == [10] + list(range(10, 19)) + [18] * 2).all()
        with pytest.raises(ValueError, match="size is 0"):
            data.load_npz(path, size=0)

    TABLE: ClassVar = np.array([[1, np.nan, -3]] * 20)

    def test_tables(self, tmp_path):
        arrays = {"x_train": images(20, 8, 8), "y_train": labels(20), "x_test": images(6, 8, 8), "y_test": labels(6)}
        tables = {"train_table": self.TABLE + np.arange(20)[:, None], "test_table": self.TABLE[:6]}
        path = write_npz(tmp_path / "t.npz", **arrays, **tables)
        dataset = data.load_npz(path, val_fraction=0.25)
        assert [part.table.shape for part in (dataset.train, dataset.val, dataset.test)] == [(15, 3), (5, 3), (6, 3)]
        assert dataset.train.table.dtype == np.float32
        held = dataset.val.table[:, 0].astype(int) - 1
        np.testing.assert_array_equal(dataset.val.images[:, 0], arrays["x_train"][held])
        assert data.load_npz(path, table=False).train.table is None

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"test_table": None}, "holds train_table, but not test_table"),
            ({"train_table": TABLE[:19]}, r"shape \(19, 3\).* each of the 20 images"),
            ({"train_table": TABLE[:, 0]}, "one row of numbers"),
            ({"test_table": TABLE[:6, :2]}, "as many columns"),
            ({"train_table": TABLE.astype(str)}, "dtype <U"),
            ({"test_table": np.full((6, 3), np.inf)}, "infinity"),
        ],
    )
    def test_bad_tables(self, tmp_path, change, message):
        arrays = {"x_train": images(20, 8, 8), "y_train": labels(20), "x_test": images(6, 8, 8), "y_test": labels(6)}
        arrays |= {"train_table": self.TABLE, "test_table": self.TABLE[:6]} | change
        path = write_npz(tmp_path / "t.npz", **{name: value for name, value in arrays.items() if value is not None})
        with pytest.raises(ValueError, match=message):
            data.load_npz(path)

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
            change = name and augment.AUGMENTATIONS[name].apply
            rng = np.random.default_rng(0)
            batch = data.batches(
                split, 4, normalise=data.Normalise.fit(split.images), rng=rng, augment=change
            )
            x, _ = next(batch)
            assert x.shape == (4, 3, 5, 7)
            assert np.moveaxis(x, 1, -1).flags.c_contiguous, name

    def test_errors(self):
        with pytest.raises(ValueError, match="batch_size is 0"):
            next(data.batches(self.SPLIT, 0, normalise=self.identity))
        with pytest.raises(ValueError, match="augment needs rng"):
            next(data.batches(self.SPLIT, 2, normalise=self.identity, augment=augment.flip))

    @pytest.mark.parametrize("classes", [(9, 1), (50, 3, 17)])
    def test_balanced_sampling(self, classes):
        truth = np.repeat(np.arange(len(classes)), classes)
        split = data.Split(np.zeros((len(truth), 1, 2), np.uint8), truth)
        weights, total = data.balanced_weights(truth), np.zeros(len(truth))
        for seed in range(200):
            numbered = data.Split(split.images, np.arange(len(truth)))
            rng = np.random.default_rng(seed)
            drawn = [y for _, y in data.batches(numbered, 4, normalise=self.identity, rng=rng, weights=weights)]
            counts = np.bincount(np.concatenate(drawn), minlength=len(truth))
            total += counts
            expected = len(truth) / len(classes) / np.array(classes)[truth]
            assert counts.sum() == len(truth)
            assert (np.floor(expected) <= counts).all()
            assert (counts <= np.ceil(expected)).all()
            per_class = np.bincount(truth, counts)
            assert np.abs(per_class - len(truth) / len(classes)).max() <= 1
        # 200 draws that are 0 or 1 above the floor: a standard deviation of at most 0.5 / sqrt(200) = 0.035.
        np.testing.assert_allclose(total / 200, expected, atol=0.15)

    def test_weights_decide_who_comes_and_are_shuffled(self):
        weights = np.where(np.arange(23) % 2, 1.0, 0.0)
        rng = np.random.default_rng(0)
        drawn = np.concatenate(
            [y for _, y in data.batches(self.SPLIT, 5, normalise=self.identity, rng=rng, weights=weights)]
        )
        assert set(drawn) == set(range(1, 23, 2))
        assert (np.diff(drawn) < 0).sum() > 5
        for bad in (np.ones(22), np.full(23, -1.0), np.zeros(23), np.full(23, np.nan)):
            with pytest.raises(ValueError, match="but 23 finite numbers of at least 0"):
                next(data.batches(self.SPLIT, 2, normalise=self.identity, rng=rng, weights=bad))
        with pytest.raises(ValueError, match="weights needs rng"):
            next(data.batches(self.SPLIT, 2, normalise=self.identity, weights=weights))

    def test_tables_go_with_their_images(self):
        split = data.Split(self.SPLIT.images, self.SPLIT.labels, np.arange(46, dtype=np.float32).reshape(23, 2))
        rest, held = data.hold_out(split, 0.3, seed=1)
        for part in (rest, held):
            for (x, table), y in data.batches(part, 4, normalise=self.identity, rng=np.random.default_rng(2)):
                np.testing.assert_array_equal(x, self.SPLIT.images[y])
                np.testing.assert_array_equal(table, np.stack([2 * y, 2 * y + 1], axis=1))

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

    def test_stops_and_restores_the_best_epoch(self):
        net, seen = small_net(), []
        # So large a learning rate that the validation loss goes up and down.
        stopping = stop.EarlyStopping("loss", patience=2)
        history = self.fit(net, 40, val=self.VAL, stopping=stopping, optimizer=optim.AdamW(net.parameters(), lr=0.1),
                           after_epoch=lambda records: seen.append(net.state_dict()))
        losses = [record.val_loss for record in history]
        best = int(np.argmin(losses))
        assert len(history) == len(seen) == best + 1 + 2 < 40
        assert (stopping.best_epoch, stopping.best) == (best + 1, losses[best])
        assert_same_bits(net.state_dict(), seen[best])
        assert loop.evaluate(net, self.VAL, normalise=self.NORMALISE).loss == losses[best]
        with pytest.raises(ValueError, match="stopping is given without val"):
            self.fit(net, 1, stopping=stopping)

    def test_divergence_is_reported(self):
        net = small_net()
        with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) in epoch 1, step .*lower the learning"):
            self.fit(net, 9, optimizer=optim.SGD(net.parameters(), lr=1e30))


class TestEarlyStopping:
    """What epoch is the best, and when it stops, for values of the validation part from epoch to epoch."""

    NAN = float("nan")

    @pytest.mark.parametrize(
        ("settings", "values", "best", "stopped"),
        [
            ({"monitor": "loss"}, [3, 1, 2, 2, 2, 2, 2], 2, None),
            ({"monitor": "loss", "patience": 2}, [3, 1, 2, 0.5, 1, 1, 0], 4, 6),
            ({"monitor": "auc", "patience": 3}, [0.5, 0.7, 0.7, 0.6, 0.7, 0.9], 2, 5),
            ({"monitor": "accuracy", "patience": 1}, [0.5, 0.6, 0.6], 2, 3),
            ({"monitor": "loss", "patience": 2, "min_delta": 0.1}, [1, 0.95, 0.92, 0.5], 1, 3),
            ({"monitor": "auc", "patience": 2}, [NAN, NAN, 0.4, 0.3, NAN], 3, 5),
        ],
    )
    def test_best_and_end(self, settings, values, best, stopped):
        stopping = stop.EarlyStopping(**settings)
        for epoch, value in enumerate(values, 1):
            record = loop.EpochRecord(epoch, 0.1, 1.0, 1.0, 0.5, **{f"val_{settings['monitor']}": value})
            stopping.update(record, nn.Sequential(nn.Linear(1, 1, rng=epoch)))
            assert stopping.done == (epoch == stopped)
            if stopping.done:
                break
        assert (stopping.best_epoch, stopping.best) == (best, values[best - 1])
        net = nn.Sequential(nn.Linear(1, 1))
        stopping.restore(net)
        assert_same_bits(net.state_dict(), nn.Sequential(nn.Linear(1, 1, rng=best)).state_dict())

    def test_before_the_first_epoch_there_is_nothing_to_restore(self):
        net = nn.Sequential(nn.Linear(1, 1, rng=3))
        stop.EarlyStopping().restore(net)
        assert_same_bits(net.state_dict(), nn.Sequential(nn.Linear(1, 1, rng=3)).state_dict())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"monitor": "f1"}, "monitor is 'f1', but one of loss, accuracy, auc"),
            ({"patience": 0}, "patience is 0, but at least 1"),
            ({"min_delta": -1.0}, "min_delta is -1.0"),
        ],
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            stop.EarlyStopping(**settings)


def test_cnn3d_has_the_parameters_that_it_promises():
    net = cnn3d()
    assert net.num_parameters() == 27 * (1 * 8 + 8 * 16 + 16 * 32) + 2 * (8 + 16 + 32) + 32 * 2 + 2 == 17_674
    x = np.zeros((2, 1, 9, 10, 11), np.float32)
    assert net(x).shape == (2, 2)
    assert net.forward(x)[0].shape == (2, 2)
