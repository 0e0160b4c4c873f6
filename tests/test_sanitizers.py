"""The kernel tests once more, on a build with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import building
import pytest

from fastconv.backends import _cpu

KERNEL_TESTS = ("test_matrix_conv.py", "test_matrix_pool.py")

# Where CI is not set: the tests that draw shapes around the tiles, and indices that point anywhere.
QUICK = "around_tiles or random_pool or index_out_of_range or broadcast"

SANITIZED = {"FASTCONV_SANITIZE": "address,undefined"}


def runtime() -> str:
    """The library that has to be there before Python is, since Python itself is not sanitized."""
    if not sys.platform.startswith("linux") or shutil.which("gcc") is None:
        pytest.skip("needs GCC on Linux")
    name = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = name.stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip("no libasan.so")
    return path


def run_sanitized(command: list[str], folder: Path, lib: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment |= {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(lib),
        "PYTHONMALLOC": "malloc",  # so that each object has guards of its own
    }
    return building.run([sys.executable, *command], folder, check=False, **environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "report"),
    [
        # volatile, so that the compiler neither sees the mistake nor drops it
        ("double *volatile p = malloc(8); volatile int i = 1; return p[i];", "AddressSanitizer: heap-buffer-overflow"),
        ("volatile int large = 2147483647; return large + 1;", "runtime error: signed integer overflow"),
    ],
)
def test_sanitizers_are_on(tmp_path: Path, planted: str, report: str) -> None:
    """Planted mistakes are reported: what the other test calls clean was looked at."""
    building.require_compiler()
    runtime()
    toy = building.toy_sources(tmp_path / "toy")
    source = f"#include <stdlib.h>\ndouble one(void);\ndouble one(void) {{ {planted} }}\n"
    (toy / "csrc" / "dispatch.c").write_text(source)
    lib, _ = building.build(toy, **SANITIZED)
    done = run_sanitized(["-c", "import fastconv.backends._cpu"], tmp_path, lib)
    assert done.returncode != 0
    assert report in done.stdout


@pytest.mark.slow
def test_kernels_are_clean(tmp_path: Path) -> None:
    building.require_compiler()
    runtime()
    lib, _ = building.build(building.copy_sources(tmp_path / "sources"), **SANITIZED)
    where = run_sanitized(["-c", "import fastconv; print(fastconv.__file__)"], tmp_path, lib)
    assert where.stdout.strip() == str(lib / "fastconv" / "__init__.py"), where.stdout

    # one table is enough: they are one source, and it reads and writes by the same rules
    tests = [str(building.ROOT / "tests" / name) for name in KERNEL_TESTS]
    everything = os.environ.get("CI", "") not in ("", "0", "false")
    selection = _cpu.default_isa() if everything else f"{_cpu.default_isa()} and ({QUICK})"
    settings = ["-q", "-p", "no:cacheprovider", "-c", str(building.ROOT / "pyproject.toml"), "-k", selection]
    done = run_sanitized(["-m", "pytest", *settings, *tests], tmp_path, lib)
    assert "AddressSanitizer" not in done.stdout, done.stdout[-8000:]
    assert "runtime error" not in done.stdout, done.stdout[-8000:]
    assert done.returncode == 0, done.stdout[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) > (300 if everything else 10)
    print(passed.group(0), "under", SANITIZED["FASTCONV_SANITIZE"])
