"""Modalities as channels, missing ones, NIfTI files, and the page about all of it."""

import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from fastconv.medical import drop_modalities, load_nifti, save_nifti, stack_modalities, zscore

PAGE = Path(__file__).parent.parent / "docs" / "medical.md"


def volumes(count=3, shape=(5, 6, 7)):
    rng = np.random.default_rng(0)
    return [(10**k * (5 + rng.standard_normal(shape))).astype(np.int16) for k in range(1, count + 1)]


def test_zscore():
    x = np.array([[1, 2, 9], [3, 100, 100]], np.int16)
    mask = np.array([[True, True, False], [True, False, False]])
    sigma = np.sqrt(2 / 3)
    np.testing.assert_allclose(zscore(x, mask), [[-1 / sigma, 0, 0], [1 / sigma, 0, 0]], rtol=1e-6)
    y = zscore(volumes()[2], dtype=np.float64)
    assert y.mean() == pytest.approx(0, abs=1e-12)
    assert y.std() == pytest.approx(1, abs=1e-12)
    np.testing.assert_array_equal(zscore(np.full((3, 3), 0.1)), np.zeros((3, 3)))


def test_what_is_outside_of_the_mask_does_not_matter():
    x, mask = volumes()[0].astype(float), np.zeros((5, 6, 7), bool)
    mask[1:4, 2:5, 1:6] = True
    first = zscore(x, mask)
    x[~mask] = np.nan
    np.testing.assert_array_equal(zscore(x, mask), first)


def test_modalities_become_channels():
    t1, t2, flair = volumes()
    mask = t1 > 45
    x = stack_modalities([t1, t2, flair], mask)
    assert (x.shape, x.dtype) == ((3, 5, 6, 7), np.float32)
    for channel, volume in zip(x, (t1, t2, flair), strict=True):
        inside = volume[mask].astype(float)
        np.testing.assert_allclose(channel[mask], (inside - inside.mean()) / inside.std(), rtol=1e-5, atol=1e-6)
        assert not channel[~mask].any()


def test_missing_modalities_are_zero_and_marked():
    t1, _, flair = volumes()
    x = stack_modalities([t1, None, flair])
    assert x[0].any()
    assert x[2].any()
    assert not x[1].any()
    marked = stack_modalities([t1, None, flair], mark_missing=True)
    np.testing.assert_array_equal(marked[:3], x)
    np.testing.assert_array_equal(marked[3:].mean((1, 2, 3)), [0, 1, 0])


def test_dropped_modalities():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3, 2, 2)).astype(np.float32)
    x[:100, 1] = 0
    before = x.copy()
    y = drop_modalities(x, np.random.default_rng(1), 0.5)
    np.testing.assert_array_equal(x, before)
    kept = y.any((2, 3))
    assert (kept | (y == 0).all((2, 3))).all()
    np.testing.assert_array_equal(y[kept], x[kept])
    assert kept.any(1).all()
    # each goes with probability 1/2, but for the one in eight that would lose all and keeps one in three
    assert kept[100:].mean(0) == pytest.approx(0.5 + 1 / 24, abs=0.1)
    assert (drop_modalities(x, rng, 1.0).any((2, 3)).sum(1) == 1).all()
    np.testing.assert_array_equal(drop_modalities(x, rng, 0.0), x)
    np.testing.assert_array_equal(drop_modalities(x, np.random.default_rng(1), 0.5), y)


def test_dropped_modalities_are_marked():
    x = np.stack([stack_modalities(volumes(), mark_missing=True), stack_modalities([volumes()[0], None, None],
                                                                                 mark_missing=True)])
    y = drop_modalities(x, np.random.default_rng(0), 1.0, marked=True)
    there = y[:, :3].any((2, 3, 4))
    assert there.sum(1).tolist() == [1, 1]
    np.testing.assert_array_equal(y[:, 3:].min((2, 3, 4)), ~there)
    np.testing.assert_array_equal(y[:, 3:].max((2, 3, 4)), ~there)


X = np.ones((2, 2))


