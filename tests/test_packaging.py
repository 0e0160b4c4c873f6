"""The package as people get it: import time, public names, what wheel and sdist hold, and that an sdist is enough."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import building
import pytest

import fastconv

PACKAGE = Path(fastconv.__file__).parent
EXTRAS = {"cupy", "matplotlib", "mpi4py", "nibabel", "onnx", "PIL", "safetensors", "scipy", "sklearn", "torch"}


def in_new_process(program: str, folder: Path, path: Path) -> str:
    """Run a program where nothing but `path` offers a fastconv; byte code is kept, as it is once installed."""
    environment = {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "pyc")}
    return building.run([sys.executable, "-c", program], folder, **environment).stdout


def test_import_costs_less_than_60_ms_above_numpy(tmp_path: Path) -> None:
    program = (
        "import numpy, time\n"
        # what other processes do meanwhile does not count, nor how long NumPy's other threads wait for work
        "start = time.thread_time()\n"
        "import fastconv\n"
        "print(time.thread_time() - start)\n"
    )
    in_new_process(program, tmp_path, PACKAGE.parent)  # compiles
    seconds = [float(in_new_process(program, tmp_path, PACKAGE.parent)) for _ in range(7)]
    assert statistics.median(seconds) < 0.060, f"{sorted(round(1000 * s) for s in seconds)} ms"


def test_import_takes_no_extra_and_no_layers(tmp_path: Path) -> None:
    program = "import sys, fastconv; print(*{m.partition('.')[0] for m in sys.modules}, 'fastconv.nn' in sys.modules)"
    *loaded, layers = in_new_process(program, tmp_path, PACKAGE.parent).split()
    assert "numpy" in loaded
    assert not EXTRAS & set(loaded)
    assert layers == "False"


def test_every_module_imports_without_the_extras(tmp_path: Path) -> None:
    program = (
        "import sys, pkgutil, importlib\n"
        f"for extra in {sorted(EXTRAS)}: sys.modules[extra] = None\n"
        "import fastconv\n"
        "names = [m.name for m in pkgutil.walk_packages(fastconv.__path__, 'fastconv.')]\n"
        "for name in names:\n"
        "    if not name.endswith('__main__'): importlib.import_module(name)\n"
        "print(len(names))\n"
    )
    assert int(in_new_process(program, tmp_path, PACKAGE.parent)) > 20


def test_a_module_of_the_same_name_does_not_hide_a_function(tmp_path: Path) -> None:
    for name in fastconv.__all__:
        first = f"import fastconv.{name}" if (PACKAGE / f"{name}.py").exists() else "pass"
        program = f"{first}\nimport fastconv\nprint(type(fastconv.{name}).__name__)"
        kind = in_new_process(program, tmp_path, PACKAGE.parent).strip()
        assert kind == type(getattr(fastconv, name)).__name__, name


@pytest.mark.parametrize("module", ["fastconv", "fastconv.functional", "fastconv.nn", "fastconv.models"])
def test_public_names_are_there_and_documented(module: str) -> None:
    public = importlib.import_module(module)
    names = [n for n in getattr(public, "__all__", dir(public)) if not n.startswith("_")]
    assert len(names) > 0
    assert set(names) <= set(dir(public))
    things = {n: getattr(public, n) for n in names}
    documented = {n: inspect.getdoc(t) for n, t in things.items() if inspect.isfunction(t) or inspect.isclass(t)}
    bare = [n for n, text in documented.items() if not (text or "").strip()]
    assert not bare
    assert public.__doc__


def test_version_is_that_of_the_distribution() -> None:
    try:
        distribution = importlib.metadata.version("fastconv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastconv is on the path, but not installed")
    assert fastconv.__version__ == distribution


def test_types_ship() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "backends" / "_cpu.pyi").exists()


def test_stubs_name_what_the_extension_has() -> None:
    from fastconv.backends import _cpu

    stub = (PACKAGE / "backends" / "_cpu.pyi").read_text()
    public = {n for n in vars(_cpu) if not n.startswith("_") and type(vars(_cpu)[n]).__name__ != "module"}
    undeclared = {n for n in public if f"def {n}(" not in stub and f"class {n}:" not in stub}
    assert undeclared <= {"Buffer"}  # private to the extension


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> building.Distribution:
    return building.distribution(tmp_path_factory.getbasetemp())


@pytest.mark.slow
def test_sdist_holds_the_sources(built: building.Distribution) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        path.relative_to(built.checkout).as_posix()
        for path in built.checkout.rglob("*")
        if path.is_file() and "fastconv.egg-info" not in path.parts
    }
    assert len(needed) > 50
    assert not needed - names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
def test_wheel_is_small_and_holds_no_sources(built: building.Distribution) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = archive.namelist()
    print(f"wheel: {built.wheel.stat().st_size / 1e6:.2f} MB")
    assert built.wheel.stat().st_size < 3e6
    assert not [name for name in names if name.endswith((".c", ".h", ".def", ".pyx", ".pxd", ".pxi", ".o"))]
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "bench/"))]
    assert any(name.startswith("fastconv/backends/_cpu.") and not name.endswith(".pyi") for name in names)
    assert {"fastconv/py.typed", "fastconv/backends/_cpu.pyi"} <= set(names)


@pytest.mark.slow
def test_the_wheel_works_where_the_sources_are_absent(built: building.Distribution, tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("no pip")
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target)]
    building.run([*command, str(built.wheel)], tmp_path)
    program = (
        "import numpy as np, fastconv\n"
        "from fastconv import functional as F\n"
        "x = np.arange(2 * 3 * 6 * 7, dtype=np.float64).reshape(2, 3, 6, 7)\n"
        "w = np.arange(4 * 3 * 3 * 3, dtype=np.float64).reshape(4, 3, 3, 3)\n"
        "windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))\n"
        "expected = np.einsum('nchwij,kcij->nkhw', windows, w)\n"
        "for algorithm in ('im2col', 'direct'):\n"
        "    np.testing.assert_array_equal(F.conv2d(x, w, algorithm=algorithm), expected)  # integers: exact\n"
        "print(fastconv.__file__)\n"
    )
    assert in_new_process(program, tmp_path, target).strip() == str(target / "fastconv" / "__init__.py")
    script = target / "bin" / "fastconv"
    done = building.run([sys.executable, str(script), "info"], tmp_path, PYTHONPATH=str(target))
    assert fastconv.__version__ in done.stdout
