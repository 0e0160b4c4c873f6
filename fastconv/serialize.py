"""Weights on disk: safetensors files, read and written here, and PyTorch's .pth files, read through PyTorch.

The format of https://github.com/huggingface/safetensors is names, shapes, dtypes and raw bytes, no code:

    8 bytes          n, the length of the header, little-endian
    n bytes          JSON: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    the rest         the arrays in C order, little-endian, one behind the other without gaps

A file may come from anywhere, so nothing in it is believed: every number is checked against the size of the file before
memory is taken for it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastconv.arrays import Array

# Names of dtypes in a file. BF16 becomes float32, whose upper half it is; NumPy lacks the rest (F8_E4M3, F4, ...).
_DTYPES = {name: np.dtype(code) for name, code in {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1"}.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items() if name != "BF16"}
# The bound of the format's own library; ResNet-152 takes 0.1 MB.
_MAX_HEADER = 100_000_000
_METADATA = "__metadata__"


class _Entry(NamedTuple):
    """Where an array lies: `begin` and `end` in bytes behind the header."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


# ---- writing -----------------------------------------------------------------------------------------------------


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Array],
                metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays to a safetensors file.

    The file is written beside `path` and then moved over it, so that a crash leaves the old file or the new one.

    Parameters
    ----------
    path : path-like
        The file; its folder must exist.
    arrays : mapping of str to ndarray
        Any strides; stored in C order. float64, float32, float16, integers or bool.
    metadata : mapping of str to str, optional
        Text stored with the arrays.

    Raises
    ------
    TypeError
        If an array has another dtype, or a name or the metadata is no text.
    OSError
        If the file cannot be written.
    """
    header: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    texts = [*arrays, *(() if metadata is None else (*metadata, *metadata.values()))]
    if not all(isinstance(text, str) for text in texts) or _METADATA in arrays:
        raise TypeError(f"save: names of arrays and metadata must be strings, and no array is called {_METADATA!r}. "
                        "Hint: state_dict() of a layer gives such a mapping")
    # The widest items first: each array then starts at a multiple of its item size, as memory maps need it.
    order = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    begin, parts = 0, []
    for name, array in order:
        little = array.dtype.newbyteorder("<")
        if little not in _NAMES:
            raise TypeError(f"save: {name} has dtype {array.dtype}, but one of {', '.join(map(str, _NAMES))} is "
                            "needed. Hint: array.astype(np.float32)")
        data = np.ascontiguousarray(array, little)
        end = begin + data.nbytes
        header[name] = {"dtype": _NAMES[little], "shape": list(array.shape), "data_offsets": [begin, end]}
        begin = end
        parts.append(data.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomically(path, [len(text).to_bytes(8, "little"), text, *parts])


def write_atomically(path: str | os.PathLike[str], parts: Iterable[bytes | memoryview]) -> None:
    """Write `parts` to the file `path` in one step: readers see the old content or the new, never a part."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # also Ctrl-C: leave no half file behind
        temporary.unlink(missing_ok=True)
        raise


# ---- reading -----------------------------------------------------------------------------------------------------


def load_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read all arrays of a safetensors file, or of a file that `torch.save` wrote.

    The content decides which of the two it is, not the name. PyTorch's files are pickles, which can run code; they are
    read by ``torch.load(weights_only=True)``, which refuses that, and need PyTorch. Where such a file holds a training
    checkpoint, its entry ``"state_dict"`` or ``"model"`` is taken.

    Parameters
    ----------
    path : path-like
        The file.

    Returns
    -------
    dict of str to ndarray
        bfloat16 becomes float32, which holds the same numbers.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, is of neither kind, or holds a type that NumPy lacks, such as 8-bit floats.
    ImportError
        If PyTorch is needed and not installed.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        file.seek(0)
        # A safetensors header starts with a brace behind its length, where the others have a number.
        if start[8:] != b"{" and start.startswith((b"PK\3\4", b"\x80\2")):
            return _load_torch(path, file)
        try:
            entries, data = _read_header(file, size)
            return {entry.name: _read_array(file, data, entry) for entry in entries}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"load: {os.fspath(path)} cannot be read as a safetensors file ({error}). "
                             "Hint: safetensors and PyTorch's .pth files are read; download it again") from error


def _read_header(file: BinaryIO, size: int) -> tuple[list[_Entry], int]:
    """Entries in the order of their data, and the position of the first; ValueError if anything is inconsistent."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise ValueError(f"its header would have {length} bytes, but the file has {size}, 8 of them for the length, "
                         f"and {_MAX_HEADER} are the most")
    # JSON lets a name come twice; which of the two is meant is anybody's guess.
    header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping of names")
    header.pop(_METADATA, None)
    data = 8 + length
    entries = sorted((_entry(name, value) for name, value in header.items()), key=lambda e: (e.begin, e.end))
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise ValueError(f"{entry.name} starts at byte {entry.begin}, but the data before end at {position}")
        position = entry.end
    if position != size - data:
        raise ValueError(f"its arrays have {position} bytes, but {size - data} follow the header")
    return entries, data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name appears twice in its header")
    return result


def _entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} lacks dtype, shape or data_offsets, or has more")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"{name} has dtype {kind!r}, but one of {', '.join(_DTYPES)} is needed")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has a shape or data_offsets that are no lists of sizes")
    begin, end = offsets
    if end - begin != math.prod(shape) * _DTYPES[kind].itemsize:
        raise ValueError(f"{name} has {end - begin} bytes, but shape {tuple(shape)} of {kind} takes "
                         f"{math.prod(shape) * _DTYPES[kind].itemsize}")
    return _Entry(name, kind, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    """Whether `values` is a list of integers that memory can have; NumPy has at most 64 axes."""
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _read_array(file: BinaryIO, data: int, entry: _Entry) -> Array:
    dtype = _DTYPES[entry.kind]
    file.seek(data + entry.begin)
    array = np.empty((entry.end - entry.begin) // dtype.itemsize, np.uint8 if entry.kind == "BOOL" else dtype)
    if file.readinto(array.view(np.uint8).data) != array.nbytes:  # type: ignore[attr-defined]
        raise ValueError("the file became shorter while it was read")
    if entry.kind == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    elif entry.kind == "BOOL":
        array = array != 0
    return array.astype(array.dtype.newbyteorder("="), copy=False).reshape(entry.shape)


def _load_torch(path: str | os.PathLike[str], file: BinaryIO) -> dict[str, Array]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"fastconv: {os.fspath(path)} was written by PyTorch, which is not installed. "
                          'Hint: pip install "fastconv[torch]", or have the file converted to safetensors') from error
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"load: {os.fspath(path)} cannot be read as weights of PyTorch ({error}). "
                         "Hint: weights_only=True reads tensors alone; save net.state_dict()") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"load: {os.fspath(path)} holds a {type(content).__name__}, but a state_dict is needed, a "
                         "mapping of names to tensors. Hint: torch.save(net.state_dict(), path)")
    return {name: (value.float() if value.dtype is torch.bfloat16 else value).detach().numpy()
            for name, value in content.items()}
