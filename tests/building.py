"""Building fastconv from the checkout that holds these tests, for the tests of the build itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
