"""Runs that are stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_cases import assert_same_bits, images, labels, small_net, striped, without_times, write_npz

from fastconv import models, nn
from fastconv.training import augment, checkpoint, loop, run


@pytest.fixture
def stripes_npz(tmp_path: Path) -> Path:
    train, test = striped(150), striped(40, seed=2)
    return write_npz(
        tmp_path / "stripes.npz",
        x_train=train.images[:, 0], y_train=train.labels, x_test=test.images[:, 0], y_test=test.labels,
    )  # fmt: skip


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

        self.stop_in_the_second_epoch(recipe, stopped, monkeypatch, steps_per_epoch=5)
        resumed = run.Run.resume(stopped, {})
        assert len(resumed.history) == 1
        resumed.train(stopped)
        states = [without_times(checkpoint.load_checkpoint(path)) for path in (straight, stopped)]
        assert len(states[0]["history"]) == 3
        assert_same_bits(*states)

    def stop_in_the_second_epoch(self, recipe, path, monkeypatch, steps_per_epoch):
        step, steps = loop.train_step, []

        def interrupted(*args: object, **kwargs: object) -> object:
            steps.append(1)
            if len(steps) == steps_per_epoch + 3:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        monkeypatch.setattr(loop, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.Run(recipe).train(path)
        monkeypatch.setattr(loop, "train_step", step)
        nn.seed(99)  # a new process would not have the state of the old one's generator

    def test_bit_for_bit_with_everything_on(self, tmp_path, monkeypatch):
        """A table, every augmentation, balanced sampling, a schedule, dropout, and an early end at the best epoch."""
        pytest.importorskip("scipy")
        rng, parts = np.random.default_rng(3), {}
        for part, count in (("train", 130), ("val", 40), ("test", 40)):
            split = striped(count, seed=count)
            keep = np.flatnonzero((split.labels == 0) | (np.arange(count) % 3 == 0))  # fewer of class 1
            table = rng.standard_normal((len(keep), 2))
            table[::7, 1] = np.nan
            parts |= {f"{part}_images": split.images[keep, 0], f"{part}_table": table,
                      f"{part}_labels": split.labels[keep] ^ (rng.random(len(keep)) < 0.2)}  # some are wrong
        path = write_npz(tmp_path / "all.npz", **parts)
        steps_per_epoch = -(-len(parts["train_labels"]) // 16)
        recipe = run.Recipe(
            "stripes", str(path), epochs=30, batch_size=16, lr=0.02, augment=tuple(augment.AUGMENTATIONS),
            sampling="balanced", select="auc", patience=3, seed=5,
        )  # fmt: skip
        straight, stopped = tmp_path / "straight.npz", tmp_path / "stopped.npz"
        whole = run.Run(recipe)
        whole.train(straight)
        assert 4 < len(whole.history) < 30, "patience did not end it, so that it tests nothing"

        self.stop_in_the_second_epoch(recipe, stopped, monkeypatch, steps_per_epoch)
        for stops_again in range(3):  # after an epoch each time
            once = run.Run.resume(stopped, {})
            assert len(once.history) == 1 + stops_again
            save = once.save

            def save_and_stop(target, save=save):
                save(target)
                raise KeyboardInterrupt

            monkeypatch.setattr(once, "save", save_and_stop)
            with pytest.raises(KeyboardInterrupt):
                once.train(stopped)
            nn.seed(99)
        resumed = run.Run.resume(stopped, {})
        resumed.train(stopped)
        states = [without_times(checkpoint.load_checkpoint(path)) for path in (straight, stopped)]
        assert states[0]["stopping"]["best_epoch"] == len(whole.history) - 3
        assert_same_bits(*states)
        assert_same_bits(whole.model.state_dict(), resumed.model.state_dict())
        # The checkpoint goes on from the last weights; the network that is handed over has the best.
        assert_same_bits(resumed.model.state_dict(), states[0]["stopping"]["weights"])
        last, best = (b"".join(v.tobytes() for v in weights.values())
                      for weights in (states[0]["model"], states[0]["stopping"]["weights"]))
        assert last != best
        # Resumed when all is done, it trains no more and has the best weights again.
        again = run.Run.resume(stopped, {})
        again.train(stopped)
        assert_same_bits(again.model.state_dict(), whole.model.state_dict())
        assert_same_bits(without_times(checkpoint.load_checkpoint(stopped)), states[0])

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
