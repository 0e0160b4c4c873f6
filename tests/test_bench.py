"""The benchmarks measure what they say: rows, ratios, peers that compute the same thing, the command line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # it is a folder of scripts, not a package

import measure  # noqa: E402
import overhead  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402

from fastconv.problem import conv_problem, conv_transpose_problem  # noqa: E402

ROWS = {row.name: row for row in shapes.load()}
CLASSES = ("3x3s1", "3x3x3s1", "first", "1x1", "strided", "5x5+", "grouped", "depthwise", "dilated", "1d",
           "transposed", "small_maps", "lenet", "linear", "pooling")


def python(*arguments, text=None):
    return subprocess.run([sys.executable, *map(str, arguments)], input=text, capture_output=True, text=True,
                          timeout=300, check=False)


# ---- Rows --------------------------------------------------------------------------------------------------------

def test_every_class_has_rows():
    assert {row.kind for row in ROWS.values()} == set(CLASSES)
    assert {row.ndim for row in ROWS.values()} == {1, 2, 3}


@pytest.mark.parametrize(("name", "y_shape", "macs"), [
    ("vgg_conv1_2", (1, 64, 224, 224), 64 * 64 * 9 * 224 * 224),
    ("resnet_conv1", (1, 64, 112, 112), 3 * 64 * 49 * 112 * 112),
    ("alexnet_conv1", (1, 96, 55, 55), 3 * 96 * 121 * 55 * 55),
    ("alexnet_conv2", (1, 256, 27, 27), 48 * 256 * 25 * 27 * 27),
    ("erfnet_128_64_32", (1, 64, 64, 64), 128 * 64 * 9 * 32 * 32),
    ("dcgan_128_64_32", (1, 64, 64, 64), 128 * 64 * 16 * 32 * 32),
    ("r3d_video_conv1", (1, 64, 16, 56, 56), 3 * 64 * 147 * 16 * 56 * 56),
    ("resnet_max_3x3_64_112", (1, 64, 56, 56), 0),
    ("resnet3d_global_512_4_b8", (8, 512, 1, 1, 1), 0),
])
def test_geometry_of_known_layers(name, y_shape, macs):
    assert ROWS[name].y_shape == y_shape
    assert ROWS[name].macs == macs


@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.op in shapes.CONVS], ids=lambda row: row.name)
def test_geometry_is_that_of_fastconv(row):
    x, w = (np.broadcast_to(np.float32(0), shape) for shape in (row.x_shape, row.w_shape))
    if row.op == "conv":
        problem = conv_problem(x, w, *row.arguments)
        assert problem.y_shape == row.y_shape
    else:
        problem = conv_transpose_problem(x, w, *row.arguments)
        assert problem.x_shape == row.y_shape
    assert problem.macs == row.macs


@pytest.mark.parametrize(("change", "words"), [
    ({"size": [8, 0]}, "size is (8, 0), but 1 to 3 positive integers"),
    ({"size": [2, 2, 2, 2]}, "size"),
    ({"kernel": [3]}, "kernel is [3], but 2 integers of at least 1"),
    ({"stride": 0}, "stride is 0"),
    ({"padding": -1}, "padding is -1"),
    ({"batch": True}, "batch is True"),
    ({"groups": 3}, "channels is 4, which groups=3 does not divide"),
    ({"kernel": 11}, "is empty"),
    ({"op": "convolution"}, "op is 'convolution'"),
    ({"strides": 2}, "strides is not known"),
    ({"op": "max_pool"}, "a pool keeps its channels"),
    ({"channels": None}, "channels is missing"),
    ({"out_channels": None}, "out_channels is missing"),
])
def test_bad_rows_are_refused(change, words):
    entry = {"channels": 4, "out_channels": 8, "size": [8, 8], "kernel": 3, "networks": []}
    assert shapes.make_row("good", "some", entry).y_shape == (1, 8, 6, 6)
    entry = {key: value for key, value in (entry | change).items() if value is not None}
    with pytest.raises(ValueError, match="row 'bad' of class 'some'") as error:
        shapes.make_row("bad", "some", entry)
    assert words in str(error.value)


def test_names_are_unique(tmp_path):
    path = tmp_path / "shapes.toml"
    row = "same = { channels = 1, out_channels = 1, size = [5], kernel = 1, networks = [] }"
    path.write_text(f"[one]\n{row}\n[two]\n{row}\n")
    with pytest.raises(ValueError, match="'same' names 2 rows"):
        shapes.load(path)


def test_select_by_class_and_name():
    rows = list(ROWS.values())
    assert {row.kind for row in shapes.select(rows, ["1x1"])} == {"1x1"}
    assert [row.name for row in shapes.select(rows, ["lenet_c3", "lenet_c1"])] == ["lenet_c1", "lenet_c3"]
    assert all(row.name.startswith("vgg_") for row in shapes.select(rows, ["vgg_*"]))
    with pytest.raises(ValueError, match="called '2x2'"):
        shapes.select(rows, ["1x1", "2x2"])


def test_random_rows():
    rows = shapes.draw(50, 7)
    assert rows == shapes.draw(50, 7)
    assert rows != shapes.draw(50, 8)
    for row in rows:
        assert 3 <= row.channels <= 512
        assert 3 <= row.out_channels <= 512
        assert all(5 <= n <= 200 for n in row.size)
        assert row.macs <= shapes.MOST_RANDOM_MACS
    assert {row.kernel for row in rows} == {(k, k) for k in (1, 3, 5, 7)}
    assert {row.stride for row in rows} == {(1, 1), (2, 2)}


# ---- Ratios ------------------------------------------------------------------------------------------------------

def record(name="lenet_c1", **milliseconds):
    return {
        "row": ROWS[name].to_dict(), "direction": "fwd", "notes": {},
        "times": {peer: {"min": t / 1e3, "median": 2 * t / 1e3} for peer, t in milliseconds.items()},
        "algorithms": {"fastconv": "im2col", "fastconv_cl": "direct"}, "extra_bytes": 3 * 2**20,
    }


def test_ratios():
    found = report.line(record(fastconv=4.0, fastconv_cl=2.0, torch=12.0, torch_cl=8.0, onnxruntime=3.0, numpy=0.5))
    assert (found.best, found.algorithm, found.best_peer) == ("fastconv_cl", "direct", "onnxruntime")
    assert found.x_best == pytest.approx(1.5)
    assert found.x_best_median == pytest.approx(1.5)
    assert found.x_torch == pytest.approx(3)
    assert found.x_torch_best == pytest.approx(4)
    assert found.speed == pytest.approx(2 * 25 * 6 * 28 * 28 / 2e-3 / 1e9)
    assert found.extra_mb == 3


def test_pools_count_bytes_and_training_three_passes():
    found = report.line(record("resnet_max_3x3_64_112", fastconv=1.0))
    assert found.speed == pytest.approx(4 * 64 * (112 * 112 + 56 * 56) / 1e-3 / 1e9)
    step = record(fastconv=1.0) | {"direction": "fwdbwd"}
    assert report.line(step).speed == pytest.approx(3 * report.line(record(fastconv=1.0)).speed)


def test_what_is_missing_is_a_dash():
    found = report.line(record(torch=1.0))
    assert (found.seconds, found.x_best, found.x_torch) == (None, None, None)
    assert report.line(record(fastconv=1.0)).x_best is None
    assert " - " in report.text(record(torch=1.0), ["fastconv", "torch"], 100.0, 10)


def test_summary_has_geometric_means():
    records = [record("lenet_c1", fastconv=1.0, torch=2.0), record("lenet_c3", fastconv=1.0, torch=8.0),
               record("vgg_conv1_1", fastconv=2.0, torch=1.0)]
    rows = {line.split()[0]: line.split()[1:] for line in report.summary(records).splitlines()}
    assert rows["lenet"] == ["2", "4.00", "2.00", "4.00", "4.00", "4.00", "lenet_c1"]
    assert rows["first"] == ["1", "0.50", "0.50", "0.50", "0.50", "0.50", "vgg_conv1_1"]
    assert rows["all"] == ["3", "2.00", "0.50", "2.00", "2.00", "2.00", "vgg_conv1_1"]
    assert report.geometric_mean([2, 8]) == pytest.approx(4)


def test_distribution():
    records = [record(fastconv=1.0, torch=ratio) for ratio in (0.5, 0.9, 1.5, 2.5)] + [record(torch=1.0)]
    text = report.distribution(records)
    assert "over 4 rows: min 0.50, 5% 0.50, 25% 0.90, median 1.50" in text
    # (0.5 * 0.9 * 1.5 * 2.5)**(1 / 4) = 1.14
    assert "max 2.50, geometric mean 1.14; 25.0% below 0.8, 50.0% below 1, 50.0% below 1.5, 75.0% below 2" in text
    text = report.distribution([record(fastconv=1.0, torch=1.0 + i / 100) for i in range(30)])
    assert [line.split()[0] for line in text.partition("worst:\n")[2].splitlines()] == [
        f"{1 + i / 100:.2f}" for i in range(10)]
    assert report.distribution([record(torch=1.0)]) == "no row has both fastconv and a peer"


def test_chart(tmp_path):
    pytest.importorskip("matplotlib")
    records = [record("lenet_c1", fastconv=1.0, torch=2.0), record("vgg_conv1_1", fastconv=3.0, onnxruntime=2.0)]
    report.chart(records, tmp_path / "chart.png", "title")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


# ---- Peers -------------------------------------------------------------------------------------------------------

SMALL = {
    "conv": {"out_channels": 6, "size": [9, 8], "kernel": [3, 2], "stride": [2, 1], "padding": [1, 2]},
    "dilated": {"out_channels": 6, "size": [9, 11], "kernel": [3, 2], "padding": [2, 0], "dilation": [2, 3]},
    "grouped": {"out_channels": 6, "size": [7, 9], "kernel": 3, "padding": 1, "groups": 2},
    "depthwise": {"out_channels": 4, "size": [7, 9], "kernel": 3, "stride": 2, "groups": 4},
    "1d": {"out_channels": 6, "size": [20], "kernel": 5, "stride": 3, "padding": 2, "batch": 2},
    "3d": {"out_channels": 6, "size": [5, 6, 7], "kernel": [3, 1, 2], "padding": [1, 0, 1]},
    "transposed": {"op": "conv_transpose", "out_channels": 6, "size": [5, 4], "kernel": [3, 4], "stride": [2, 3],
                   "padding": [1, 0], "output_padding": [1, 2]},
    "transposed dilated": {"op": "conv_transpose", "out_channels": 6, "size": [5, 4], "kernel": [3, 2],
                           "dilation": [1, 2], "padding": [1, 0]},
    "max": {"op": "max_pool", "size": [9, 8], "kernel": [3, 2], "stride": [2, 1], "padding": [1, 0]},
    "avg": {"op": "avg_pool", "size": [9, 8], "kernel": [3, 2], "stride": [2, 1], "padding": [1, 0]},
    "global": {"op": "global_avg_pool", "size": [9, 8]},
    "global 3d": {"op": "global_avg_pool", "size": [3, 4, 5], "batch": 2},
}


@pytest.fixture(scope="module")
def measured():
    """Every small row and pass, by all peers that are installed: in a process, which they may not leave in peace."""
    jobs = {}
    for name, entry in SMALL.items():
        row = shapes.make_row(name, "small", {"channels": 4, "networks": [], **entry})
        for direction in peers.PASSES:
            if direction != "wgrad" or row.op in shapes.CONVS:
                jobs[f"{name}, {direction}"] = {"row": row.to_dict(), "peers": list(peers.PEERS), "threads": 1,
                                                "direction": direction, "rounds": 1}
    code = (f"import json, sys; sys.path.insert(0, {str(BENCH)!r}); import measure\n"
            "measure.BURST_SECONDS = measure.PAUSE_SECONDS = 0\n"
            "print(json.dumps({name: measure.measure(job) for name, job in json.load(sys.stdin).items()}))")
    done = python("-P", "-c", code, text=json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_peers_compute_the_same(measured):
    """`measure` compares the results with torch's, or else with those of fastconv."""
    assert len(measured) == 12 * 3 + 8
    for name, found in measured.items():
        bad = {peer: note for peer, note in found["notes"].items() if note.startswith(("wrong", "failed"))}
        assert not bad, name
        assert {"fastconv", "fastconv_cl", "numpy"} <= set(found["times"]), name
        for time in found["times"].values():
            assert 0 < time["min"] <= time["median"]


