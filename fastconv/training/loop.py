"""Training a classifier, and measuring it.

`fit` is the plain loop with shuffling, validation and a report; written out it is no more than

    for x, labels in batches(train, 64, normalise=normalise, rng=rng):
        logits, backward = model.forward(x)
        loss, dlogits = cross_entropy(logits, labels)
        backward(dlogits)
        optimizer.step()
        optimizer.zero_grad()

Networks may have several heads, such as GoogLeNet's auxiliary classifiers: ``forward`` then gives a tuple, the logits
first. Data may be pairs of images and rows of a table, for `fastconv.models.WithCovariates`. Both go through the same
few lines: `heads_loss` treats a single output as a tuple of one, and x is handed on as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastconv.arrays import to_device, to_host
from fastconv.functional.pointwise import softmax
from fastconv.models.googlenet import AUXILIARY_WEIGHT
from fastconv.nn import Layer, cross_entropy, heads_loss
from fastconv.nn.training_path import first_layers
from fastconv.training.data import Augment, Input, Split, batches
from fastconv.training.metrics import Evaluation
from fastconv.training.progress import Progress
from fastconv.training.stopping import EarlyStopping

__all__ = ["EpochRecord", "evaluate", "fit", "train_step"]

Loss = Callable[[np.ndarray, np.ndarray], tuple[Any, np.ndarray]]
"""``loss(logits, labels) -> (value, dlogits)`` of one output."""


class Optimizer(Protocol):
    """What `fit` needs of an optimizer; those of `fastconv.training.optim` have it."""

    lr: float

    def step(self) -> None: ...
    def zero_grad(self) -> None: ...


class Schedule(Protocol):
    """Changes the learning rate of its optimizer; `fit` calls it after every batch."""

    def step(self) -> None: ...


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch brought. Training numbers are means over the epoch, while the weights moved."""

    epoch: int
    lr: float
    seconds: float
    train_loss: float
    train_accuracy: float
    val_loss: float | None = None
    val_accuracy: float | None = None
    val_auc: float | None = None

    def summary(self) -> str:
        """One line for people."""
        text = f"loss {self.train_loss:.4f}  acc {self.train_accuracy:7.2%}"
        if self.val_loss is not None:
            text += (
                f"  |  val loss {self.val_loss:.4f}  acc {self.val_accuracy:7.2%}  auc {self.val_auc:.4f}"
            )
        return f"{text}  |  {self.seconds:.1f} s"


def train_step(
    model: Layer,
    optimizer: Optimizer,
    x: Input,
    labels: np.ndarray,
    *,
    loss: Loss = cross_entropy,
    head_weights: float | Sequence[float] = AUXILIARY_WEIGHT,
) -> tuple[float, np.ndarray]:
    """One step of gradient descent on a batch.

    Parameters
    ----------
    x
        Images (B, C, *spatial), or a pair of images and rows of a table: what the model takes.
    labels
        (B,) class indices.
    loss
        Of one output.
    head_weights
        The loss is that of the first output plus `head_weights` times that of each further one of ``forward``: 0.3
        as in GoogLeNet (Szegedy et al. 2015, section 5), or a number for each.

    Returns
    -------
    loss : float
        The weighted sum.
    logits : ndarray
        The first output, (B, classes).

    Raises
    ------
    ValueError
        `head_weights` is a sequence of another length than there are further outputs.
    """
    outputs, backward = model.forward(x)
    value, gradients = heads_loss(outputs, labels, head_weights, loss)
    backward(gradients)
    optimizer.step()
    optimizer.zero_grad()
    return float(value), outputs[0] if isinstance(outputs, tuple) else outputs


