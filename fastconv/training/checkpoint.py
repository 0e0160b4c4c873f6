"""Checkpoints: everything that a training run needs to go on bit for bit, in one ``.npz`` file.

The state is a tree of dictionaries and lists with arrays, numbers and strings as leaves. Arrays are
stored under their path, ``tree/model/conv1.weight``; the rest is one JSON text that points to them. No
pickle: loading a checkpoint runs no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = "fastconv-checkpoint-1"
_POINTER = "array at"


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` always holds either the old checkpoint or the whole new one.

    The file is written beside `path`, flushed to the disk and then renamed over it, which POSIX and
    Windows do in one step.

    Parameters
    ----------
    path
        Where to write; the folder must exist.
    state
        Dictionaries with string keys, lists, tuples (come back as lists), arrays, numbers, strings,
        booleans and None.

    Raises
    ------
    TypeError
        `state` holds something else.
    OSError
        The file cannot be written.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps({"format": _FORMAT, "state": _detach(state, "tree", arrays)})
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, json=np.array(text), **arrays)  # type: ignore[arg-type]  # of allow_pickle
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also Ctrl-C: leave no half file behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        The file is damaged or no checkpoint of this format.
    """
    # A truncated file fails as BadZipFile, a changed byte by its CRC, a foreign .npz by its keys.
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            content = json.loads(str(file["json"]))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}, but {_FORMAT!r} is needed")
            state: dict[str, Any] = _attach(content["state"], file)
            return state
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a whole fastconv checkpoint ({error})") from error


def _detach(node: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """Replace each array below `node` by a pointer and collect it in `arrays` under its path."""
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, str):
                raise TypeError(f"save_checkpoint: {path} has the key {key!r}, but keys must be strings")
        return {key: _detach(value, f"{path}/{key}", arrays) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_detach(value, f"{path}/{i}", arrays) for i, value in enumerate(node)]
    if isinstance(node, np.generic):
        return node.item()
    if isinstance(node, np.ndarray) and not node.dtype.hasobject:
        arrays[path] = node
        return {_POINTER: path}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"save_checkpoint: {path} is a {type(node).__name__}, which checkpoints cannot hold")


def _attach(node: Any, arrays: Any) -> Any:
    if isinstance(node, dict):
        if set(node) == {_POINTER}:
            return arrays[node[_POINTER]]
        return {key: _attach(value, arrays) for key, value in node.items()}
    if isinstance(node, list):
        return [_attach(value, arrays) for value in node]
    return node
