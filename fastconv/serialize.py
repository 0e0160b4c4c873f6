"""Weights on disk: safetensors files, written atomically.

The format is that of https://github.com/huggingface/safetensors: names, shapes, dtypes and raw bytes, no code. PyTorch
reads and writes the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from fastconv.arrays import Array


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("fastconv: weights are stored by the package safetensors, which is not installed. "
                          'Hint: pip install "fastconv[safetensors]"') from error
    return safetensors.numpy


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Array],
                metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays to a safetensors file.

    The file is written beside `path` and then moved over it, so that a crash leaves the old file or the new one.

    Parameters
    ----------
    path : path-like
        The file; its folder must exist.
    arrays : mapping of str to ndarray
        Any strides; stored in C order.
    metadata : mapping of str to str, optional
        Text stored with the arrays.

    Raises
    ------
    ImportError
        If safetensors is not installed.
    OSError
        If the file cannot be written.
    """
    data = _safetensors().save({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()},
                               None if metadata is None else dict(metadata))
    write_atomically(path, data)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to the file `path` in one step: readers see the old content or the new, never a part."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # also Ctrl-C: leave no half file behind
        temporary.unlink(missing_ok=True)
        raise


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read all arrays of a safetensors file.

    Parameters
    ----------
    path : path-like
        The file.

    Returns
    -------
    dict of str to ndarray

    Raises
    ------
    ImportError
        If safetensors is not installed.
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged or no safetensors file, or holds a type that NumPy lacks, such as bfloat16.
    """
    library = _safetensors()
    data = Path(path).read_bytes()
    try:
        return dict(library.load(data))
    except Exception as error:
        raise ValueError(f"load: {os.fspath(path)} cannot be read as a safetensors file ({error}). "
                         "Hint: only safetensors are read, not PyTorch's .pt or .pth pickles") from error