def test_every_installed_peer_ran(measured):
    notes = measured["conv, fwd"]["notes"]
    assert set(measured["conv, fwd"]["times"]) | set(notes) == set(peers.PEERS)
    assert all(note.startswith("not installed") for note in notes.values()), notes


def test_algorithm_and_memory_are_told(measured):
    found = measured["conv, fwd"]
    assert set(found["algorithms"]) == {"fastconv", "fastconv_cl"}
    if sys.platform == "linux":
        assert 0 <= found["extra_bytes"] < 50 * 2**20


def test_extra_memory_sees_what_a_run_holds():
    if sys.platform != "linux":
        pytest.skip("/proc")
    case = peers.make_case(ROWS["lenet_c1"])
    megabytes = 64

    def prepare(_):
        kept = np.ones(megabytes * 2**18, np.float32)
        return lambda: kept[:1] + np.ones(megabytes * 2**18, np.float32).sum()

    _, _, extra = measure._first_run(peers.Peer("none", prepare), case)
    assert extra / 2**20 == pytest.approx(2 * megabytes, abs=4)


@pytest.mark.parametrize(("value", "note"), [(1.0, None), (1.002, "wrong: off by 0.002"), (math.nan, "wrong")])
def test_wrong_results_are_noticed(value, note):
    right = (np.ones(4), np.full(3, 2.0))
    other = (np.array([1, 1, 1, value]), right[1])
    notes = measure._wrong({"fastconv": other, "torch": right})
    assert set(notes) == ({"fastconv"} if note else set())
    assert notes.get("fastconv", "").startswith(note or "")


