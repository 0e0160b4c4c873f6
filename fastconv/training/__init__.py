"""Data, optimisers, the training loop, metrics and checkpoints.

`fastconv.training.run` holds what `fastconv train` does.
"""

from fastconv.training.checkpoint import load_checkpoint, save_checkpoint
from fastconv.training.data import Dataset, Normalise, Split, batches, flip, hold_out, load_npz, shift
from fastconv.training.loop import EpochRecord, evaluate, fit, train_step
from fastconv.training.metrics import Evaluation, auc, confusion_matrix, confusion_table
from fastconv.training.optim import SGD, Adam, AdamW, CosineLR, MultiStepLR, StepLR
from fastconv.training.progress import Progress

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CosineLR",
    "Dataset",
    "EpochRecord",
    "Evaluation",
    "MultiStepLR",
    "Normalise",
    "Progress",
    "Split",
    "StepLR",
    "auc",
    "batches",
    "confusion_matrix",
    "confusion_table",
    "evaluate",
    "fit",
    "flip",
    "hold_out",
    "load_checkpoint",
    "load_npz",
    "save_checkpoint",
    "shift",
    "train_step",
]
