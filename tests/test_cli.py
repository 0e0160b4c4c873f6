"""The command line: what it prints, its exit codes, and that Ctrl-C costs no more than the running epoch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastconv
from fastconv import cli
from fastconv.training import load_checkpoint


def write_digits(path: Path, count: int = 300, size: int = 12) -> Path:
    """Discs (0) and rings (1) of any place, in noise."""
    rng = np.random.default_rng(0)
    classes = np.arange(count) % 2
    y, x = np.mgrid[:size, :size]
    centre = rng.uniform(4, size - 5, (2, count, 1, 1))
    radius = np.hypot(y - centre[0], x - centre[1])
    inside = np.where(classes[:, None, None] == 1, (radius < 4) & (radius > 2), radius < 3)
    images = np.clip(180 * inside + rng.normal(40, 20, radius.shape), 0, 255).astype(np.uint8)
    np.savez(
        path, x_train=images[60:], y_train=classes[60:], x_test=images[:60], y_test=classes[:60].astype(np.uint8)
    )
    return path


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


def test_version_and_help(capsys):
    for arguments in (["--version"], ["--help"], *([name, "--help"] for name in cli.COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"fastconv {fastconv.__version__}\n")


def test_info(capsys, monkeypatch):
    with fastconv.config(threads=3, exact=True):
        assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert rows["fastconv"].startswith(fastconv.__version__)
    assert np.__version__ in rows["Python"]
    assert rows["threads"] == "3: set by config(threads=3)"
    assert "exact=True" in rows["settings"]
    assert rows["ISA"].split()[0] in ("generic", "avx2", "avx512", "neon")
    for name in ("CPU", "kernels", "OpenMP", "caches", "algorithms", "tiles"):
        assert rows[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: " + " | ".join(cli.COMMANDS)),
        (["dance"], "invalid choice: 'dance'"),
        (["train", "--model", "resnet9000"], "invalid choice: 'resnet9000' (choose from "),
        (["train", "--epochs", "0"], "'0' is given, but an integer of at least 1"),
        (["train", "--batch-size", "many"], "'many' is given, but an integer of at least 1"),
        (["train", "--lr", "-1"], "'-1' is given, but a number above 0"),
        (["train", "--lr", "nan"], "a number above 0"),
        (["train", "--val-fraction", "1"], "0 <= fraction < 1"),
        (["train", "--augment", "shift", "spin"], "'spin' is given, but one of flip, mirror, "),
        (["demo", "--threads", "0"], "'0' is given, but an integer of at least 1"),
        (["demo", "--seed", "-3"], "an integer of at least 0"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in one_line(capsys)


def test_bad_files(capsys, tmp_path):
    text = tmp_path / "text.npz"
    text.write_text("no arrays")
    digits = write_digits(tmp_path / "digits.npz")
    out = ["--out", str(tmp_path / "out")]
    cases = [
        (["--model", "lenet5"], "--data needed"),
        (["--resume"], "--model and --data needed, or --resume with --out"),
        (["--model", "lenet5", "--data", str(tmp_path / "none.npz")], "No such file"),
        (["--model", "lenet5", "--data", str(text)], "text.npz"),
        (["--model", "cnn3d", "--data", str(digits)], "cnn3d does not take images of 1 x 12 x 12: "),
        (["--resume", *out], "checkpoint.npz"),
    ]
    for arguments, message in cases:
        if "--out" not in arguments and "--resume" not in arguments:
            arguments = [*arguments, *out]
        assert cli.main(["train", *arguments]) == 2, arguments
        assert message in one_line(capsys), arguments
    assert not (tmp_path / "out").exists(), "a refused run leaves nothing behind"


def test_train_and_resume(capsys, tmp_path, monkeypatch):
    data, out = write_digits(tmp_path / "digits.npz"), tmp_path / "out"
    train = ["train", "--model", "lenet5", "--data", str(data), "--out", str(out), "--batch-size", "16"]
    assert cli.main([*train, "--epochs", "8", "--threads", "1", "--augment", "shift"]) == 0
    text = capsys.readouterr().out
    assert "216 to train, 24 to validate, 60 to test; 1 channel of 12x12, 2 classes" in text
    assert "\r" not in text
    assert len(re.findall(r"^epoch \d/8  loss .* val loss .* auc ", text, re.MULTILINE)) == 8
    accuracy, auc = re.search(r"^test .* acc (\S+)%  auc (\S+)$", text, re.MULTILINE).groups()
    assert float(accuracy) > 90
    assert float(auc) > 0.95
    assert "true \\ predicted" in text

    assert cli.main([*train, "--epochs", "8"]) == 2
    assert "is there already. Hint: --resume" in one_line(capsys)
    assert cli.main([*train[:-2], "--resume", "--lr", "0.5"]) == 2
    assert "made with lr None, but 0.5 is given" in one_line(capsys)

    monkeypatch.chdir(out)  # data and model are found again from the checkpoint
    assert cli.main(["train", "--resume", "--out", str(out), "--epochs", "9"]) == 0
    text = capsys.readouterr().out
    assert "8 epochs done" in text
    assert re.findall(r"^epoch (\d)/9", text, re.MULTILINE) == ["9"]


def test_divergence_is_one_line(capsys, tmp_path):
    data, out = write_digits(tmp_path / "digits.npz"), str(tmp_path / "out")
    run = ["train", "--model", "lenet5", "--data", str(data), "--out", out, "--optimizer", "sgd", "--lr", "1e30"]
    assert cli.main(run) == 1
    assert "training has diverged" in one_line(capsys)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_then_resume_ends_in_the_same_bits(tmp_path):
    data = write_digits(tmp_path / "digits.npz")
    epochs = 15
    arguments = [
        sys.executable, "-m", "fastconv", "train", "--model", "lenet5", "--data", str(data),
        "--epochs", str(epochs), "--batch-size", "16", "--threads", "1",
    ]  # fmt: skip
    process = subprocess.Popen(
        [*arguments, "--out", "stopped"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # tests in the background ignore the signal, and what they start would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = ""
    while "epoch  2/" not in seen:
        line = process.stdout.readline()
        assert line, process.communicate()
        seen += line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""
    assert "Go on with: fastconv train --resume --out stopped" in out
    path = tmp_path / "stopped" / "checkpoint.npz"
    done = len(load_checkpoint(path)["history"])
    assert 2 <= done < epochs
    assert f"holds {done} of {epochs} epochs" in out

    resume = [*arguments[:4], "--resume", "--out", "stopped", "--threads", "1"]
    for command in (resume, [*arguments, "--out", "straight"]):
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, timeout=120)
    states = [load_checkpoint(tmp_path / name / "checkpoint.npz") for name in ("stopped", "straight")]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for name, value in states[0]["model"].items():
        assert value.tobytes() == states[1]["model"][name].tobytes(), name
    losses = [[record["train_loss"] for record in state["history"]] for state in states]
    assert losses[0] == losses[1]
    assert len(losses[0]) == epochs


@pytest.mark.parametrize(("given", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_openmp_threads_do_not_spin_for_long(given, spins):
    """Threads that spin between calls stall training where CPUs are shared."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    code = "import os, fastconv; print(os.environ.get('GOMP_SPINCOUNT'))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    if "GOMP_SPINCOUNT" not in result.stderr:
        pytest.skip("this build does not use GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in result.stderr
    assert result.stdout.strip() == given.get("GOMP_SPINCOUNT", "None"), "the variable is for the engine alone"
