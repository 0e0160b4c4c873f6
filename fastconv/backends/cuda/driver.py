"""What CuPy does not offer of NVIDIA's driver: maps for the tensor memory accelerator, by ctypes."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastconv.backends.cuda.device import TensorMap

# Numbers of cuda.h.
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_TO_L2_256B, _ZEROS_OUTSIDE = 0, 3, 3, 0

_MAP = np.dtype((np.void, 128))
_ALIGNMENT = 64


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def tensor_map(address: int, dtype: str, layout: TensorMap) -> Any:
    """The map of an array on the GPU, as the driver encodes it.

    Raises
    ------
    RuntimeError
        If the driver is too old, or refuses.
    """
    memory = ctypes.create_string_buffer(128 + _ALIGNMENT)
    encoded = ctypes.addressof(memory) + -ctypes.addressof(memory) % _ALIGNMENT
    axes = len(layout.dims)
    dims, strides = (ctypes.c_uint64 * axes)(*layout.dims), (ctypes.c_uint64 * (axes - 1))(*layout.strides)
    steps = (ctypes.c_uint32 * axes)(*(layout.steps or (1,) * axes))
    array = (ctypes.c_void_p(encoded), _DATA_TYPES[dtype], ctypes.c_uint32(axes), ctypes.c_void_p(address), dims,
             strides)
    rest = steps, _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_TO_L2_256B, _ZEROS_OUTSIDE
    name = "cuTensorMapEncodeIm2col" if layout.pixels else "cuTensorMapEncodeTiled"
    try:
        function = getattr(_library(), name)
    except AttributeError as error:
        raise RuntimeError(f"fastconv: the driver has no {name}. Hint: a driver of CUDA 12 or later") from error
    if layout.pixels:
        corners = ((ctypes.c_int * (axes - 2))(*corner) for corner in (layout.lower, layout.upper))
        status = function(*array, *corners, ctypes.c_uint32(layout.box[0]), ctypes.c_uint32(layout.pixels), *rest)
    else:
        status = function(*array, (ctypes.c_uint32 * axes)(*layout.box), *rest)
    if status:
        raise RuntimeError(f"fastconv: {name} fails with CUresult {status} for {layout}. "
                           "Hint: algorithm='mma' does without")
    return np.frombuffer(ctypes.string_at(encoded, 128), _MAP).copy().reshape(())