@pytest.mark.parametrize(("call", "kind", "message"), [
    (lambda: zscore(X.astype(complex)), TypeError, "volume has dtype complex128"),
    (lambda: zscore(X, X), TypeError, "mask has dtype float64, but bool"),
    (lambda: zscore(X, np.ones(2, bool)), ValueError, r"mask has shape \(2,\), but volume has shape \(2, 2\)"),
    (lambda: zscore(X, np.zeros((2, 2), bool)), ValueError, "of the 0 voxels"),
    (lambda: zscore(np.array([1, np.nan])), ValueError, "of the 2 voxels in the mask 1 are finite"),
    (lambda: stack_modalities([None, None]), ValueError, r"the 2 volumes have the shapes \[\]"),
    (lambda: stack_modalities([X, np.ones(3)]), ValueError, r"the shapes \[\(2, 2\), \(3,\)\]"),
    (lambda: stack_modalities([X], dtype=np.float16), TypeError, "float16"),
    (lambda: drop_modalities(X[None], np.random.default_rng(), 2), ValueError, "p is 2, but"),
    (lambda: drop_modalities(X, np.random.default_rng()), ValueError, r"x has shape \(2, 2\), but \(N, C"),
    (lambda: drop_modalities(np.ones((1, 3, 2)), np.random.default_rng(), marked=True), ValueError, "even number"),
])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# ---- NIfTI ---------------------------------------------------------------------------------------------------------

AFFINE = np.array([[-1.5, 0, 0, 90], [0, 0, 2, -60], [0, 2.5, 0, 10], [0, 0, 0, 1]])


def nifti_by_hand(array, affine, slope=1.0, offset=0.0):
    """An int16 NIfTI-1 file by the standard's own byte offsets."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, array.ndim, *array.shape, *[1] * (7 - array.ndim))
    struct.pack_into("<2h", header, 70, 4, 16)
    struct.pack_into("<3f", header, 108, 352, slope, offset)
    struct.pack_into("<h", header, 254, 1)
    struct.pack_into("<12f", header, 280, *affine[:3].ravel())
    header[344:348] = b"n+1\0"
    return bytes(header) + array.astype("<i2").tobytes(order="F")


@pytest.mark.parametrize("lazy", [False, True])
def test_reading_nifti(lazy, tmp_path):
    pytest.importorskip("nibabel")
    array = volumes()[1]
    (tmp_path / "x.nii").write_bytes(nifti_by_hand(array, AFFINE, 0.5, -3))
    volume = load_nifti(tmp_path / "x.nii", lazy=lazy)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.array.shape == array.shape
    np.testing.assert_allclose(volume.array[1:3, 2, :4], array[1:3, 2, :4] * 0.5 - 3)
    assert lazy or volume.array.dtype == np.float32


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
def test_written_nifti_keeps_values_and_affine(ending, dtype, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    array = (volumes()[0] % 2).astype(dtype)
    save_nifti(tmp_path / f"x{ending}", array, AFFINE)
    assert os.listdir(tmp_path) == [f"x{ending}"]
    image = nibabel.load(tmp_path / f"x{ending}")
    np.testing.assert_array_equal(image.get_fdata(), array)
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert image.get_data_dtype() == (np.uint8 if dtype is bool else dtype)
    np.testing.assert_array_equal(load_nifti(tmp_path / f"x{ending}").array, array)


def test_bad_nifti(tmp_path):
    pytest.importorskip("nibabel")
    with pytest.raises(FileNotFoundError):
        load_nifti(tmp_path / "x.nii")
    for content in (b"this is none", nifti_by_hand(volumes()[0], AFFINE)[:400]):
        (tmp_path / "x.nii").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.nii cannot be read as a volume"):
            load_nifti(tmp_path / "x.nii")
    with pytest.raises(ValueError, match=r"it must end in \.nii or"):
        save_nifti(tmp_path / "x.img", np.zeros((2, 2, 2)), AFFINE)
    with pytest.raises(ValueError, match=r"affine has shape \(3, 4\)"):
        save_nifti(tmp_path / "x.nii", np.zeros((2, 2, 2)), AFFINE[:3])


def test_missing_nibabel_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match=r'pip install "fastconv\[medical\]"'):
        load_nifti(tmp_path / "x.nii")


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    """All its programs, one after the other, as a reader would type them; the last one needs nibabel."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks[:5]:
        exec(compile(block, str(PAGE), "exec"), names)
    lines = capsys.readouterr().out.split("\n")
    # what the comments on the page say
    assert lines[0] == "(4, 160, 48, 48) float32"
    assert float(lines[2].removeprefix("Dice ")) > 0.85
    assert lines[3:5] == ["missing (2): fc.weight; fc.bias", "(3, 2)"]
    pytest.importorskip("nibabel")
    exec(compile(blocks[5], str(PAGE), "exec"), names)
    assert load_nifti("labels.nii.gz").array.shape == (160, 48, 48)
