"""The GPU backend's kernels under AddressSanitizer, UndefinedBehaviorSanitizer and, as race checker, ThreadSanitizer;
and which of their lines run at all (gcov). All of it is the emulator's build of the CUDA sources, with further flags.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import building
import pytest
from cuda_emulator import require_compiler

from fastconv.backends.cuda import device as backend

ADDRESS = "-fsanitize=address,undefined -fno-omit-frame-pointer"
RACES = "-fsanitize=thread"
FORMS = "test_cuda_forms.py"  # of every kernel
LEAST_COVERAGE = 0.95


def library(name: str) -> str:
    """The run-time library of a sanitizer, which has to be there before Python is."""
    if not sys.platform.startswith("linux") or shutil.which("gcc") is None:
        pytest.skip("needs GCC on Linux")
    command = ["gcc", f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"no {name}")
    return found


def run(folder: Path, flags: str, command: list[str], preload: str = "", **environment: str) -> str:
    """Run Python where kernels are compiled with `flags`; returns what it prints."""
    require_compiler()
    environment |= {"FASTCONV_EMULATOR_FLAGS": flags, "FASTCONV_EMULATOR_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    if preload:
        environment |= {"LD_PRELOAD": library(preload), "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0"}
    return building.run([sys.executable, *command], folder, check=False, **environment).stdout


def run_forms(folder: Path, flags: str, which: str, preload: str = "") -> str:
    """Run `FORMS`; returns what is printed, after checking that tests passed."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(building.ROOT / "pyproject.toml"),
               str(building.ROOT / "tests" / FORMS), "-k", which]
    output = run(folder, flags, command, preload)
    assert re.search(r"\d+ passed", output), output[-6000:]
    assert "failed" not in output, output[-6000:]
    return output


def planted(folder: Path, flags: str, preload: str, program: str) -> str:
    """Run a kernel with a mistake in it; returns what is printed."""
    start = f"import sys; sys.path.insert(0, {str(building.ROOT / 'tests')!r}); import pytest, test_cuda_device\n"
    return run(folder, flags, ["-c", start + program], preload)


SMALL = "test_cuda_device.run_planted(pytest.MonkeyPatch(), 0, write={!r}, barrier={!r})"


@pytest.mark.slow
@pytest.mark.parametrize(("write", "report"), [
    ("s[threadIdx.x + threadIdx.x / 63] = x[threadIdx.x];", "AddressSanitizer: heap-buffer-overflow"),
    ("s[threadIdx.x] = x[threadIdx.x + threadIdx.x / 63];", "AddressSanitizer: heap-buffer-overflow"),
    ("volatile int large = 2147483647; s[threadIdx.x] = large + 1;", "runtime error: signed integer overflow")])
def test_what_is_wrong_is_reported(tmp_path: Path, write: str, report: str) -> None:
    assert report in planted(tmp_path, ADDRESS, "libasan.so", SMALL.format(write, "__syncthreads();"))


@pytest.mark.slow
def test_addresses_and_arithmetic(tmp_path: Path) -> None:
    output = run_forms(tmp_path, ADDRESS, "(float32 or float16) and forward", "libasan.so")
    assert "AddressSanitizer" not in output, output[-6000:]
    assert "runtime error" not in output, output[-6000:]


RACE = """
import test_cuda_mistakes
group = "weight_grad_mma.cu", "conv_weight_grad", "float16"
test_cuda_mistakes.seen_in(*test_cuda_mistakes.plant(group, "no barrier in the loop", pytest.MonkeyPatch()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [
    SMALL.format("s[threadIdx.x] = x[threadIdx.x];", ""), RACE],
    ids=["small", "weight gradient"])
def test_a_race_is_reported(tmp_path: Path, program: str) -> None:
    assert "ThreadSanitizer: data race" in planted(tmp_path, RACES, "libtsan.so", program)


@pytest.mark.slow
def test_there_is_no_race(tmp_path: Path) -> None:
    """In one order of warps: what nothing orders is seen in whichever order it happens to run."""
    which = "(float32 or float16) and forward and not eager"
    output = run_forms(tmp_path, RACES, which, "libtsan.so")
    assert "ThreadSanitizer" not in output, output[:6000]


def lines_that_ran(folder: Path) -> dict[str, Counter[int]]:
    """How often each line of each CUDA source ran, as gcov counted."""
    notes = sorted(str(path) for path in folder.glob("*.gcno"))
    done = subprocess.run(["gcov", "--json-format", "--stdout", *notes], cwd=folder, capture_output=True, text=True,
                          check=True)
    ran: dict[str, Counter[int]] = {}
    for report in done.stdout.splitlines():
        for file in json.loads(report)["files"]:
            if file["file"].endswith((".cu", ".cuh")):
                counts = ran.setdefault(file["file"], Counter())
                for line in file["lines"]:
                    counts[line["line_number"]] += line["count"]
    return ran


@pytest.mark.slow
def test_lines_run(tmp_path: Path) -> None:
    """What is compiled only for a GPU, the primitives of prim.cuh, is not counted."""
    if shutil.which("gcov") is None:
        pytest.skip("no gcov")
    run_forms(tmp_path, "-O0 --coverage", "(float32 or float16) and forward and not eager")
    ran = lines_that_ran(tmp_path)
    sources = Path(backend.__file__).parent
    assert set(ran) == {path.name for path in sources.glob("*.cu*")}
    for name, counts in sorted(ran.items()):
        share = sum(count > 0 for count in counts.values()) / len(counts)
        print(f"{name:24} {share:6.1%} of {len(counts)} lines")
        assert share >= LEAST_COVERAGE, (name, [line for line, count in sorted(counts.items()) if not count])
