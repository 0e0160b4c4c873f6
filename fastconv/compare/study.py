"""A comparison in parts, each of which is saved when it is done: what `fastconv compare` does."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

import fastconv
from fastconv.compare import measure
from fastconv.compare.data import DIGITS, balanced_order, fingerprint, load
from fastconv.compare.measure import BATCH_SIZE, FEW_EPOCHS, FEW_NETWORK, FEW_REPEATS, FEW_SIZES, FEW_STEPS
from fastconv.compare.networks import NETWORKS
from fastconv.info import rows as installation
from fastconv.training import Dataset, Progress, load_checkpoint, save_checkpoint

__all__ = ["PAIRS", "PAIR_SEEDS", "Plan", "Results", "Study", "few_sizes"]

PAIRS: dict[str, tuple[str, str]] = {
    "shortcuts": ("plain20", "resnet20"),
    "heads": ("googlenet", "googlenet_aux"),
}
"""Networks that differ in one thing. They are trained `PAIR_SEEDS` times, so that chance shows."""
PAIR_SEEDS = 3

FEWEST_IMAGES = 1000
"""To how many training images a comparison is cut before its epochs are."""
_MACHINE = ("Python", "CPU", "CPU caches", "ISA", "OpenMP", "threads", "settings")
_TRAINING_SHARE = 0.85  # of the time; the rest is for what is not predicted: scikit-learn and pictures


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result of a comparison, except for times.

    Attributes
    ----------
    data
        ``"digits"``, or the path of a ``.npz`` file as `load_npz` takes it.
    models
        Keys of `NETWORKS`.
    epochs
        Passes of each training over the training images; fewer if `minutes` do not suffice.
    minutes
        About how long all may take on this machine.
    seed
        Of weights, order, augmentation and the choice of images.
    date
        When the comparison was begun.
    """

    data: str = DIGITS
    models: tuple[str, ...] = tuple(NETWORKS)
    epochs: int = 10
    minutes: float = 10.0
    seed: int = 0
    date: str = ""


@dataclass(frozen=True)
class Results:
    """What a report is made of.

    Attributes
    ----------
    plan, dataset
        What was compared; the training part as it was cut.
    epochs, available
        Passes made, and the training images that there were before the cut.
    costs, runs, few
        By network; by network and seed; by number of training images. See `measure`.
    machine
        Rows of `fastconv info` that bear on times.
    seconds
        All parts together.
    """

    plan: Plan
    dataset: Dataset
    epochs: int
    available: int
    costs: dict[str, dict[str, Any]]
    runs: dict[str, list[dict[str, Any]]]
    few: dict[int, dict[str, Any]]
    machine: dict[str, str]
    seconds: float


class _PartProgress(Progress):
    """Progress over parts; the epochs of a training are steps of its part."""

    def __init__(self, parts: int, stream: TextIO | None) -> None:
        super().__init__(parts, stream)
        self._number, self._name, self._inner_epochs = 0, "", 1

    def start(self, number: int, name: str, epochs: int) -> None:
        self._number, self._name, self._inner_epochs = number, name, epochs

    def step(self, epoch: int, done: int, total: int, note: str = "") -> None:
        super().step(self._number, (epoch - 1) * total + done, self._inner_epochs * total, f"{self._name}  {note}")

    def epoch(self, epoch: int, summary: str) -> None:
        """An epoch within a part leaves no line."""

    def finish(self, summary: str) -> None:
        super().epoch(self._number, f"{self._name:<28}{summary}")

    def _head(self, epoch: int) -> str:
        return super()._head(epoch).replace("epoch", "part")


