"""Early stopping: the weights of the best epoch, and an end when no better one comes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastconv.nn.layer import Layer

if TYPE_CHECKING:
    from fastconv.training.loop import EpochRecord

__all__ = ["MONITORS", "EarlyStopping"]

MONITORS = {"loss": -1, "accuracy": 1, "auc": 1}
"""What can be watched on the validation part, and whether more (1) or less (-1) of it is better."""


class EarlyStopping:
    """Keeps the weights of the epoch that was best on the validation part, and says when to stop (Prechelt 1998).

    Parameters
    ----------
    monitor : str
        What decides: ``"loss"``, ``"accuracy"`` or ``"auc"`` of the validation part.
    patience : int, optional
        Stop after so many epochs in a row without a better one; never if left out.
    min_delta : float
        By how much better counts as better.

    Attributes
    ----------
    best_epoch : int
        Number of the best epoch so far; 0 before the first.
    best : float
        Its value.
    done : bool
        Whether training should stop.

    Raises
    ------
    ValueError
        For another `monitor`, a `patience` below 1 or a `min_delta` below 0.
    """

    def __init__(self, monitor: str = "loss", patience: int | None = None, min_delta: float = 0.0) -> None:
        if monitor not in MONITORS:
            raise ValueError(f"EarlyStopping: monitor is {monitor!r}, but one of {', '.join(MONITORS)} is needed. "
                             "Hint: monitor='auc' for classes of different sizes")
        if patience is not None and patience < 1:
            raise ValueError(f"EarlyStopping: patience is {patience}, but at least 1 epoch is needed. "
                             "Hint: patience=None never stops")
        if not min_delta >= 0:
            raise ValueError(f"EarlyStopping: min_delta is {min_delta}, but at least 0 is needed. Hint: min_delta=0")
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self.best = math.nan
        self.best_epoch = 0
        self.done = False
        self._weights: dict[str, Any] = {}

    def update(self, record: EpochRecord, model: Layer) -> None:
        """Take note of an epoch and, if it is the best so far, copy the weights of `model`."""
        value = getattr(record, f"val_{self.monitor}")
        better = MONITORS[self.monitor] * (value - self.best) > self.min_delta
        if better or not self.best_epoch or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.best_epoch, self._weights = value, record.epoch, model.state_dict()
        self.done = self.patience is not None and record.epoch - self.best_epoch >= self.patience

    def restore(self, model: Layer) -> None:
        """Give `model` the weights of the best epoch, if there was one."""
        if self.best_epoch:
            model.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch, its value and its weights; the settings are not part of it."""
        return {"best": self.best, "best_epoch": self.best_epoch, "done": self.done, "weights": dict(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.best, self.best_epoch = float(state["best"]), int(state["best_epoch"])
        self.done, self._weights = bool(state["done"]), dict(state["weights"])
