"""The comparison of networks: what it measures, that it resumes, and that its report is whole."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import fastconv
from fastconv import cli
from fastconv.compare import figures, labels, measure, networks, study
from fastconv.compare.data import balanced_order
from fastconv.compare.networks import NETWORKS
from fastconv.compare.study import Plan, Study
from fastconv.compare.text import interval
from fastconv.info import cpu_name
from fastconv.nn import Linear
from fastconv.nn.conv import _Conv
from fastconv.summary import summarize
from fastconv.training import load_checkpoint

pytest.importorskip("matplotlib")
MODELS = ("mlp", "lenet5", "plain20", "resnet20")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """200 of scikit-learn's digits as a file."""
    images, classes = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    path = tmp_path_factory.mktemp("data") / "few.npz"
    images = images.reshape(-1, 8, 8).astype(np.uint8)
    np.savez(path, x_train=images[:150], y_train=classes[:150], x_test=images[150:200], y_test=classes[150:200])
    return path


@pytest.fixture(autouse=True, scope="module")
def short():
    """Less of what takes long and decides nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "FEW_STEPS", 4)
        patch.setattr(measure, "FEW_EPOCHS", 1)
        patch.setattr(measure, "FEW_REPEATS", 1)
        patch.setattr(study, "PAIR_SEEDS", 2)
        patch.setattr(measure, "_seconds", partial(measure._seconds, budget=0.0))
        yield


def compare(data: Path, out: Path, *more: str) -> int:
    return cli.main(["compare", "--data", str(data), "--models", *MODELS, "--epochs", "1", "--out", str(out), *more])


def results(out: Path) -> dict[str, object]:
    """All that is saved, without what is measured by a clock."""
    def strip(node):
        if isinstance(node, dict):
            return {key: strip(value) for key, value in node.items()
                    if "seconds" not in key and key not in ("machine", "peak_bytes") and "_1" not in key
                    and "_batch" not in key}
        if isinstance(node, list):
            return [strip(value) for value in node]
        return node.tolist() if isinstance(node, np.ndarray) else node

    return {path.name: strip(load_checkpoint(path)) for path in sorted((out / "parts").glob("*.npz"))}


@pytest.fixture(scope="module")
def finished(short, digits, tmp_path_factory) -> Path:
    """A comparison that ran through."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert compare(digits, out) == 0
    return out


