"""Images of another size."""

from __future__ import annotations

import numpy as np

__all__ = ["resize"]


def resize(images: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Enlarge images (N, C, *spatial) to another spatial size by linear interpolation.

    Pixels are squares, not points: the centre of output pixel o lies at (o + 1/2) * in / out - 1/2, and
    beyond the outermost centres the border is repeated (what PyTorch calls align_corners=False).
    """
    for axis, target in enumerate(size, start=2):
        length = images.shape[axis]
        centre = np.clip((np.arange(target) + 0.5) * length / target - 0.5, 0, length - 1)
        left = np.minimum(centre.astype(int), max(length - 2, 0))
        right = np.minimum(left + 1, length - 1)
        share = (centre - left).astype(images.dtype).reshape(-1, *[1] * (images.ndim - axis - 1))
        images = np.take(images, left, axis) * (1 - share) + np.take(images, right, axis) * share
    return images
