"""Names that other libraries, and older versions of them, give to the layers of the same networks."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import TypeVar

V = TypeVar("V")

# Pattern and replacement. `renamed` tries them on names that a layer does not know, one after the other.
FOREIGN_NAMES = (
    # torch.nn.DataParallel (MedicalNet's files), Lightning modules, torch.compile
    (r"^(module|model|_orig_mod)\.", ""),
    # MONAI's DenseNet: a Sequential inside each dense layer, and its own name for the classifier
    (r"(denselayer\d+)\.layers\.", r"\1."),
    (r"^class_layers\.out\.", "classifier."),
    # torchvision's DenseNet files, which are older than its code: norm.1 for norm1
    (r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),
)

# Counters of batches, which inference does not read: PyTorch's files from before version 0.4.1 lack them, among them
# most that torchvision publishes, and PyTorch too takes those as complete.
OPTIONAL_NAMES = frozenset({"num_batches_tracked"})


def renamed(state: Mapping[str, V], own: Container[str]) -> dict[str, V]:
    """Bring the names of a state to those of a layer where they are known under another name.

    Parameters
    ----------
    state : mapping of str
        A state of PyTorch, torchvision, MONAI or MedicalNet.
    own : container of str
        The layer's names.

    Returns
    -------
    dict of str
        The same values in the same order. A name is changed only if the layer lacks it, has the new one, and the state
        does not hold that itself.
    """
    result: dict[str, V] = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in FOREIGN_NAMES:
            if new in own:
                break
            new = re.sub(pattern, replacement, new)
        taken = new not in own or new in result or (new != name and new in state)
        result[name if taken else new] = value
    return result
