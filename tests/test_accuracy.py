"""The rounding errors of docs/accuracy.md stay within the bounds that it states."""

import sys
from pathlib import Path

import pytest
from tolerance import tolerance

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))  # it is a folder of scripts, not a package

import accuracy  # noqa: E402


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("data", accuracy.DATA)
@pytest.mark.parametrize("kernel", accuracy.KERNELS)
def test_every_algorithm_keeps_its_bound(kernel, data, dtype):
    for channels in (3, 64):
        found = list(accuracy.errors(kernel, data, channels, dtype))
        assert len(found) >= 3
        for error in found:
            bound = tolerance(dtype, error.reduction, error.algorithm, ndim=kernel.count("x") + 1)
            assert 0 < error.worst <= bound, error
            assert error.rms < error.worst


def test_larger_tiles_round_more():
    """Otherwise the table would not measure what it says: the transforms of large tiles amplify rounding."""
    rms = {error.algorithm: error.rms for error in accuracy.errors("3x3x3", "normal", 32)}
    order = ["winograd f2x2x2_3x3x3", "winograd f2x4x4_3x3x3", "winograd f4x4x4_3x3x3"]
    assert sorted(order, key=rms.__getitem__) == order


def test_the_table_has_a_line_for_each(capsys):
    assert accuracy.main(["--channels", "2", "5", "--kernels", "3"]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| kernel | algorithm | data | 2 channels | 5 channels |"
    assert {line.split("|")[3].strip() for line in lines} == set(accuracy.DATA)
    assert any("direct, im2col" in line for line in lines)
