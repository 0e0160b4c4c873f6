"""Volumes of several modalities as the channels of one array, with what may be missing, and NIfTI files.

What the network sees of a modality is in units of its own standard deviation, since the numbers of MRI have no unit.
One that is missing is zero, which is the mean, and can be marked by a channel of ones; `WithCovariates` does the same
with missing entries of a table.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from fastconv.arrays import Array, as_array
from fastconv.nn.layer import float_dtype


def zscore(volume: Array, mask: Array | None = None, *, dtype: DTypeLike = np.float32) -> Array:
    """Subtract the mean and divide by the standard deviation, both of the voxels in a mask.

    Parameters
    ----------
    volume : ndarray
        Of any shape and any real dtype.
    mask : ndarray of bool, optional
        Of the same shape: the brain, the body. Mean and deviation are those inside; outside the result is 0. All voxels
        if left out.
    dtype
        float32 or float64, of the result.

    Returns
    -------
    ndarray
        Of the shape of `volume`; zeros if all voxels in the mask are equal.

    Raises
    ------
    ValueError
        If shapes differ, the mask is empty, or there is NaN or infinity inside of it.
    TypeError
        If `volume` is not real or `mask` not bool.
    """
    volume = np.asarray(volume)
    if volume.dtype.kind not in "biuf":
        raise TypeError(f"zscore: volume has dtype {volume.dtype}, but real numbers are needed. Hint: np.abs(volume)")
    inside = np.ones(volume.shape, bool) if mask is None else np.asarray(mask)
    if inside.dtype != bool:
        raise TypeError(f"zscore: mask has dtype {inside.dtype}, but bool is needed. Hint: mask > 0")
    if inside.shape != volume.shape:
        raise ValueError(f"zscore: mask has shape {inside.shape}, but volume has shape {volume.shape}. "
                         "Hint: resample both to one grid")
    values = volume[inside].astype(np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(f"zscore: of the {values.size} voxels in the mask {int(np.isfinite(values).sum())} are "
                         "finite, but all must be, and one at least is needed. Hint: np.nan_to_num(volume)")
    # Not by the deviation, which rounding can make 1e-17 for equal values.
    std = values.std() if values.max() > values.min() else 1.0
    result = np.zeros(volume.shape, float_dtype(dtype))
    result[inside] = (values - values.mean()) / std
    return result


def stack_modalities(volumes: Sequence[Array | None], mask: Array | None = None, *, mark_missing: bool = False,
                     dtype: DTypeLike = np.float32) -> Array:
    """Make one array with a channel for each modality, each normalised by `zscore`.

    Parameters
    ----------
    volumes : sequence of ndarray or None
        T1, T2, ... of one patient on one grid, in the order that the network was trained with; None is missing.
    mask : ndarray of bool, optional
        See `zscore`.
    mark_missing : bool
        Whether as many channels follow, of ones where the modality is missing and of zeros where it is there.
    dtype
        float32 or float64.

    Returns
    -------
    ndarray
        (C, \\*spatial), with zeros where a modality is missing; (2 C, \\*spatial) with `mark_missing`.

    Raises
    ------
    ValueError
        If all are missing, shapes differ, or a volume cannot be normalised.

    Examples
    --------
    >>> x = stack_modalities([t1, t2, None], mask=t1 > 0, mark_missing=True)  # no FLAIR of this patient
    """
    present = [None if volume is None else np.asarray(volume) for volume in volumes]
    shapes = {volume.shape for volume in present if volume is not None}
    if len(shapes) != 1:
        raise ValueError(f"stack_modalities: the {len(present)} volumes have the shapes {sorted(shapes)}, but exactly "
                         "one shape is needed. Hint: resample all to one grid; one of them must not be None")
    (shape,) = shapes
    count = len(present)
    x = np.zeros((2 * count if mark_missing else count, *shape), float_dtype(dtype))
    for channel, volume in enumerate(present):
        if volume is not None:
            x[channel] = zscore(volume, mask, dtype=dtype)
        elif mark_missing:
            x[count + channel] = 1
    return x


def drop_modalities(x: Array, rng: np.random.Generator, p: float = 0.25, *, marked: bool = False) -> Array:
    """Take modalities away at random in training, so that the network copes without (Neverova et al. 2016, ModDrop).

    Parameters
    ----------
    x : ndarray
        (N, C, \\*spatial), or (N, 2 C, \\*spatial) with `marked`, of `stack_modalities`.
    rng : Generator
        Source of the decisions.
    p : float
        Probability for each modality of each patient. One that is there always stays.
    marked : bool
        Whether the second half of the channels marks what is missing; it is set then.

    Returns
    -------
    ndarray
        A copy of `x` with zeros in the channels that were taken.

    Raises
    ------
    ValueError
        If `p` is no probability, or channels are not even with `marked`.
    """
    x = as_array(x, "x", "drop_modalities").copy(order="K")
    if not 0 <= p <= 1:
        raise ValueError(f"drop_modalities: p is {p!r}, but 0 <= p <= 1 is needed. Hint: 0.25")
    if x.ndim < 3 or (marked and x.shape[1] % 2):
        raise ValueError(f"drop_modalities: x has shape {x.shape}, but (N, C, *spatial) is needed, with an even number "
                         "of channels if marked=True. Hint: stack_modalities(..., mark_missing=True)[None]")
    count = x.shape[1] // 2 if marked else x.shape[1]
    there: Array = np.any(x[:, :count], axis=tuple(range(2, x.ndim)))
    taken = there & (rng.random(there.shape) < p)
    # The one that stays: of those that are there, the one with the largest random number.
    stays = np.argmax(there * (1 + rng.random(there.shape)), 1)
    rows = np.flatnonzero((taken == there).all(1) & there.any(1))
    taken[rows, stays[rows]] = False
    x[:, :count][taken] = 0
    if marked:
        x[:, count:][taken] = 1
    return x


# ---- NIfTI -------------------------------------------------------------------------------------------------------


class Nifti(NamedTuple):
    """A volume and where it is."""

    array: Any
    """Voxels in the order of the file, (X, Y, Z) or more axes; what gives arrays when sliced, if read lazily."""
    affine: Array
    """(4, 4) float64: from voxel indices to millimetres."""


def _nibabel() -> ModuleType:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError("fastconv: NIfTI files are read by the package nibabel, which is not installed. "
                          'Hint: pip install "fastconv[medical]"') from error
    return nibabel


def load_nifti(path: str | os.PathLike[str], *, lazy: bool = False, dtype: DTypeLike = np.float32) -> Nifti:
    """Read a NIfTI file (.nii, .nii.gz), or another format that nibabel knows.

    Parameters
    ----------
    path : path-like
        The file.
    lazy : bool
        Leave the voxels in the file until they are sliced, as `fastconv.inference.sliding_window` does. Fast for .nii,
        slow for .nii.gz, which has to be decompressed from its start for each window.
    dtype
        Of the voxels, if they are read at once.

    Returns
    -------
    Nifti
        Voxels, scaled as the file says, and affine.

    Raises
    ------
    ImportError
        If nibabel is not installed.
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file cannot be read as a volume.
    """
    nibabel = _nibabel()
    try:
        image = nibabel.load(path)
        affine = np.array(image.affine, np.float64)
        return Nifti(image.dataobj if lazy else np.asarray(image.dataobj, dtype), affine)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, EOFError, OSError) as error:
        # The system's have a number; nibabel's own, for files that end early, do not.
        if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"load_nifti: {os.fspath(path)} cannot be read as a volume ({error}). "
                         "Hint: .nii and .nii.gz are; for DICOM use dcm2niix") from error


def save_nifti(path: str | os.PathLike[str], array: Array, affine: Array) -> None:
    """Write a volume and its affine to a NIfTI file, atomically.

    Parameters
    ----------
    path : path-like
        Ends in .nii or .nii.gz; its folder must exist.
    array : ndarray
        (X, Y, Z) or more axes, in the order of the volume that it belongs to; bool becomes uint8.
    affine : ndarray
        (4, 4), that of the volume: `Nifti.affine`.

    Raises
    ------
    ImportError
        If nibabel is not installed.
    ValueError
        For another ending, or an affine of another shape.
    """
    nibabel, target = _nibabel(), Path(path)
    if not target.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"save_nifti: path is {os.fspath(path)!r}, but it must end in .nii or .nii.gz. "
                         "Hint: the ending decides whether it is compressed")
    if np.shape(affine) != (4, 4):
        raise ValueError(f"save_nifti: affine has shape {np.shape(affine)}, but (4, 4) is needed. Hint: "
                         "load_nifti(...).affine of the volume that was segmented, or np.eye(4) for voxels of 1 mm")
    array = np.asarray(array)
    array = array.astype(np.uint8) if array.dtype == bool else array
    image = nibabel.Nifti1Image(array, np.asarray(affine, np.float64))
    # nibabel chooses the format by the ending, which the temporary file needs too
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        nibabel.save(image, temporary)
        os.replace(temporary, target)
    except BaseException:  # also Ctrl-C: leave no half file behind
        temporary.unlink(missing_ok=True)
        raise
