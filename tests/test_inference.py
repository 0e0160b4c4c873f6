"""Sliding windows: against the formula, against the whole image at once, in bounded memory."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from tolerance import assert_close

from fastconv import nn
from fastconv.inference import sliding_window

IMAGES = {1: (2, 3, 41), 2: (2, 3, 23, 18), 3: (1, 2, 9, 12, 7)}
WINDOWS = {1: (12,), 2: (8, 6), 3: (4, 5, 6)}


def image(ndim):
    return np.random.default_rng(ndim).standard_normal(IMAGES[ndim])


def pointwise(x):
    """Three scores for each pixel, which depend on nothing but its channels."""
    return np.stack([x.sum(1), np.tanh(x[:, 0]), x[:, -1] ** 2], 1)


def positional(x):
    """Scores that depend on where in the window a pixel is and on the window's mean: overlaps disagree."""
    ramp = sum(np.arange(n).reshape([-1 if a == b else 1 for b in range(x.ndim - 2)])
               for a, n in enumerate(x.shape[2:]))
    mean = x.mean(tuple(range(1, x.ndim)), keepdims=True)
    return np.concatenate([x[:, :1] * ramp, mean + 0 * x[:, :1], np.cos(x[:, -1:] + ramp)], 1)


def by_formula(predict, x, window, overlap, bell, ratio=1, pad_value=0.0):
    """Pad, lay windows evenly, add weighted scores and weights over the whole image, divide, crop."""
    unit = Fraction(ratio).denominator
    sizes = [max(-(-n // unit) * unit, w) for n, w in zip(x.shape[2:], window, strict=True)]
    before = [(p - n) // 2 // unit * unit for p, n in zip(sizes, x.shape[2:], strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *((b, p - n - b) for b, p, n in zip(before, sizes, x.shape[2:], strict=True))],
                    constant_values=pad_value)
    starts = []
    for p, w in zip(sizes, window, strict=True):
        count = 1 + math.ceil(round((p - w) / unit / max(w / unit * (1 - overlap), 1), 6))
        starts.append([unit * math.floor(i * (p - w) / unit / max(count - 1, 1) + 0.5) for i in range(count)])
    scaled = [int(p * ratio) for p in sizes]
    total, norm = 0, np.zeros(scaled)
    out_window = [int(w * ratio) for w in window]
    weight = np.ones(out_window)
    if bell:
        mesh = np.meshgrid(*[(np.arange(w) - (w - 1) / 2) / (w / 8) for w in out_window], indexing="ij")
        weight = np.exp(-0.5 * sum(m**2 for m in mesh))
    for corner in itertools.product(*starts):
        scores = predict(padded[(..., *(slice(s, s + w) for s, w in zip(corner, window, strict=True)))])
        if scores.ndim == 2:
            total, norm = total + scores, norm + 1
            continue
        target = tuple(slice(int(s * ratio), int(s * ratio) + w) for s, w in zip(corner, out_window, strict=True))
        if isinstance(total, int):
            total = np.zeros((*scores.shape[:2], *scaled))
        total[(..., *target)] += scores * weight
        norm[target] += weight
    if total.ndim == 2:
        return total / norm.flat[0]
    assert (norm > 0).all()
    ends = [math.ceil(n * ratio) for n in x.shape[2:]]
    offsets = [int(b * ratio) for b in before]
    return (total / norm)[(..., *(slice(o, o + e) for o, e in zip(offsets, ends, strict=True)))]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("weights", ["gaussian", "constant"])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_formula(ndim, weights, overlap, batch_size):
    x = image(ndim)
    y = sliding_window(positional, x, WINDOWS[ndim], overlap=overlap, weights=weights, batch_size=batch_size,
                       dtype=np.float64)
    expected = by_formula(positional, x, WINDOWS[ndim], overlap, weights == "gaussian")
    assert_close(y, expected, 10**ndim)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_pointwise_network_gives_what_the_whole_image_gives(ndim):
    x = image(ndim).astype(np.float32)
    y = sliding_window(pointwise, x, WINDOWS[ndim], batch_size=3)
    assert y.dtype == np.float32
    assert_close(y, pointwise(x), 8)


def test_convolutions_differ_from_the_whole_image_at_borders_of_windows_alone():
    """Windows begin at 0 and 7, and at 0 and 4; Gaussian weights hide what their ends do to the network."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, rng=0), nn.ReLU(), nn.Conv2d(5, 2, 3, padding=1, rng=1))
    x = image(2)[:1].astype(np.float32)
    whole = net(x)
    gaussian, constant = (sliding_window(net, x, (16, 14), weights=weights) for weights in ("gaussian", "constant"))
    errors = [np.abs(y - whole).mean() for y in (gaussian, constant)]
    assert 0 < errors[0] < errors[1] / 5
    assert_close(gaussian[..., :7, :4], whole[..., :7, :4], 50)
    assert_close(sliding_window(net, x, x.shape[2:]), whole, 50)


@pytest.mark.parametrize(("ratio", "size"), [(Fraction(1, 4), (21, 34)), (Fraction(1, 4), (5, 40)), (2, (9, 20)),
                                             (Fraction(3, 2), (9, 21)), (Fraction(1, 8), (3, 3))])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_coarser_and_finer_scores(ratio, size, batch_size):
    def scaled(x):
        x = positional(x)
        for axis in (2, 3):
            x = np.repeat(x, Fraction(ratio).numerator, axis)
            x = x.reshape(*x.shape[:axis], -1, Fraction(ratio).denominator, *x.shape[axis + 1:]).mean(axis + 1)
        return x

    x = np.random.default_rng(0).standard_normal((2, 2, *size))
    y = sliding_window(scaled, x, (8, 16), batch_size=batch_size, dtype=np.float64, pad_value=0.3)
    assert y.shape == (2, 3, *(math.ceil(n * ratio) for n in size))
    assert_close(y, by_formula(scaled, x, (8, 16), 0.5, True, ratio, 0.3), 100)


@pytest.mark.parametrize(("size", "window"), [((3, 3, 3), (4, 7, 5)), ((9, 2, 30), (4, 7, 8))])
def test_images_smaller_than_the_window(size, window):
    x = np.random.default_rng(0).standard_normal((2, 2, *size))
    y = sliding_window(positional, x, window, dtype=np.float64, pad_value=-3.0)
    assert_close(y, by_formula(positional, x, window, 0.5, True, pad_value=-3.0), 100)


def test_forms_of_images():
    x = image(3).astype(np.float32)
    full = sliding_window(pointwise, x, WINDOWS[3])
    np.testing.assert_array_equal(sliding_window(pointwise, x[0], WINDOWS[3]), full[0])
    alone = sliding_window(pointwise, x[0, 0], WINDOWS[3])
    np.testing.assert_array_equal(alone, sliding_window(pointwise, x[:, :1], WINDOWS[3])[0])
    integers = np.arange(60, dtype=np.int16).reshape(6, 10)
    np.testing.assert_array_equal(sliding_window(lambda x: x, integers, (4, 5), weights="constant")[0], integers)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_argmax_is_that_of_the_scores(ndim):
    x = image(ndim)
    scores = sliding_window(positional, x, WINDOWS[ndim], dtype=np.float64)
    labels = sliding_window(positional, x, WINDOWS[ndim], dtype=np.float64, argmax=True, batch_size=4)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, scores.argmax(1))
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(sliding_window(positional, x[0], WINDOWS[ndim], dtype=np.float64, argmax=True),
                                  scores[0].argmax(0))


def test_classifier_gives_the_mean_of_its_windows():
    def classify(x):
        return np.stack([x.mean((1, 2, 3)), x.max((1, 2, 3)), x[:, 0, 0, 0]], 1)

    x = image(2)
    expected = by_formula(classify, x, WINDOWS[2], 0.5, False)
    for batch_size in (1, 100):
        y = sliding_window(classify, x, WINDOWS[2], batch_size=batch_size, dtype=np.float64)
        assert_close(y, expected, 100)
    np.testing.assert_array_equal(sliding_window(classify, x, WINDOWS[2], argmax=True), expected.argmax(1))
    assert_close(sliding_window(classify, x[1], WINDOWS[2], dtype=np.float64), expected[1], 100)
    out = np.zeros(2, np.int64)
    assert sliding_window(classify, x, WINDOWS[2], argmax=True, out=out) is out
    np.testing.assert_array_equal(out, expected.argmax(1))


def test_files_in_and_out(tmp_path):
    x = (100 * image(3)[0, 0]).astype(np.int16)
    np.save(tmp_path / "x.npy", x)
    volume = np.load(tmp_path / "x.npy", mmap_mode="r")
    scores = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float32, (3, *x.shape))
    assert sliding_window(pointwise, volume, WINDOWS[3], out=scores) is scores
    scores.flush()
    assert_close(np.load(tmp_path / "y.npy"), pointwise(x[None, None].astype(np.float32))[0], 8)


def test_windows_are_counted_and_none_is_computed_twice():
    calls, progress = [], []

    def predict(x):
        calls.append(len(x))
        return pointwise(x)

    sliding_window(predict, np.zeros((2, 1, 20, 14)), (8, 6), batch_size=4,
                   progress=lambda done, total: progress.append((done, total)))
    # 1 + ceil((20 - 8) / 4) times 1 + ceil((14 - 6) / 3) windows in each of two images
    assert sum(calls) == 2 * 4 * 4
    assert max(calls) == 4
    assert progress[-1] == (32, 32)
    assert [done for done, _ in progress] == list(itertools.accumulate(calls))


def test_windows_have_the_dtype_asked_for():
    def check(x):
        assert x.dtype == np.float64
        return x

    assert sliding_window(check, np.ones((5, 5), bool), (3, 3), dtype=np.float64).dtype == np.float64


# ---- memory --------------------------------------------------------------------------------------------------------

# A volume that is computed where it is read, and labels that are counted where they are written; then files,
# whose pages the system counts as the process's own as long as it has memory for them, so that the rest is measured.
MEMORY = """
import sys
import numpy as np
from fastconv.inference import sliding_window

SHAPE, CLASSES = (1024, 64, 64), 16

class Made:
    shape = SHAPE
    def __getitem__(self, index):
        axes = [np.arange(s.start, s.stop, dtype=np.float32) for s in index]
        return axes[0][:, None, None] + axes[1][:, None] * axes[2]

class Counted:
    shape, dtype, total = SHAPE, np.dtype(np.uint8), 0
    def __setitem__(self, index, value):
        self.total += value.size

def predict(x):
    return np.concatenate([x * (k - 5) for k in range(CLASSES)], 1)

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024

options = {"window": (32, 48, 64), "batch_size": 2, "argmax": True, "overlap": 0.25}
predict(np.zeros((2, 1, 32, 48, 64), np.float32))
before, labels = status("VmHWM:"), Counted()
sliding_window(predict, Made(), out=labels, **options)
assert labels.total == np.prod(SHAPE)
extra = status("VmHWM:") - before

folder = sys.argv[1]
volume = np.memmap(folder + "/x", np.int16, "w+", shape=SHAPE)
written = np.memmap(folder + "/y", np.uint8, "w+", shape=SHAPE)
samples, before = [], status("RssAnon:")
sliding_window(predict, volume, out=written, progress=lambda *_: samples.append(status("RssAnon:")), **options)
print(extra, max(samples) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc has the numbers")
def test_memory_is_that_of_a_slab(tmp_path, ran):
    """The scores of the volume would take 256 MB; those of a slab take 8 MB, those of a batch 12 MB."""
    assert 1024 * 64 * 64 * 16 * 4 == 256 * 2**20
    result = subprocess.run([sys.executable, "-P", "-c", MEMORY, str(tmp_path)], capture_output=True, text=True,
                            check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    for kind, extra in zip(("computed", "on disk"), map(int, result.stdout.split()), strict=True):
        ran("memory of sliding windows", f"{extra / 2**20:5.1f} MB  {kind}")
        assert extra < 48 * 2**20


# ---- errors --------------------------------------------------------------------------------------------------------

X = np.zeros((1, 6, 6))


@pytest.mark.parametrize(("change", "kind", "message"), [
    ({"window": 3}, TypeError, "window is 3, but a tuple"),
    ({"window": (3, 0)}, ValueError, "window is 0, but at least 1"),
    ({"window": (3, 2.5)}, TypeError, "window is 2.5, but an integer"),
    ({"window": (1, 2, 3, 4)}, ValueError, "window has 4 spatial axes"),
    ({"window": ()}, ValueError, "window has 0 spatial axes"),
    ({"window": (3,), "image": np.zeros((2, 2, 2, 2))}, ValueError, r"must be \(L\), \(C, L\) or \(N, C, L\)"),
    ({"window": (3, 3, 3), "image": np.zeros((2, 2))}, ValueError, r"shape \(2, 2\), but with window \(3, 3, 3\)"),
    ({"image": [[1.0]]}, TypeError, "image is a list"),
    ({"image": np.zeros((0, 6, 6))}, ValueError, "holds no pixel"),
    ({"image": X.astype(complex)}, TypeError, "image has dtype complex128"),
    ({"overlap": 1}, ValueError, "overlap is 1, but 0 <= overlap < 1"),
    ({"overlap": -0.1}, ValueError, "overlap is -0.1"),
    ({"overlap": math.nan}, ValueError, "overlap is nan"),
    ({"weights": "hann"}, ValueError, "weights is 'hann', but one of 'gaussian', 'constant'"),
    ({"batch_size": 0}, ValueError, "batch_size is 0, but at least 1"),
    ({"dtype": np.float16}, TypeError, "dtype is float16"),
    ({"predict": lambda x: x[0]}, ValueError, r"predict gave shape \(1, 3, 3\) for one window \(3, 3\)"),
    ({"predict": lambda x: x[:0]}, ValueError, "for 1 windows"),
    ({"predict": lambda x: x[:, :0]}, ValueError, "one score for each class"),
    ({"predict": lambda x: x.astype(int)}, TypeError, "what predict gives has dtype int64"),
    ({"predict": lambda x: x[:, :, :len(x)]}, ValueError, "all must be alike"),
    ({"predict": lambda x: x.astype(np.float32 if len(x) == 1 else np.float64)}, ValueError, "all must be alike"),
    ({"argmax": True}, ValueError, "predict gave 1 score for each pixel"),
    ({"out": np.zeros((6, 6))}, ValueError, r"out has shape \(6, 6\), but the result has shape \(1, 6, 6\)"),
    ({"out": np.zeros((1, 6, 6), int)}, TypeError, "out has dtype int64, but the result has float32"),
    ({"predict": lambda x: np.repeat(x, 300, 1), "argmax": True, "out": np.zeros((6, 6), np.uint8)}, TypeError,
     "out has dtype uint8, but the result has uint16"),
])
def test_errors(change, kind, message):
    arguments = {"predict": lambda x: x, "image": X, "window": (3, 3), "batch_size": 2, **change}
    with pytest.raises(kind, match=message):
        sliding_window(**arguments)
