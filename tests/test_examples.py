"""The demo and the examples run and do what they say."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from fastconv import cli

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tested():
    tested = re.findall(r'run_example\(monkeypatch, "(\w+\.py)"', Path(__file__).read_text())
    assert sorted(tested) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_demo(tmp_path, capsys):
    pytest.importorskip("sklearn")
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    out = tmp_path / "pictures"
    assert cli.main(["demo", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    accuracy, seconds = re.search(r"test accuracy (\S+)%, AUC \S+, trained in (\S+) s", text).groups()
    assert float(accuracy) >= 97
    print(f"demo: {accuracy} % in {seconds} s")
    assert "\r" not in text
    for layer in ("c1 +Conv2d", "s2 +MaxPool2d", "c5 +Linear", "sum"):
        assert re.search(rf"^{layer} .* \d+\.\d\d\d .*%$", text, re.MULTILINE)
    ratio = re.search(r"NumPy reference: (\S+) ms \((\d+) times as long\)", text).group(2)
    assert int(ratio) > 1
    matrix = re.findall(r"^ +\d((?: +(?:\d+|\.)){10})$", text, re.MULTILINE)
    counts = np.array([[int(cell) if cell != "." else 0 for cell in row.split()] for row in matrix])
    assert counts.shape == (10, 10)
    assert counts.trace() / counts.sum() == pytest.approx(float(accuracy) / 100, abs=1e-4)
    assert str(out.resolve()) in text
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "confusion_matrix.png",
        "feature_maps.png",
        "first_layer_filters.png",
        "image_filters.png",
        "learning_curve.png",
    ]
    for name in names:
        assert name in text
        with image.open(out / name) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 10, f"{name} is empty"


def test_resize_agrees_with_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    from fastconv.resize import resize

    image = np.random.default_rng(0).random((5, 7))
    grid = np.meshgrid(*[(np.arange(m) + 0.5) * n / m - 0.5 for n, m in ((5, 12), (7, 20))], indexing="ij")
    expected = ndimage.map_coordinates(image, grid, order=1, mode="nearest")
    np.testing.assert_allclose(resize(image[None, None], (12, 20))[0, 0], expected, atol=1e-12)
    np.testing.assert_array_equal(resize(image[None, None], (5, 7))[0, 0], image)


def test_demo_filters_agree_with_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    from fastconv.demo import FILTERS, filter_image

    image = np.random.default_rng(0).random((30, 41, 3), dtype=np.float32)
    for name, kernel in FILTERS.items():
        expected = ndimage.correlate(image.astype(np.float64), kernel[:, :, None].astype(np.float64), mode="nearest")
        np.testing.assert_allclose(filter_image(image, kernel), expected, atol=1e-5, err_msg=name)
        assert kernel.sum() == pytest.approx(0 if "Sobel" in name or "Laplace" in name else 1, abs=1e-6)


def test_custom_loop(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    run_example(monkeypatch, "custom_loop.py")
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(re.search(r"test accuracy (\S+)%", last).group(1)) > 95


def test_two_inputs_two_heads(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    run_example(monkeypatch, "two_inputs_two_heads.py")
    last = capsys.readouterr().out.splitlines()[-1]
    everywhere, missing = re.search(r"test accuracy (\S+)%, .* (\S+)%", last).groups()
    assert float(everywhere) > 88  # 82 with the image alone: the mean over its digits of max(p, 1 - p)
    assert float(missing) > 90


def test_adrenal3d(monkeypatch, capsys, tmp_path):
    """On made-up volumes, small balls against large ones; `test_real_data.py` has the real ones."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 96), ("val", 16), ("test", 32)):
        classes = np.arange(count) % 2
        distance = np.sqrt(sum(axis**2 for axis in np.mgrid[-5:5, -5:5, -5:5] + 0.5))
        radius = np.where(classes, 4.2, 2.8) + rng.normal(0, 0.3, count)
        arrays[f"{part}_images"] = (255 * (distance < radius[:, None, None, None])).astype(np.uint8)
        arrays[f"{part}_labels"] = classes[:, None].astype(np.uint8)
    path = tmp_path / "balls.npz"
    np.savez(path, **arrays)
    run_example(monkeypatch, "adrenal3d.py", str(path), "--epochs", "4", "--batch-size", "8")
    assert float(re.search(r"test AUC (\S+),", capsys.readouterr().out).group(1)) > 0.9


def test_filters(monkeypatch, capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    picture, out = tmp_path / "in.png", tmp_path / "out.png"
    image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(picture)
    run_example(monkeypatch, "filters.py", str(picture), str(out))
    with image.open(out) as drawn:
        assert np.asarray(drawn.convert("L")).std() > 10


@pytest.mark.parametrize("ndim", [2, 3])
def test_gradcam(monkeypatch, capsys, tmp_path, ndim):
    """The heatmap finds what decides the class, of which the training said nothing."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    run_example(monkeypatch, "gradcam.py", "--ndim", str(ndim), "--out", str(tmp_path))
    text = capsys.readouterr().out
    assert int(re.search(r"test accuracy (\d+)%", text).group(1)) >= 95
    assert int(re.search(r"maximum of the heatmap in the patch: (\d+)%", text).group(1)) >= 90
    shares = re.findall(r"within (\d) pixels of the patch: (\d+)% \((\S+)% of the image\)", text)
    (_, inside, area), (_, near, _) = shares
    assert float(inside) > 4 * float(area)
    assert float(near) > 70
    for name in ("gradcam.png", "filters.png", "feature_maps.png"):
        with image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, f"{name} is empty"