def fit(
    model: Layer,
    train: Split,
    optimizer: Optimizer,
    epochs: int,
    *,
    normalise: Callable[[np.ndarray], np.ndarray],
    val: Split | None = None,
    batch_size: int = 64,
    loss: Loss = cross_entropy,
    head_weights: float | Sequence[float] = AUXILIARY_WEIGHT,
    schedule: Schedule | None = None,
    augment: Augment | None = None,
    weights: np.ndarray | None = None,
    stopping: EarlyStopping | None = None,
    seed: int = 0,
    history: Iterable[EpochRecord] = (),
    progress: Progress | None = None,
    after_epoch: Callable[[list[EpochRecord]], None] | None = None,
) -> list[EpochRecord]:
    """Train `model` in place until `epochs` epochs are done and return their records.

    Data are in host memory; if the network is on a GPU (``model.to("cuda")``), each batch is copied there.

    Parameters
    ----------
    train
        Images and labels, and perhaps a table; then the model takes pairs.
    normalise
        Maps a batch of images (B, C, *spatial) to float32 input, see `fastconv.training.data.Normalise`.
    val
        Measured after every epoch; takes no part in the training.
    loss, head_weights
        See `train_step`. The validation part is measured on the logits alone.
    schedule
        Stepped after every batch.
    augment
        ``augment(images, rng) -> images``, applied to training batches; see `fastconv.training.augment`.
    weights
        (N,): how often each training image is drawn, see `batches`; without it each comes once an epoch.
    stopping
        Ends the training early, or not, and gives the model the weights of the best epoch in the end; needs `val`.
        `after_epoch` still sees those of the last one.
    seed
        Epoch e draws its order and augmentation from a generator seeded by (seed, e), whatever came
        before. So a run that is resumed at an epoch goes on as if it had never stopped.
    history
        Records of the epochs that are done; the first epoch to run is the one after them.
    after_epoch
        Called with the records so far after each epoch, for instance to write a checkpoint.

    Raises
    ------
    FloatingPointError
        The loss is NaN or infinite: the run has diverged.
    ValueError
        `stopping` is given without `val`, or an argument of `batches` or `train_step` does not fit.
    """
    if stopping is not None and val is None:
        raise ValueError("fit: stopping is given without val, but the best epoch is that on a validation part. "
                         "Hint: hold_out divides a part at random")
    records = list(history)
    steps = math.ceil(len(train) / batch_size)
    for epoch in range(len(records) + 1, epochs + 1):
        if stopping is not None and stopping.done:
            break
        start = time.perf_counter()
        rng = np.random.default_rng((seed, epoch))
        lr = optimizer.lr
        seen = correct = 0
        total = 0.0
        drawn = batches(train, batch_size, normalise=normalise, rng=rng, augment=augment, weights=weights)
        for step, (x, labels) in enumerate(drawn, 1):
            with _without_input_gradients(model):
                value, logits = train_step(model, optimizer, *_beside(model, x, labels), loss=loss,
                                           head_weights=head_weights)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"fit: the loss is {value} in epoch {epoch}, step {step}: training has diverged. "
                    f"Hint: lower the learning rate (it was {lr:g} at the start of the epoch)"
                )
            if schedule is not None:
                schedule.step()
            seen += len(labels)
            correct += int((to_host(logits.argmax(axis=1)) == labels).sum())
            total += value * len(labels)
            if progress is not None:
                progress.step(epoch, step, steps, f"loss {total / seen:.4f}  acc {correct / seen:.2%}")
        measured = None if val is None else evaluate(model, val, normalise=normalise, loss=loss)
        records.append(
            EpochRecord(
                epoch=epoch,
                lr=lr,
                seconds=time.perf_counter() - start,
                train_loss=total / seen,
                train_accuracy=correct / seen,
                val_loss=None if measured is None else measured.loss,
                val_accuracy=None if measured is None else measured.accuracy,
                val_auc=None if measured is None else measured.auc,
            )
        )
        if stopping is not None:
            stopping.update(records[-1], model)
        if after_epoch is not None:
            after_epoch(records)
        if progress is not None:  # last: an epoch that is reported is also saved
            progress.epoch(epoch, records[-1].summary())
    if stopping is not None:
        stopping.restore(model)
    return records


def _beside(model: Layer, x: Any, labels: np.ndarray) -> tuple[Any, Any]:
    """A batch where the network lies: on a GPU a copy."""
    if model.place == "cpu":
        return x, labels
    return tuple(map(to_device, x)) if isinstance(x, tuple) else to_device(x), to_device(labels)


@contextmanager
def _without_input_gradients(model: Layer) -> Iterator[None]:
    """Spare the layers that see the data the gradient of their input, which nobody reads."""
    spared = [layer for layer in first_layers(model) if layer.input_grad]
    for layer in spared:
        layer.input_grad = False
    try:
        yield
    finally:
        for layer in spared:
            layer.input_grad = True


def evaluate(
    model: Layer,
    split: Split,
    *,
    normalise: Callable[[np.ndarray], np.ndarray],
    batch_size: int = 256,
    loss: Loss = cross_entropy,
) -> Evaluation:
    """Run `model` in inference over a part of a data set; see `Evaluation` for what comes out."""
    logits, total = [], 0.0
    for x, labels in batches(split, batch_size, normalise=normalise):
        x, there = _beside(model, x, labels)
        outputs = model(x)
        logits.append(to_host(outputs))
        total += float(loss(outputs, there)[0]) * len(labels)
    probabilities = softmax(np.concatenate(logits).astype(np.float64), 1)
    return Evaluation(total / len(split), probabilities, split.labels)