def test_the_report_is_whole_and_needs_nothing_else(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    root = ElementTree.fromstring(page.replace("<!DOCTYPE html>\n", ""))  # well-formed, or it raises
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.split("}")[-1] in ("href", "src"):
                assert value.startswith(("#", "data:")), value
                if value.startswith("#"):
                    assert value[1:] in ids
            assert all(target in ids for target in re.findall(r"url\(#([^)]*)\)", value))
        assert element.tag.split("}")[-1] not in ("script", "link", "iframe")
    assert "@import" not in page
    outside = set(re.findall(r"https?://[^\"' ]+", page))
    assert outside <= {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}

    pictures = [element for element in root.iter() if element.tag.endswith("}svg")]
    names = {path.stem for path in finished.glob("*.png")}
    assert len(pictures) == len(names) == 8
    assert {"accuracy", "auc", "time", "memory", "learning", "shortcuts", "few", "confusion"} == names
    assert all((finished / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    text = "".join(root.itertext())
    assert all(NETWORKS[name].label in text for name in MODELS)


def test_the_table_shows_what_was_measured(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    shown = {}
    for name in MODELS:
        row = re.search(rf"<tr><td>{re.escape(NETWORKS[name].label)}</td><td>([\d.]+)%</td>.*?</tr>", page)
        shown[name] = float(row.group(1)) / 100
        run = load_checkpoint(finished / "parts" / f"train-{name}-0.npz")
        confusion = run["confusion"]
        assert confusion.sum() == 50
        assert shown[name] == pytest.approx(np.trace(confusion) / 50, abs=1e-4)
    assert f"{61_706:,}" in page  # LeNet-5's parameters, as the paper's table adds up
    order = re.findall(r"<tr><td>([^<]*)</td><td>[\d.]+%</td>", page)
    assert order == [NETWORKS[name].label for name in sorted(MODELS, key=lambda name: -shown[name])]


def test_the_machine_is_described(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    machine = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page))
    assert machine["fastconv"] == fastconv.__version__  # not where it lies
    assert machine["CPU"] == cpu_name()
    assert {"CPU caches", "ISA", "Python", "threads"} <= machine.keys()


def test_an_interrupted_comparison_goes_on_as_if_it_had_not_been(digits, finished, tmp_path, monkeypatch, capsys):
    train, calls = measure.train, []

    def interrupted(name, *args, **options):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(name, *args, **options)

    monkeypatch.setattr(measure, "train", interrupted)
    assert compare(digits, tmp_path) == 130
    assert "fastconv compare --resume" in capsys.readouterr().out
    assert not (tmp_path / "report.html").exists()
    Study.resume(tmp_path, {}).run()
    assert len(calls) == 1 + sum(name.startswith("train") for name in results(finished))
    assert results(tmp_path) == results(finished)


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "--resume goes on with it"),
    (["--resume", "--seed", "5"], "was begun with seed 0, but 5 is given"),
    (["--resume", "--epochs", "7"], "was begun with epochs 1, but 7 is given"),
])
def test_a_folder_holds_one_comparison(digits, finished, capsys, arguments, message):
    assert cli.main(["compare", "--data", str(digits), "--out", str(finished), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_other_data_are_not_resumed(digits, finished, tmp_path, capsys):
    with np.load(digits) as file:
        np.savez(tmp_path / "other.npz", **{**file, "x_train": file["x_train"] // 2})
    assert cli.main(["compare", "--resume", "--data", str(tmp_path / "other.npz"), "--out", str(finished)]) == 2
    assert "other data" in capsys.readouterr().err


def test_a_diverged_network_does_not_stop_the_others(digits, tmp_path, monkeypatch):
    def diverged(model, *args, **options):
        raise FloatingPointError("fit: the loss is nan")

    fit = measure._fit
    monkeypatch.setattr(figures, "png", lambda figure, path: None)
    monkeypatch.setattr(measure, "_fit", lambda model, *a, **o: (
        diverged(model) if model.num_parameters() == 61_706 and "progress" in o else fit(model, *a, **o)))
    arguments = ["--data", str(digits), "--models", "mlp", "lenet5", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main(["compare", *arguments]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<td>LeNet-5 \(modern\)</td><td>diverged</td>", page)


def test_what_there_is_no_time_for_is_cut(digits, tmp_path):
    """First the images, to no fewer than 1000, then the epochs."""
    few = Study(Plan(data=str(digits), models=("mlp",), epochs=10, minutes=1), tmp_path)
    train = few.dataset.train
    few.dataset = study.replace(few.dataset, train=train[np.arange(4000) % len(train)], val=None)
    seconds = {"training_batch": 0.0, "inference_batch": 0.0, "part_seconds": 0.0}
    for each, expected in ((1e-4, (4000, 10)), (2e-3, (2550, 10)), (1e-2, (1000, 5)), (1.0, (1000, 1))):
        few._done = {"cost mlp": seconds | {"training_batch": each}}
        size = few._size(None)  # 0.85 * 60 seconds / (10 * each) images
        assert (size["images"], size["epochs"]) == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    """From images of 16 pixels to logits, and gradients for all parameters."""
    size = networks.input_size_of(NETWORKS[name], (16, 16))
    net = networks.build(name, 2, 3, (16, 16), 0)
    x = np.random.default_rng(0).standard_normal((2, 2, *size), dtype=np.float32)
    assert net(x).shape == (2, 3)
    outputs, backward = net.forward(x)
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    assert [y.shape for y in heads] == [(2, 3)] * (3 if name == "googlenet_aux" else 1)
    gradients = tuple(np.ones_like(y) for y in heads)
    backward(gradients if isinstance(outputs, tuple) else gradients[0])
    assert all(p.grad is not None for p in net.parameters())


def test_networks_in_3d():
    for name in ("googlenet_naive", "googlenet", "densenet22"):
        net = networks.build(name, 1, 2, (16, 16, 16), 0)
        assert net(np.zeros((1, 1, 16, 16, 16), np.float32)).shape == (1, 2)


def test_small_networks_have_the_structure_that_their_names_say():
    dense = networks.build("densenet22", 1, 10, (32, 32), 0)
    assert sum(isinstance(layer, (_Conv, Linear)) for _, layer in dense.named_layers()) == 22
    # Figure 2a: 1x1, 3x3 and 5x5 on all channels, and the pool hands them all on.
    naive = dict(networks.googlenet_small(1, 10, width=0.125, reduced=False, rng=0).children())
    assert naive["inception3a"].num_parameters() == 24 * (8 + 9 * 16 + 25 * 4) + 8 + 16 + 4
    assert next(iter(naive["inception3b"]))["conv"].in_channels == 8 + 16 + 4 + 24
    macs = [summarize(networks.build(name, 1, 10, (16, 16), 0), (1, 16, 16)).macs
            for name in ("googlenet", "googlenet_naive")]
    assert macs[1] > 5 * macs[0]


def test_interval():
    """Newcombe, Statistics in Medicine 17, 857 (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for count, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
                                    (1, 29, 0.0061, 0.1718)):
        assert interval(count / total, total) == pytest.approx((low, high), abs=5e-5)


def test_balanced_order():
    classes = np.repeat([0, 1, 2], [50, 10, 3])
    order = balanced_order(classes, np.random.default_rng(0))
    assert sorted(order) == list(range(63))
    assert np.bincount(classes[order[:9]]).tolist() == [3, 3, 3]
    assert np.bincount(classes[order[:23]]).tolist() == [10, 10, 3]
    assert order.tolist() != balanced_order(classes, np.random.default_rng(1)).tolist()


def test_labels_do_not_overlap():
    rng = np.random.default_rng(0)
    frame = labels.Box(0, 0, 800, 450)
    for _ in range(5):
        bubbles = [(float(x), float(y), float(r)) for x, y, r in zip(
            rng.uniform(60, 740, 13), rng.uniform(40, 410, 13), rng.uniform(4, 22, 13), strict=True)]
        boxes = labels.place(bubbles, [(float(w), 14.0) for w in rng.uniform(40, 110, 13)], frame)
        assert all(frame.left <= b.left and b.right <= frame.right and frame.bottom <= b.bottom
                   and b.top <= frame.top for b in boxes)
        assert sum(a.overlap(b) for i, a in enumerate(boxes) for b in boxes[:i]) == 0


@pytest.mark.slow
def test_on_mnist_a_residual_network_beats_the_plain_one(tmp_path):
    """20 layers each, 1,500 digits, two seeds; the report says so."""
    data = Path(os.environ.get("FASTCONV_DATA", ""), "mnist.npz")
    if not data.is_file():
        pytest.skip("FASTCONV_DATA does not name a folder with mnist.npz")
    with np.load(data) as file:
        cut = {name: file[name][:1500 if "train" in name else 1000] for name in file}
    np.savez(tmp_path / "mnist.npz", **cut)
    arguments = ["--data", str(tmp_path / "mnist.npz"), "--models", "plain20", "resnet20", "--epochs", "4"]
    assert cli.main(["compare", *arguments, "--minutes", "600", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "ResNet-20 beats Plain-20 with every seed, on the training images too" in page