def test_other_numbers_of_elements_are_wrong():
    assert "elements" in measure._wrong({"a": (np.ones(4),), "b": (np.ones(5),)})["b"]


# ---- Command line ------------------------------------------------------------------------------------------------

def test_compare_measures_writes_and_shows(tmp_path):
    path = tmp_path / "results" / "lenet.json"
    done = python(BENCH / "compare.py", "--only", "lenet_c5", "lenet_s2_b64", "--peers", "fastconv,numpy", "--threads",
                  1, "--rounds", 1, "--json", path)
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    assert [r["row"]["name"] for r in data["rows"]] == ["lenet_c5", "lenet_s2_b64"]
    assert all(set(r["times"]) == {"fastconv", "numpy"} for r in data["rows"])
    assert data["versions"]["fastconv"]
    assert {"machine", "date", "commit", "peak_gflops"} <= set(data)
    shown = python(BENCH / "compare.py", "--load", path)
    assert shown.returncode == 0, shown.stderr
    for line in shown.stdout.splitlines():
        assert line in done.stdout, "shown again, the table is the same"
    assert "lenet_c5" in shown.stdout


def test_random_prints_the_distribution():
    done = python(BENCH / "compare.py", "--random", 1, "--seed", 3, "--peers", "fastconv", "--threads", 1,
                  "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert shapes.draw(1, 3)[0].name in done.stdout
    assert "no row has both fastconv and a peer" in done.stdout


def test_overhead_prints_a_line_for_each_layer_and_order(capsys):
    assert overhead.main(["--calls", "1", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(overhead.LAYERS)
    assert all("functional.conv2d +" in line and "prepare_conv +" in line for line in lines)


@pytest.mark.parametrize(("arguments", "words"), [
    (("--peers", "fastconv,tensorflow"), "tensorflow is not known"),
    (("--only", "no_such_row"), "no row and no class is called 'no_such_row'"),
    (("--threads", "0"), "--threads: 0 is not positive"),
    (("--only", "pooling", "--pass", "wgrad"), "pools have no weights"),
])
def test_bad_arguments_are_refused(arguments, words):
    done = python(BENCH / "compare.py", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_peak_follows_the_vector_width():
    compare = pytest.importorskip("compare")
    native = compare.native_isa()
    peak = compare.fma_peak(native, 1)
    if peak is None:
        pytest.skip("no C compiler")
    assert 1 < peak < 1000  # GFLOP/s of one core: 2 flops x lanes x pipes x GHz
    if native in ("avx2", "avx512"):
        assert peak > 1.5 * compare.fma_peak("generic", 1)
