"""`fastconv demo`: LeNet-5 on real digits, measured and drawn. Needs the extra "demo"."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np

import fastconv
from fastconv import plots
from fastconv.functional import conv2d
from fastconv.models import lenet5
from fastconv.nn import Sequential
from fastconv.profiling import profile
from fastconv.resize import resize
from fastconv.training.augment import shift
from fastconv.training.data import Dataset, Normalise, Split, batches, hold_out
from fastconv.training.loop import EpochRecord, evaluate, fit, train_step
from fastconv.training.metrics import confusion_table
from fastconv.training.optim import AdamW, CosineLR
from fastconv.training.progress import Progress
from fastconv.watch import layer_outputs

__all__ = ["FILTERS", "digits", "filter_image", "run"]

BATCH_SIZE = 32
LEARNING_RATE = 2e-3

_BINOMIAL = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1], np.float32) / 256  # a Gaussian of variance 2
_SOBEL = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32) / 4

# The filters that a course on image processing begins with.
FILTERS: dict[str, np.ndarray] = {
    "box 9x9": np.full((9, 9), 1 / 81, np.float32),
    "Gaussian 9x9": np.outer(_BINOMIAL, _BINOMIAL),
    "sharpen 3x3": np.array([[0, -1, 0], [-1, 5, -1], [0, -1, 0]], np.float32),
    "Sobel, across": _SOBEL,
    "Sobel, down": _SOBEL.T,
    "Laplace 3x3": np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], np.float32),
}


def run(out: str | Path = "fastconv-demo", *, epochs: int = 12, seed: int = 0) -> float:
    """Train, measure and draw; returns the test accuracy.

    Parameters
    ----------
    out
        Folder for the pictures; made if it is not there.
    epochs
        Passes over the training digits.
    seed
        Of initial weights, order and augmentation; the division into parts is always the same.

    Raises
    ------
    ImportError
        scikit-learn, matplotlib or pillow is missing.
    OSError
        `out` cannot be written.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    plots.check_matplotlib()
    photo = sample_photo()
    dataset = digits()
    normalise = Normalise.fit(dataset.train.images)
    model = lenet5(dataset.in_channels, dataset.num_classes, dataset.input_size, rng=seed)
    threads = fastconv.get_num_threads()
    print(
        f"LeNet-5, {model.num_parameters():,} parameters, on scikit-learn's digits (8x8, enlarged to 32x32): "
        f"{len(dataset.train)} to train, {len(dataset.val or ())} to validate, {len(dataset.test)} to test; "
        f"{threads} thread{'s' * (threads > 1)}"
    )

    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = epochs * -(-len(dataset.train) // BATCH_SIZE)
    start = time.perf_counter()
    with Progress(epochs) as progress:
        history = fit(
            model, dataset.train, optimizer, epochs,
            normalise=normalise, val=dataset.val, batch_size=BATCH_SIZE,
            schedule=CosineLR(optimizer, steps), augment=shift, seed=seed, progress=progress,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    test = evaluate(model, dataset.test, normalise=normalise)
    print(f"\ntest accuracy {test.accuracy:.2%}, AUC {test.auc:.4f}, trained in {seconds:.1f} s\n")
    print(confusion_table(test.confusion))
    print()
    _measure(model, dataset, normalise)
    _draw(out, model, dataset, normalise, history, test.confusion, photo)
    print(f"\npictures in {out.resolve()}")
    for path in sorted(out.glob("*.png")):
        print(f"  {path.name}")
    return test.accuracy


def digits(size: tuple[int, ...] = (32, 32)) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998), enlarged from 8x8 to `size`.

    32x32 is the input of the paper's LeNet-5. 360 digits are for the test and 144 for validation.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(_needs("scikit-learn")) from error
    images, labels = load_digits(return_X_y=True)
    images = resize(images.reshape(-1, 1, 8, 8).astype(np.float32), size)
    rest, test = hold_out(Split(images, labels.astype(np.int64)), 0.2, seed=0)
    train, val = hold_out(rest, 0.1, seed=0)
    return Dataset(train, val, test, 10)


def sample_photo() -> np.ndarray:
    """A square of 400x400 pixels of scikit-learn's photograph of a Chinese temple, (H, W, 3) in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_image

        image = load_sample_image("china.jpg")
    except ImportError as error:  # scikit-learn decodes the file by pillow
        raise ImportError(_needs("scikit-learn and pillow")) from error
    return image[:400, 120:520].astype(np.float32) / 255


def _needs(packages: str) -> str:
    return f'fastconv demo needs {packages}. Hint: pip install "fastconv[demo]"'


def filter_image(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Filter each channel of an image (H, W, C) float32 by `kernel` (h, w), the border repeated outwards."""
    channels = image.shape[2]
    x = np.moveaxis(image, 2, 0)[None]  # (1, C, H, W) as a view: the memory stays channels_last
    weight = np.broadcast_to(kernel, (channels, 1, *kernel.shape))
    y = conv2d(x, weight, padding="same", padding_mode="replicate", groups=channels)
    return np.moveaxis(y[0], 0, 2)


def _measure(model: Sequential, dataset: Dataset, normalise: Normalise) -> None:
    """Print the table of the layers and the time of the same step by the NumPy reference."""
    x, labels = next(batches(dataset.train, BATCH_SIZE, normalise=normalise))
    print(f"one training step, batch of {BATCH_SIZE}, layer by layer:")
    print(profile(model, x, repeats=20))

    def step_seconds(repeats: int) -> float:
        trained = copy.deepcopy(model)
        optimizer = AdamW(trained.parameters(), lr=LEARNING_RATE)
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            train_step(trained, optimizer, x, labels)
            times.append(time.perf_counter() - start)
        return min(times[1:])  # the first one makes the plans

    compiled = step_seconds(20)
    with fastconv.config(algorithm="reference"):
        reference = step_seconds(3)
    print(
        f"\nthe whole step with loss and optimizer: {compiled * 1e3:.2f} ms; "
        f"with the convolutions of the NumPy reference: {reference * 1e3:.1f} ms "
        f"({reference / compiled:.0f} times as long)"
    )


def _draw(
    out: Path,
    model: Sequential,
    dataset: Dataset,
    normalise: Normalise,
    history: list[EpochRecord],
    confusion: np.ndarray,
    photo: np.ndarray,
) -> None:
    plots.learning_curve(history, out / "learning_curve.png")
    plots.confusion(confusion, out / "confusion_matrix.png")
    plots.filters(model.state_dict()["c1.weight"], out / "first_layer_filters.png", "Filters of the first layer, C1")

    fives = dataset.test[dataset.test.labels == 5]
    x, _ = next(batches(fives, 1, normalise=normalise))
    layers = {"relu1": "C1", "s2": "S2", "relu3": "C3", "s4": "S4"}  # as the paper calls them
    maps = {layers[name]: y[0] for name, y in layer_outputs(model, x, layers).items()}
    plots.feature_maps(x[0, 0], maps, out / "feature_maps.png")

    shown = {"photograph": photo}
    filtered = {name: filter_image(photo, kernel) for name, kernel in FILTERS.items()}
    for name in ("box 9x9", "Gaussian 9x9", "sharpen 3x3"):
        shown[name] = filtered[name]
    across, down, laplace = (
        filtered[name].mean(axis=2) for name in ("Sobel, across", "Sobel, down", "Laplace 3x3")
    )
    # Signed answers: grey is 0.
    shown["Sobel, across"], shown["Sobel, down"] = 0.5 + across, 0.5 + down
    shown["edges: length of both"] = 2 * np.hypot(across, down)
    shown["Laplace 3x3"] = 0.5 + laplace
    plots.pictures(shown, out / "image_filters.png", "Filters by convolution")
