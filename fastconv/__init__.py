"""fastconv: convolutional networks in a few megabytes on top of NumPy.

functional
    Convolution and pooling in 1D, 2D and 3D, and their gradients, on arrays of shape (N, C, *spatial).
nn, models, training
    Layers, networks made of them, and what trains them.
explain, show_config, config
    Which algorithm runs and why; what this build and machine have; settings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

try:
    import fastconv.backends._cpu
except ModuleNotFoundError as error:
    if error.name != "fastconv.backends._cpu":
        raise
    raise ImportError(
        f"fastconv was imported from {__path__[0]}, where its compiled part is missing: this is a source "
        "folder that is not built. Hint: `pip install -e .` builds it in place; to use an installed fastconv, "
        "run from another folder (`pytest` rather than `python -m pytest`)"
    ) from error

from fastconv import functional
from fastconv.arrays import release_memory, to_channels_last, to_contiguous
from fastconv.config import config, get_num_threads, set_num_threads
from fastconv.functional.conv import explain
from fastconv.functional.prepared import prepare_conv, prepare_conv_transpose

if TYPE_CHECKING:
    from fastconv import models, nn, training
    from fastconv.gradient_check import gradcheck

__all__ = [
    "__version__",
    "config",
    "explain",
    "functional",
    "get_num_threads",
    "gradcheck",
    "models",
    "nn",
    "prepare_conv",
    "prepare_conv_transpose",
    "release_memory",
    "set_num_threads",
    "show_config",
    "to_channels_last",
    "to_contiguous",
    "training",
]

# Imported when first used: `import fastconv` is to cost little more than NumPy.
_LAZY = {
    "gradcheck": ("fastconv.gradient_check", "gradcheck"),
    "models": ("fastconv.models", None),
    "nn": ("fastconv.nn", None),
    "training": ("fastconv.training", None),
}


def show_config() -> None:
    """Print the version, the kernels that were chosen and from which, the threads and why, caches and settings."""
    from fastconv.info import report

    print(report())


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastconv' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = importlib.import_module(module)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