class Study:
    """A plan, its data, and the folder with the parts that are done.

    Parameters
    ----------
    plan
        What to compare.
    out
        Folder; parts are in ``out/parts``.

    Raises
    ------
    ImportError
        scikit-learn is missing.
    OSError, ValueError
        The data cannot be read, or a network is unknown.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        unknown = [name for name in plan.models if name not in NETWORKS]
        if unknown or not plan.models:
            raise ValueError(f"models: {', '.join(unknown) or 'nothing'} is given, but one or more of "
                             f"{', '.join(NETWORKS)} are needed. Hint: leave --models out to compare all")
        self.plan = replace(plan, models=tuple(name for name in NETWORKS if name in plan.models))
        self.folder = out / "parts"
        self.dataset = load(plan.data, plan.seed)
        self._done: dict[str, dict[str, Any]] = {}

    @classmethod
    def create(cls, plan: Plan, out: Path) -> Study:
        """Begin a comparison in a folder that holds none; raises ValueError otherwise."""
        if (out / "parts" / "plan.npz").exists():
            raise ValueError(f"{out} holds a comparison already. Hint: --resume goes on with it, or choose another "
                             "--out")
        study = cls(replace(plan, date=plan.date or datetime.date.today().isoformat()), out)
        study.folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(study._path("plan"), {"plan": asdict(study.plan), "data": fingerprint(study.dataset)})
        return study

    @classmethod
    def resume(cls, out: Path, changes: dict[str, Any]) -> Study:
        """Go on with the comparison in `out`; `changes` are fields of the plan, of which only `data` may differ."""
        state = load_checkpoint(out / "parts" / "plan.npz")
        plan = Plan(**state["plan"] | {"models": tuple(state["plan"]["models"])})
        for name, value in changes.items():
            if name != "data" and value != getattr(plan, name):
                raise ValueError(f"{out}: cannot resume: it was begun with {name} {getattr(plan, name)!r}, but "
                                 f"{value!r} is given. Hint: leave it out, or start anew with another --out")
        study = cls(replace(plan, **changes), out)
        if fingerprint(study.dataset) != state["data"]:
            raise ValueError(f"{out}: cannot resume: it was begun with other data than {study.plan.data}")
        return study

    def progress(self) -> tuple[int, int]:
        """Numbers of parts that are saved and of all parts."""
        names = self._parts()
        return sum(self._path(name).exists() for name in names), len(names)

    def run(self, stream: TextIO | None = None) -> Results:
        """Do the parts that are missing and return the results of all."""
        parts = self._parts()
        progress = _PartProgress(len(parts), stream)
        with progress:
            for number, (name, function) in enumerate(parts.items(), 1):
                progress.start(number, name, self._epochs if name.startswith("train") else 1)
                if self._path(name).exists():
                    self._done[name] = load_checkpoint(self._path(name))
                    continue
                start = time.perf_counter()
                result = function(progress)
                self._done[name] = result | {"part_seconds": time.perf_counter() - start}
                save_checkpoint(self._path(name), self._done[name])
                progress.finish(_summary(name, self._done[name]))
        size, models, sizes = self._done["size"], self.plan.models, few_sizes(self.plan, self.dataset)
        return Results(
            self.plan, self._cut(), size["epochs"], len(self.dataset.train),
            {name: self._done[f"cost {name}"] for name in models},
            {name: [self._done[f"train {name} {repeat}"] for repeat in range(_repeats(name, models))]
             for name in models},
            {n: self._done[f"few {n}"] for n in sizes}, size["machine"],
            sum(part["part_seconds"] for part in self._done.values()))

    def _parts(self) -> dict[str, Callable[[Progress], dict[str, Any]]]:
        """All parts in order: costs, from which follows how much there is time for, then trainings."""
        models = self.plan.models
        parts: dict[str, Callable[[Progress], dict[str, Any]]] = {
            f"cost {name}": partial(self._cost, name) for name in models}
        parts["size"] = self._size
        for repeat in range(PAIR_SEEDS):
            parts |= {f"train {name} {repeat}": partial(self._train, name, repeat)
                      for name in models if repeat < _repeats(name, models)}
        return parts | {f"few {n}": partial(self._few, n) for n in few_sizes(self.plan, self.dataset)}

    def _cost(self, name: str, _: Progress) -> dict[str, Any]:
        try:
            return measure.cost(name, self.dataset, self.plan.seed)
        except ValueError as error:
            size = " x ".join(map(str, self.dataset.input_size))
            raise ValueError(f"{self.plan.data}: {name} does not take images of {size}: {error}") from error

    def _train(self, name: str, repeat: int, progress: Progress) -> dict[str, Any]:
        return measure.train(name, self._cut(), epochs=self._epochs, seed=self.plan.seed + repeat, progress=progress)

    def _few(self, images: int, progress: Progress) -> dict[str, Any]:
        return measure.few_images(self.dataset, images, self.plan.seed, progress)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part.replace(' ', '-')}.npz"

    @property
    def _epochs(self) -> int:
        return int(self._done["size"]["epochs"])

    def _cut(self) -> Dataset:
        images = self._done["size"]["images"]
        order = balanced_order(self.dataset.train.labels, np.random.default_rng(self.plan.seed))
        return replace(self.dataset, train=self.dataset.train[np.sort(order[:images])])

    def _size(self, _: Progress) -> dict[str, Any]:
        """How many images and epochs there is time for, by the times measured, and the machine they hold for."""
        costs = {name: self._done[f"cost {name}"] for name in self.plan.models}
        images, epochs = len(self.dataset.train), self.plan.epochs
        val, test = len(self.dataset.val or ()), len(self.dataset.test)
        repeats = {name: _repeats(name, self.plan.models) for name in costs}
        few_seen = sum(max(FEW_STEPS * BATCH_SIZE, FEW_EPOCHS * n) for n in few_sizes(self.plan, self.dataset))
        few = 2 * FEW_REPEATS * few_seen * costs[FEW_NETWORK]["training_batch"] if few_seen else 0.0
        spent = sum(part["part_seconds"] for part in self._done.values())
        free = 60 * self.plan.minutes * _TRAINING_SHARE - few - spent

        def seconds(images: int, epochs: int) -> float:
            return sum(repeats[name] * (epochs * (images * cost["training_batch"] + val * cost["inference_batch"])
                                        + test * cost["inference_batch"]) for name, cost in costs.items())

        if seconds(images, epochs) > free:
            images = min(images, max(FEWEST_IMAGES, int(images * max(free, 0) / seconds(images, epochs))))
            epochs = max(1, min(epochs, int(epochs * max(free, 0) / seconds(images, epochs) + 1e-9)))
        machine = {"fastconv": fastconv.__version__} | {
            name: text for name, text in installation() if name in _MACHINE}
        return {"images": images, "epochs": epochs, "seconds": seconds(images, epochs), "machine": machine}


def few_sizes(plan: Plan, dataset: Dataset) -> list[int]:
    """Sizes of the training sets of `measure.few_images`, which double from 50 to 3200; none without LeNet-5."""
    available = len(dataset.train)
    if FEW_NETWORK not in plan.models:
        return []
    return sorted(n for n in {*FEW_SIZES, available} if n <= min(available, FEW_SIZES[-1]))


def _repeats(name: str, models: tuple[str, ...]) -> int:
    """How often a network is trained."""
    in_pair = any(name in pair and set(pair) <= set(models) for pair in PAIRS.values())
    return PAIR_SEEDS if in_pair else 1


def _summary(name: str, result: dict[str, Any]) -> str:
    """The line that stays of a part."""
    kind = name.partition(" ")[0]
    seconds = f"{result['part_seconds']:.1f} s"
    if kind == "cost":
        return (f"{result['parameters']:,} parameters  {result['macs'] / 1e6:.2f} M MACs  "
                f"{1e3 * result['training_batch']:.2f} ms to train on an image  |  {seconds}")
    if kind == "size":
        return (f"{result['images']:,} training images, {result['epochs']} epochs; "
                f"about {result['seconds'] / 60:.1f} min")
    if kind == "train":
        return (result.get("diverged") or
                f"test acc {result['accuracy']:.2%}  auc {result['auc']:.4f}") + f"  |  {seconds}"
    best = max(result["accuracy"].items(), key=lambda item: float(np.mean(item[1])))
    return f"best: {best[0]}, {np.mean(best[1]):.2%}  |  {seconds}"
