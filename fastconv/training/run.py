"""A training run that can be stopped and resumed bit for bit: what `fastconv train` does."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastconv import models
from fastconv.nn import Layer, Sequential, init
from fastconv.training.augment import parse
from fastconv.training.checkpoint import load_checkpoint, save_checkpoint
from fastconv.training.data import Normalise, balanced_weights, batches, load_npz
from fastconv.training.loop import EpochRecord, evaluate, fit
from fastconv.training.metrics import Evaluation
from fastconv.training.optim import SGD, Adam, AdamW, CosineLR, MultiStepLR, Optimizer, Schedule
from fastconv.training.progress import Progress
from fastconv.training.stopping import EarlyStopping

__all__ = ["OPTIMIZERS", "SAMPLINGS", "SCHEDULES", "Recipe", "Run"]


# How to make it, and the learning rate that suits it.
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float]] = {
    "adamw": (AdamW, 2e-3),
    "adam": (Adam, 2e-3),
    "sgd": (partial(SGD, momentum=0.9, nesterov=True), 2e-2),
}

SCHEDULES: dict[str, Callable[[Optimizer, int], Schedule]] = {
    "cosine": lambda optimizer, steps: CosineLR(optimizer, steps, warmup_steps=steps // 20),
    "step": lambda optimizer, steps: MultiStepLR(optimizer, [steps // 2, 3 * steps // 4]),
    "constant": lambda optimizer, steps: MultiStepLR(optimizer, []),
}

# The weights with which images are drawn, from the labels.
SAMPLINGS: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
    "each-once": lambda labels: None,
    "balanced": balanced_weights,
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result of a run.

    `options` are further arguments of the network's function, such as ``{"width": 0.5, "stem": "small"}``. `lr` None
    is the optimizer's own in `OPTIMIZERS`. For `augment` see `fastconv.training.augment.parse`. `select` and `patience`
    are monitor and patience of `EarlyStopping`, which there is if one of them is given. For `table` and `size` see
    `fastconv.training.load_npz`. `device` is "cpu" or "cuda", see `fastconv.nn.Layer.to`.
    """

    model: str
    data: str
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    schedule: str = "cosine"
    augment: tuple[str, ...] = ()
    sampling: str = "each-once"
    select: str | None = None
    patience: int | None = None
    table: bool = True
    size: int | None = None
    val_fraction: float = 0.1
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        parts = [
            f"{self.optimizer} at {self.learning_rate:g}",
            f"{self.schedule} schedule",
            f"batches of {self.batch_size}",
            f"seed {self.seed}",
            *self.augment,
            *([f"{self.sampling} sampling"] if self.sampling != "each-once" else []),
            *([f"best epoch by validation {self.monitor}"] if self.monitor else []),
            *([f"patience {self.patience}"] if self.patience else []),
            *(["on the GPU"] if self.device == "cuda" else []),
        ]
        return ", ".join(parts)

    @property
    def learning_rate(self) -> float:
        return OPTIMIZERS[self.optimizer][1] if self.lr is None else self.lr

    @property
    def monitor(self) -> str | None:
        """What `EarlyStopping` watches, if it is wanted."""
        return self.select or ("loss" if self.patience else None)


