"""What is measured of each network: cost, training, and learning from few images. Each returns what is saved."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from fastconv.compare.data import Prepare, balanced_order
from fastconv.compare.networks import NETWORKS, build, input_size_of
from fastconv.nn import Layer
from fastconv.summary import summarize
from fastconv.training import (
    AdamW,
    CosineLR,
    Dataset,
    Evaluation,
    Normalise,
    Progress,
    Split,
    batches,
    evaluate,
    fit,
    shift,
    train_step,
)

__all__ = [
    "BATCH_SIZE", "FEW_EPOCHS", "FEW_METHODS", "FEW_NETWORK", "FEW_REPEATS", "FEW_SIZES", "FEW_STEPS", "cost",
    "few_images", "train",
]

BATCH_SIZE = 32
WEIGHT_DECAY = 1e-2

FEW_STEPS, FEW_EPOCHS = 200, 10
FEW_REPEATS = 3
FEW_SIZES = (50, 100, 200, 400, 800, 1600, 3200)
FEW_NETWORK = "lenet5"


def cost(name: str, dataset: Dataset, seed: int) -> dict[str, Any]:
    """Parameters, operations, memory and times of a network.

    Returns
    -------
    dict
        ``parameters`` and, for one image, ``macs`` and ``activation_bytes`` by count; ``peak_bytes``, the most memory
        that the arrays of a training step with `BATCH_SIZE` images took beside weights and optimizer; and measured
        seconds for each image: ``inference_1``, ``inference_batch``, ``training_1``, ``training_batch``.
    """
    model, prepare = _model(name, dataset, seed)
    summary = summarize(model, (dataset.in_channels, *prepare.size))
    x, labels = next(batches(dataset.train, BATCH_SIZE, normalise=prepare))
    optimizer = AdamW(model.parameters(), lr=0.0)
    train_step(model, optimizer, x, labels)  # makes plans and the optimizer's state
    tracemalloc.start()
    train_step(model, optimizer, x, labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "input_size": list(prepare.size),
        "parameters": model.num_parameters(),
        "macs": summary.macs,
        "activation_bytes": summary.activation_bytes,
        "peak_bytes": peak,
        "inference_1": _seconds(lambda: model(x[:1])),
        "inference_batch": _seconds(lambda: model(x)) / len(x),
        "training_1": _seconds(lambda: train_step(model, optimizer, x[:1], labels[:1])),
        "training_batch": _seconds(lambda: train_step(model, optimizer, x, labels)) / len(x),
    }


def _model(name: str, dataset: Dataset, seed: int) -> tuple[Layer, Prepare]:
    model = build(name, dataset.in_channels, dataset.num_classes, dataset.input_size, seed)
    return model, Prepare(Normalise.fit(dataset.train.images), input_size_of(NETWORKS[name], dataset.input_size))


def _seconds(run: Callable[[], object], budget: float = 0.3) -> float:
    """The fastest of at least three runs, and of as many as `budget` seconds allow: the least disturbed one."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def train(name: str, dataset: Dataset, *, epochs: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Train a network on the training part, with the validation part after each epoch, and test it.

    AdamW with the network's learning rate, which rises for a twentieth of the steps and falls along a cosine;
    training images are moved at random by up to 1/14 of their size.

    Returns
    -------
    dict
        ``history``, ``accuracy``, ``auc``, ``confusion`` and ``seconds``; or only ``diverged``, a message.
    """
    start = time.perf_counter()
    model, prepare = _model(name, dataset, seed)
    try:
        history = _fit(model, dataset.train, NETWORKS[name].lr, epochs, prepare, seed,
                       val=dataset.val, augment=shift, progress=progress)
    except FloatingPointError as error:
        return {"diverged": str(error)}
    return {"history": [asdict(record) for record in history], "seconds": time.perf_counter() - start,
            **_result(evaluate(model, dataset.test, normalise=prepare))}


def _fit(model: Layer, split: Split, lr: float, epochs: int, prepare: Prepare, seed: int, **options: Any) -> list[Any]:
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(split) // BATCH_SIZE)
    return fit(model, split, optimizer, epochs, normalise=prepare, batch_size=BATCH_SIZE,
               schedule=CosineLR(optimizer, steps, warmup_steps=steps // 20), seed=seed, **options)


def _result(test: Evaluation) -> dict[str, Any]:
    return {"accuracy": test.accuracy, "auc": test.auc, "confusion": test.confusion}


def few_images(dataset: Dataset, size: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Test accuracy of LeNet-5 and of scikit-learn's classifiers after `size` training images.

    Each of `FEW_REPEATS` repeats draws its own images, in which the classes are about equally frequent, and all
    methods get the same ones. LeNet-5 takes at least `FEW_STEPS` steps and `FEW_EPOCHS` epochs.

    Returns
    -------
    dict
        ``accuracy``: for each of `FEW_METHODS` a list with one entry per repeat.
    """
    accuracy: dict[str, list[float]] = {name: [] for name in FEW_METHODS}
    for repeat in range(FEW_REPEATS):
        order = balanced_order(dataset.train.labels, np.random.default_rng((seed, repeat)))
        train = dataset.train[order[:size]]
        for done, (name, method) in enumerate(FEW_METHODS.items()):
            progress.step(1, repeat * len(FEW_METHODS) + done, FEW_REPEATS * len(FEW_METHODS), name)
            accuracy[name].append(method(train, dataset, seed + repeat))
    return {"accuracy": accuracy}


def _few_network(train: Split, dataset: Dataset, seed: int, **options: Any) -> float:
    model, prepare = _model(FEW_NETWORK, Dataset(train, None, dataset.test, dataset.num_classes), seed)
    epochs = max(FEW_EPOCHS, -(-FEW_STEPS * BATCH_SIZE // len(train)))
    _fit(model, train, NETWORKS[FEW_NETWORK].lr, epochs, prepare, seed, **options)
    return evaluate(model, dataset.test, normalise=prepare).accuracy


def _sklearn(make: Callable[[int], Any]) -> Callable[[Split, Dataset, int], float]:
    def method(train: Split, dataset: Dataset, seed: int) -> float:
        normalise = Normalise.fit(train.images)
        pixels, test = (normalise(part.images).reshape(len(part), -1) for part in (train, dataset.test))
        classifier = make(seed).fit(pixels, train.labels)
        return float(np.mean(classifier.predict(test) == dataset.test.labels))

    return method


def _svm(seed: int) -> Any:
    from sklearn.svm import SVC

    return SVC(C=10.0, random_state=seed)


def _logistic(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.01, max_iter=1000, random_state=seed)


def _forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(200, random_state=seed)


FEW_METHODS: dict[str, Callable[[Split, Dataset, int], float]] = {
    "LeNet-5 with shifts": lambda train, dataset, seed: _few_network(train, dataset, seed, augment=shift),
    "LeNet-5": _few_network,
    "support vector machine": _sklearn(_svm),
    "random forest": _sklearn(_forest),
    "logistic regression": _sklearn(_logistic),
}
"""``method(training images, data set, seed)`` gives the test accuracy."""
