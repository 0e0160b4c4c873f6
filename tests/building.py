"""Building fastconv from the checkout that holds these tests, for the tests of the build itself."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
           "csrc", "fastconv")


def require_compiler() -> None:
    """Skip where the checkout or a C compiler is missing (tests of an installed wheel)."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the sources are not beside the tests")
    if shutil.which(os.environ.get("CC", "cc").split()[0]) is None:
        pytest.skip("no C compiler")


def copy_sources(to: Path) -> Path:
    """A pristine copy of what the build reads, without what earlier builds made."""
    to.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__", "_cpu.c")
            shutil.copytree(ROOT / name, to / name, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, to / name)
    return to


# A stand-in for csrc/ and the extension that compiles in a second: one kernel, one header.
TOY = {
    "csrc/one.h": "#ifdef FC_F32\ntypedef float real;\n#define ONE one_f32\n#else\n"
                  "typedef double real;\n#define ONE one_f64\n#endif\n",
    "csrc/isa_generic.c": '#include "one.h"\nreal ONE(void);\nreal ONE(void) { return 1; }\n',
    "csrc/dispatch.c": "double one(void);\ndouble one_f64(void);\ndouble one(void) { return one_f64(); }\n",
    "fastconv/__init__.py": '__version__ = "0"\n',
    "fastconv/backends/__init__.py": "",
    "fastconv/backends/_cpu.pyx": 'cdef extern from *:\n    """double one(void);"""\n    double one()\n'
                                  "answer = one()\n",
}


def toy_sources(to: Path) -> Path:
    """The real setup.py over `TOY`, for tests of the build that need no kernels."""
    for name, text in TOY.items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(text)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, to / name)
    return to


def run(command: list[str], folder: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder`; output and errors together in ``stdout``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FASTCONV_") and k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=clean | environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}"
    return done


def build(sources: Path, **environment: str) -> tuple[Path, str]:
    """Build into sources/build; returns the folder to put on the path, and what was printed."""
    done = run([sys.executable, "setup.py", "build"], sources, **environment)
    return next((sources / "build").glob("lib*")), done.stdout


X86 = platform.machine().lower() in ("x86_64", "amd64")

# Flags that would break kernels if they came after ours.
HOSTILE = "-O1 -ffast-math -ffp-contract=off" + (" -mno-avx2 -mno-fma" if X86 else "")


@dataclass(frozen=True)
class Distribution:
    """The sdist of the checkout, and what was built where there was nothing but that sdist."""

    checkout: Path  # the copy that the sdist was made from
    sdist: Path
    sources: Path  # the sdist unpacked, and built in
    wheel: Path
    output: str  # what the build printed

    @property
    def objects(self) -> dict[str, Path]:
        return {path.stem: path for path in self.sources.glob("build/temp*/csrc/*.o")}


@functools.cache
def distribution(base: Path) -> Distribution:
    """Built once per session, under hostile CFLAGS with warnings on, without the network.

    `base` is the temporary folder of the session, ``tmp_path_factory.getbasetemp()``.
    """
    require_compiler()
    pytest.importorskip("Cython")
    folder = base / "distribution"
    checkout = copy_sources(folder / "checkout")
    run([sys.executable, "setup.py", "sdist", "-d", str(folder)], checkout)
    sdist = next(folder.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    sources = next((folder / "unpacked").iterdir())
    command = [sys.executable, "setup.py", "bdist_wheel", "-d", str(folder)]
    done = run(command, sources, CFLAGS=f"{HOSTILE} -Wall -Wextra")
    return Distribution(checkout, sdist, sources, next(folder.glob("*.whl")), done.stdout)
