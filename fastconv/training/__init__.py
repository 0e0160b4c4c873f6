"""Data, optimisers, the training loop, metrics and checkpoints.

`fastconv.training.run` holds what `fastconv train` does.
"""

from fastconv.training.augment import affine, flip, gain, gamma, mirror, noise, offset, rotate, scale, shift
from fastconv.training.checkpoint import load_checkpoint, save_checkpoint
from fastconv.training.data import Dataset, Normalise, Split, balanced_weights, batches, hold_out, load_npz
from fastconv.training.loop import EpochRecord, evaluate, fit, train_step
from fastconv.training.metrics import Evaluation, auc, confusion_matrix, confusion_table
from fastconv.training.optim import SGD, Adam, AdamW, CosineLR, MultiStepLR, StepLR
from fastconv.training.progress import Progress
from fastconv.training.stopping import EarlyStopping

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CosineLR",
    "Dataset",
    "EarlyStopping",
    "EpochRecord",
    "Evaluation",
    "MultiStepLR",
    "Normalise",
    "Progress",
    "Split",
    "StepLR",
    "affine",
    "auc",
    "balanced_weights",
    "batches",
    "confusion_matrix",
    "confusion_table",
    "evaluate",
    "fit",
    "flip",
    "gain",
    "gamma",
    "hold_out",
    "load_checkpoint",
    "load_npz",
    "mirror",
    "noise",
    "offset",
    "rotate",
    "save_checkpoint",
    "scale",
    "shift",
    "train_step",
]
