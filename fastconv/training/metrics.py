"""What a classifier's probabilities are worth: accuracy, confusion matrix and area under the ROC curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Evaluation", "auc", "confusion_matrix", "confusion_table"]


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model on one part of a data set.

    Attributes
    ----------
    loss
        Mean loss per image.
    probabilities
        (N, classes) float64, rows sum to 1.
    labels
        (N,) int64.
    """

    loss: float
    probabilities: np.ndarray
    labels: np.ndarray

    @property
    def accuracy(self) -> float:
        return float((self.probabilities.argmax(axis=1) == self.labels).mean())

    @property
    def auc(self) -> float:
        return auc(self.probabilities, self.labels)

    @property
    def confusion(self) -> np.ndarray:
        return confusion_matrix(
            self.probabilities.argmax(axis=1), self.labels, self.probabilities.shape[1]
        )


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count (true class, predicted class) pairs: (num_classes, num_classes) int64, rows are true."""
    counts = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def auc(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: of class 1 for two classes, else the mean of each class against the rest.

    The area is the Mann-Whitney statistic (Hanley & McNeil, Radiology 143, 29, 1982): the chance that a
    positive scores above a negative, ties counting one half. Classes that do not occur, or that no
    other class stands against, are left out of the mean; NaN if none is left.

    Parameters
    ----------
    probabilities
        (N, classes); any monotone score per class does.
    labels
        (N,) integers in [0, classes).
    """
    num_classes = probabilities.shape[1]
    classes = [1] if num_classes == 2 else range(num_classes)
    areas = [_binary_auc(probabilities[:, k], labels == k) for k in classes]
    defined = [area for area in areas if not np.isnan(area)]
    return float(np.mean(defined)) if defined else float("nan")


def _binary_auc(score: np.ndarray, positive: np.ndarray) -> float:
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives or np.isnan(score).any():
        return float("nan")
    # Equal scores share the mean of the ranks that they take up: scores 1 2 2 5 have ranks 1 2.5 2.5 4.
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    above = rank[positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def confusion_table(matrix: np.ndarray) -> str:
    """Format a confusion matrix; zeros are dots, so that the errors stand out."""
    cells = [["." if not count else str(count) for count in row] for row in matrix.tolist()]
    width = 1 + max(len(cell) for cell in [str(len(matrix) - 1), *(cell for row in cells for cell in row)])
    head = "true \\ predicted"
    lines = [head + "".join(f"{k:>{width}}" for k in range(len(matrix)))]
    lines += [f"{k:>{len(head)}}" + "".join(f"{cell:>{width}}" for cell in row) for k, row in enumerate(cells)]
    return "\n".join(lines)
