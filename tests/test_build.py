"""The build: flags per file, what the objects hold and import, rebuilding, and the messages when it cannot work."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import building
import pytest

# What compiled C may import: memory and string primitives, mathematics, CPU detection.  No allocation, no output, no
# threads, no abort.
MAY_IMPORT = re.compile(
    r"fc_\w+|mem(cpy|set|move|cmp|chr)|str(n?cmp|len)"
    r"|(sqrt|pow|exp|log|fabs|fmin|fmax|floor|ceil)f?"
    r"|__cpu_(model|indicator_init|features2)|_GLOBAL_OFFSET_TABLE_"
)

@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> building.Distribution:
    return building.distribution(tmp_path_factory.getbasetemp())


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    building.require_compiler()
    return building.toy_sources(tmp_path / "toy")


def symbols(path: Path, *options: str) -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    out = subprocess.run(["nm", "-P", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return {line.split()[0].lstrip("_" if sys.platform == "darwin" else "") for line in out.splitlines() if line}


def instructions(path: Path) -> str:
    if not building.X86 or shutil.which("objdump") is None:
        pytest.skip("needs objdump on x86-64")
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_isa_object_exports_its_table_and_nothing_else(built: building.Distribution) -> None:
    tables = {name: path for name, path in built.objects.items() if name.startswith("isa_")}
    assert len(tables) == (6 if building.X86 else 4)
    for name, path in tables.items():
        isa, _, dtype = name.removeprefix("isa_").partition("-")
        assert symbols(path, "--defined-only", "--extern-only") == {f"fc_kernels_{dtype}_{isa}"}


def test_c_compiles_without_warnings(built: building.Distribution) -> None:
    assert not re.findall(r"^csrc/.*warning: .*", built.output, re.MULTILINE)


def test_objects_import_no_allocation_output_or_threads(built: building.Distribution) -> None:
    for name, path in built.objects.items():
        foreign = {s for s in symbols(path, "--undefined-only") if not MAY_IMPORT.fullmatch(s)}
        assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize(
    ("isa", "holds", "lacks"),
    [
        ("avx2", r"vfmadd\w+ .*%ymm", r"%zmm"),
        ("avx512", r"vfmadd\w+ .*%zmm", None),
    ],
)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_isa_objects_use_their_registers(
    built: building.Distribution, isa: str, dtype: str, holds: str, lacks: str | None
) -> None:
    text = instructions(built.objects[f"isa_{isa}-{dtype}"])
    assert re.search(holds, text)
    assert lacks is None or not re.search(lacks, text)


def test_all_other_objects_run_on_the_oldest_cpu(built: building.Distribution) -> None:
    portable = [p for name, p in built.objects.items() if not re.match("isa_avx", name)]
    assert len(portable) > 5
    for path in portable:
        assert not re.search(r":\s+v\w+ ", instructions(path)), path.name  # AVX mnemonics, and only they, begin with v


def test_fast_math_of_the_user_does_not_reach_the_kernels(built: building.Distribution, tmp_path: Path) -> None:
    lib = next(built.sources.glob("build/lib*"))
    program = (
        "import numpy as np, fastconv.functional as F\n"
        "from fastconv.backends import _cpu\n"
        "import fastconv\n"
        "assert np.nextafter(0.0, 1.0) * 1.0 > 0, 'denormals are flushed in the whole process'\n"
        "x = np.ones((1, 8, 9, 9), np.float32); x[0, 3, 4, 4] = np.nan; x[0, 2, 0, 0] = np.inf\n"
        "w = np.ones((5, 8, 3, 3), np.float32)\n"
        "for isa in _cpu.available_isas():\n"
        "    with fastconv.config(isa=isa):\n"
        "        y = F.conv2d(x, w)\n"
        "    assert np.isnan(y[:, :, 2:5, 2:5]).all() and np.isnan(y).sum() == 5 * 9, y\n"
        "    assert np.isinf(y[:, :, 0, 0]).all() and np.isinf(y).sum() == 5, y\n"
        "print(fastconv.__file__)\n"
    )
    done = building.run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(lib))
    assert done.stdout.strip() == str(lib / "fastconv" / "__init__.py")


def compiled(sources: Path, **environment: str) -> tuple[list[str], bool]:
    """Builds; returns the C files that were compiled, and whether the extension was linked."""
    _, out = building.build(sources, **environment)
    files = re.findall(r"^\S+ csrc/(\S+)", out, re.MULTILINE)
    return sorted(files), "-o build/lib" in out


def test_building_again_compiles_only_what_changed(toy: Path) -> None:
    everything = ["dispatch.c", "isa_generic.c", "isa_generic.c"]
    assert compiled(toy) == (everything, True)
    assert compiled(toy) == ([], False)

    (toy / "csrc" / "dispatch.c").touch()
    assert compiled(toy) == (["dispatch.c"], True)

    (toy / "csrc" / "one.h").touch()
    assert compiled(toy) == (everything, True)

    (toy / "fastconv" / "backends" / "_cpu.pyx").touch()
    assert compiled(toy) == ([], True)

    assert compiled(toy, CFLAGS="-DSOMETHING") == (everything, True)
    assert compiled(toy, CFLAGS="-DSOMETHING", FASTCONV_NO_OPENMP="1") == ([], True)


def test_openmp_is_found_or_can_be_switched_off(toy: Path) -> None:
    _, out = building.build(toy)
    assert len(re.findall("^fastconv: OpenMP (found|not found)", out, re.MULTILINE)) == 1
    with_openmp = re.search(r"-fopenmp.*-o build/lib|-o build/lib.*-fopenmp", out) is not None
    assert with_openmp == ("OpenMP found (-fopenmp)" in out)

    _, out = building.build(toy, FASTCONV_NO_OPENMP="1")
    assert "fastconv: FASTCONV_NO_OPENMP is set: building single-threaded" in out
    assert "-fopenmp" not in out


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CC": "no-such-compiler"}, "no C compiler: 'no-such-compiler' was not found"),
        ({"CC": "true"}, "need GCC or Clang"),
        ({"FASTCONV_EMULATE": "sse9"}, "FASTCONV_EMULATE is 'sse9', and only these can be emulated: avx512"),
    ],
)
def test_what_cannot_be_built_is_said_without_a_traceback(toy: Path, environment: dict[str, str], says: str) -> None:
    done = building.run([sys.executable, "setup.py", "build"], toy, check=False, **environment)
    assert done.returncode == 1
    assert says in done.stdout
    assert "Traceback" not in done.stdout
    assert ("apt install build-essential python3-dev" in done.stdout) == ("CC" in environment)


def test_a_source_that_does_not_compile_shows_the_error_of_the_compiler(toy: Path) -> None:
    (toy / "csrc" / "broken.c").write_text("int f(void) { return nonsense; }\n")
    done = building.run([sys.executable, "setup.py", "build"], toy, check=False)
    assert done.returncode == 1
    assert "csrc/broken.c does not compile" in done.stdout
    assert "nonsense" in done.stdout
    assert "Traceback" not in done.stdout


def test_an_unbuilt_source_folder_says_so(tmp_path: Path) -> None:
    building.require_compiler()
    building.copy_sources(tmp_path)
    done = building.run([sys.executable, "-c", "import fastconv"], tmp_path, check=False)
    assert done.returncode == 1
    assert f"fastconv was imported from {tmp_path / 'fastconv'}, where its compiled part is missing" in done.stdout
    assert "pip install -e ." in done.stdout