class Run:
    """A recipe with its data, network and optimizer, after `len(history)` epochs.

    Raises
    ------
    OSError, ValueError
        The data cannot be read, or the network is not for data of that shape.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.dataset = load_npz(recipe.data, val_fraction=recipe.val_fraction, seed=recipe.seed, table=recipe.table,
                                size=recipe.size)
        if recipe.monitor and self.dataset.val is None:
            raise ValueError(f"{recipe.data}: has no validation part to choose the best epoch on. "
                             "Hint: a val_fraction above 0")
        self.augment = parse(recipe.augment) if recipe.augment else None
        self.normalise = Normalise.fit(self.dataset.train.images)
        init.seed(recipe.seed)
        self.model = self._build().to(recipe.device)
        self.optimizer = OPTIMIZERS[recipe.optimizer][0](self.model.parameters(), lr=recipe.learning_rate)
        steps = recipe.epochs * -(-len(self.dataset.train) // recipe.batch_size)
        self.schedule = SCHEDULES[recipe.schedule](self.optimizer, steps)
        self.stopping = EarlyStopping(recipe.monitor, recipe.patience) if recipe.monitor else None
        self.history: list[EpochRecord] = []

    @classmethod
    def resume(cls, path: str | Path, changes: dict[str, Any]) -> Run:
        """Rebuild the run that wrote the checkpoint at `path`.

        Parameters
        ----------
        path
            What `save` wrote.
        changes
            Fields of the recipe to check against it. Only three may differ: `data`, if the file has moved, `device`,
            and `epochs`; with more or fewer epochs a schedule that depends on them goes on along the
            curve of the new number.

        Raises
        ------
        OSError, ValueError
            The checkpoint or the data cannot be read, do not belong together, or `changes` asks for
            another recipe.
        """
        state = load_checkpoint(path)
        try:
            stored = state["recipe"]
            recipe = Recipe(**stored | {"augment": tuple(stored["augment"])})
            for name, value in changes.items():
                if name not in ("data", "device", "epochs") and value != getattr(recipe, name):
                    raise ValueError(
                        f"it was made with {name} {getattr(recipe, name)!r}, but {value!r} is given. "
                        "Hint: leave it out, or start anew with another --out"
                    )
            run = cls(replace(recipe, **changes))
            if run._fingerprint() != state["data"]:
                raise ValueError(f"it was trained on other data than {run.recipe.data}")
            run._restore(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: cannot resume: {error}") from error
        return run

    def save(self, path: str | Path) -> None:
        """Write a checkpoint; see `fastconv.training.checkpoint.save_checkpoint`."""
        save_checkpoint(
            path,
            {
                "recipe": asdict(self.recipe),
                "data": self._fingerprint(),
                "normalise": asdict(self.normalise),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "stopping": self.stopping and self.stopping.state_dict(),
                "rng": {name: rng.bit_generator.state for name, rng in self._generators().items()},
                "history": [asdict(record) for record in self.history],
            },
        )

    def train(self, checkpoint: str | Path) -> None:
        """Train until the recipe's epochs are done or `stopping` ends it, writing `checkpoint` after each epoch.

        With `stopping` the model has the weights of the best epoch then; the checkpoint holds them beside the last.
        """
        if not self.history:
            self.save(checkpoint)

        def after_epoch(history: list[EpochRecord]) -> None:
            self.history = list(history)
            self.save(checkpoint)

        with Progress(self.recipe.epochs) as progress:
            fit(
                self.model,
                self.dataset.train,
                self.optimizer,
                self.recipe.epochs,
                normalise=self.normalise,
                val=self.dataset.val,
                batch_size=self.recipe.batch_size,
                schedule=self.schedule,
                augment=self.augment,
                weights=SAMPLINGS[self.recipe.sampling](self.dataset.train.labels),
                stopping=self.stopping,
                seed=self.recipe.seed,
                history=self.history,
                progress=progress,
                after_epoch=after_epoch,
            )

    def test(self) -> Evaluation:
        """Measure the network on the test part."""
        return evaluate(self.model, self.dataset.test, normalise=self.normalise)

    def _build(self) -> Layer:
        """The network, which one image has passed: many need images of some size, and not all say so themselves."""
        dataset, name, table = self.dataset, self.recipe.model, self.dataset.train.table
        try:
            model = models.create(name, dataset.in_channels, dataset.num_classes, dataset.input_size,
                                  **self.recipe.options)
            if table is not None:
                if not isinstance(model, Sequential):
                    raise ValueError(f"its table needs a Sequential to join, not a {type(model).__name__}. "
                                     "Hint: table=False, --no-table")
                model = models.WithCovariates(model, table.shape[1])
                model.fit(table)
            x, _ = next(batches(dataset.train, 1, normalise=self.normalise))
            model(x)
        except TypeError as error:
            if not self.recipe.options:
                raise
            raise ValueError(f"{name} does not take the options {self.recipe.options}: {error}") from error
        except ValueError as error:
            raise ValueError(
                f"{self.recipe.data}: {name} does not take images of {dataset.in_channels} x "
                f"{' x '.join(map(str, dataset.input_size))}: {error}; --size 32 crops or pads the images"
            ) from error
        return model

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.stopping is not None:
            self.stopping.load_state_dict(state["stopping"])
        for name, generator in self._generators().items():
            generator.bit_generator.state = state["rng"][name]
        known = {field.name for field in fields(EpochRecord)}
        self.history = [
            EpochRecord(**{name: value for name, value in record.items() if name in known})
            for record in state["history"]
        ]

    def _generators(self) -> dict[str, np.random.Generator]:
        """Whatever dropout and its like draw from: the generator of the process and those of layers."""
        own = {
            f"layer {name}.{attribute}": value
            for name, layer in self.model.named_layers()
            for attribute, value in vars(layer).items()
            if isinstance(value, np.random.Generator)
        }
        return {"process": init.default_rng} | own

    def _fingerprint(self) -> dict[str, Any]:
        train = self.dataset.train
        return {
            "shape": list(train.images.shape),
            "crc32": [zlib.crc32(array.tobytes()) for array in (train.images, train.labels, train.table)
                      if array is not None],
        }
