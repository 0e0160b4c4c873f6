"""What all references share: views of rank 5, and results like the input."""

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array, empty, memory_order

# NaN and infinity are operands like any other here; NumPy's warnings about them say nothing new.
quiet = np.errstate(all="ignore")


def rank5(x: Array) -> Array:
    """View (N, C, *spatial) as (N, C, D, H, W), with leading spatial axes of length 1."""
    return x[(slice(None), slice(None), *[None] * (5 - x.ndim))]


def write_result(
    result: Array,
    *,
    like: Array,
    out: Array | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Write a rank-5 result to `out`, or to a new array of rank, dtype and order as `like`."""
    if out is None:
        shape = result.shape[:2] + result.shape[2 + 5 - like.ndim :]
        out = empty(shape, dtype or like.dtype, memory_order(like))
    rank5(out)[...] = result
    return out
