"""Commands that take a network by its name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastconv import cli
from fastconv.models import MODELS


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_summary(capsys):
    code, text, _ = run(capsys, "summary", "googlenet")
    lines = text.splitlines()
    assert code == 0
    assert lines[0] == "googlenet, input 3x224x224"
    assert len(lines) < 70
    assert max(map(len, lines)) <= 100
    assert "6,998,552 parameters (28.0 MB)" in text  # the paper's network, see `googlenet`
    code, text, _ = run(capsys, "summary", "googlenet", "--depth", "9")
    assert code == 0
    assert len(text.splitlines()) > 150


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        (["lenet5", "--variant", "paper"], "lenet5 (paper), input 1x28x28"),
        (["resnet_small", "--options", "width=0.5", "residual=false"],
         "resnet_small (width=0.5, residual=False), input 3x32x32"),
        (["resnet_small", "--input", "1,20,24"], "resnet_small, input 1x20x24"),
        (["resnet_small", "--input", "2x16x20x24", "--num-classes", "3"], "resnet_small, input 2x16x20x24"),
        (["resnet_small", "--ndim", "3", "--in-channels", "1"], "resnet_small, input 1x32x32x32"),
        (["cnn3d"], "cnn3d, input 1x28x28x28"),
        (["mlp", "--ndim", "1"], "mlp, input 1x28"),
    ],
)
def test_options_of_the_input(capsys, arguments, title):
    code, text, _ = run(capsys, "summary", *arguments)
    lines = text.splitlines()
    assert code == 0
    assert lines[0] == title
    outputs = [line.split()[2] for line in lines[3 : lines.index("", 3) - 1]]
    assert outputs[-1] == ("3" if "--num-classes" in arguments else "10")


def test_bottlenecks(capsys):
    code, text, _ = run(capsys, "summary", "googlenet", "--bottlenecks")
    assert code == 0
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()[2:]}
    assert rows["inception3a.branch3.1"] == "5² 192->16->32 12.4 M 120 M 9.68x 15.9 k 154 k 9.65x"
    assert rows["inception4a.branch3.1"].startswith("5² 480->16->48 5.27 M 113 M 21.4x")
    assert len([name for name in rows if name.startswith("inception")]) == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet9000"], "invalid choice: 'resnet9000' (choose from "),
        ([], "required: MODEL"),
        (["resnet18", "--input", "3"], "'3' is given, but channels and 1 to 3 sizes"),
        (["resnet18", "--input", "3,0,4"], "'3,0,4' is given, but channels and 1 to 3 sizes"),
        (["resnet18", "--input", "3,4,4", "--ndim", "3"], "--ndim is 3, but --input 3,4,4 says 2. Hint: "),
        (["resnet18", "--input", "3,4,4", "--in-channels", "1"], "--in-channels is 1, but --input 3,4,4 says 3"),
        (["vgg11", "--variant", "paper"], "vgg11 has one form only; lenet5, alexnet, googlenet, resnet10, resnet18, "),
        (["resnet18", "--options", "widht=2"], "widht is given, but resnet18 takes stem, residual, variant, width"),
        (["resnet18", "--options", "width=broad"], "resnet18 does not take the options {'width': 'broad'}: "),
        (["resnet18", "--options", "width"], "'width' is given, but NAME=VALUE is needed"),
        (["lenet5", "--variant", "best"], "variant is 'best', but one of"),
        (["cnn3d", "--ndim", "2"], "cnn3d has 3 spatial axes"),
        (["densenet121", "--input", "3,8,8"], "features.denseblock3.entry: the window covers"),
        (["resnet18", "--depth", "0"], "an integer of at least 1"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    code, text, error = run(capsys, "summary", *arguments)
    assert code == 2
    assert text == ""
    assert message in error
    assert error.count("\n") == 1


# VGG and AlexNet have large linear layers, which take a second to make; test_models.py has their numbers.
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(("vgg", "alexnet"))])
def test_networks_have_a_summary(capsys, name):
    ndim = MODELS[name].ndims[-1]
    code, text, _ = run(capsys, "summary", name, "--input", ",".join(["1", *["32"] * ndim]))
    assert code == 0
    assert "parameters (" in text


def test_a_closed_pipe_is_no_error():
    code = "import sys; from fastconv import cli; sys.exit(cli.main(['summary', 'resnet_small', '--depth', '9']))"
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
