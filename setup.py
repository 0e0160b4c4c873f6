"""Build of the compiled part: C kernels, once per instruction set and dtype, in one extension.

What is built comes from three tables, `ISAS`, `DTYPES` and the files of csrc/:

    csrc/isa_<name>.c   a row of ISAS: for its machines, with its flags   once per dtype
    csrc/dispatch.c     knows every dtype                                 once
    csrc/<other>.c      blocking code, knows no instruction set           once per dtype
    csrc/*.inc.c, *.h   are included by these

Environment variables that are read here:

    CC, CFLAGS, LDFLAGS        as everywhere; our flags follow CFLAGS, so that they win
    FASTCONV_NO_OPENMP=1       single-threaded, even where OpenMP is there
    FASTCONV_SANITIZE=a,b      for tests: build with -fsanitize=a,b
    FASTCONV_EMULATE=avx512    for tests: the tiles of that instruction set on any AVX2 CPU (slow)
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CSRC = Path("csrc")

# NaN and infinity must propagate as the formula says: never -ffast-math, and a user's own is taken
# back.  Given up are only errno, floating-point traps and the separate rounding of a * b + c.
# Link-time optimisation could move code of one instruction set into functions that run everywhere.
# The kernels are written with vectors and say what is unrolled: -O3 takes half as long again and gains nothing.
# Python's own flags make signed overflow wrap; here it is a mistake, which a sanitizer can then see.
C_FLAGS = [
    *("-std=gnu11", "-O2", "-g0", "-fPIC", "-fno-lto", "-fvisibility=hidden", "-Wno-psabi"),
    *(
        "-fno-wrapv",
        "-fno-fast-math",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-fno-tree-loop-distribute-patterns",  # a call of memcpy takes longer than most of our runs
    ),
]

DTYPES = {"f32": ["-DFC_F32"], "f64": ["-DFC_F64"]}


@dataclass(frozen=True)
class Isa:
    """One kernel table: the machines that can have it and the flags that its objects end in."""

    machines: tuple[str, ...]
    flags: str
    emulated_by: str = ""  # the flags to use instead under FASTCONV_EMULATE


ISAS = {
    "generic": Isa(machines=(), flags="-O1"),  # () is every machine; compiled quickly, for CPUs that have nothing else
    "avx2": Isa(machines=("x86_64",), flags="-mavx2 -mfma"),
    "avx512": Isa(
        machines=("x86_64",),
        flags="-mavx512f -mavx512vl -mavx512bw -mavx512dq -mfma -mprefer-vector-width=512",
        emulated_by="-mavx2 -mfma",
    ),
    "neon": Isa(machines=("aarch64",), flags=""),
}

# (compile flags, link flags), first that works
OPENMP = {
    "linux": [(["-fopenmp"], ["-fopenmp"])],
    "darwin": [
        (["-fopenmp"], ["-fopenmp"]),
        (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),
        *(
            (["-Xpreprocessor", "-fopenmp", f"-I{home}/include"], [f"-L{home}/lib", "-lomp"])
            for home in ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")
        ),
    ],
}

OPENMP_PROGRAM = """
#include <omp.h>
int main(void) {
    int n = 0;
#pragma omp parallel reduction(+ : n)
    n += omp_get_num_threads();
    return n < 1;
}
"""

HOW_TO_GET_A_COMPILER = """
  Debian, Ubuntu   apt install build-essential python3-dev
  Fedora, RHEL     dnf install gcc python3-devel
  macOS            xcode-select --install       (and, for threads: brew install libomp)
  Windows          use WSL, and there one of the lines above
"""


def cannot_build(why: str) -> PlatformError:
    return PlatformError(f"fastconv: {why}. What to install:\n{HOW_TO_GET_A_COMPILER}")


class Toolchain:
    """The C compiler that Python would use, checked, and what it can do."""

    def __init__(self, compiler: Any) -> None:
        if compiler.compiler_type != "unix":
            raise cannot_build(
                "the kernels are written with GNU vector types and need GCC or Clang, "
                f"and this Python builds with '{compiler.compiler_type}'"
            )
        self.cc: list[str] = compiler.compiler_so  # with the user's CFLAGS
        self.linker: list[str] = compiler.linker_so
        if shutil.which(self.cc[0]) is None:
            raise cannot_build(f"no C compiler: '{self.cc[0]}' was not found")
        header = Path(sysconfig.get_path("include"), "Python.h")
        if not header.exists():
            raise cannot_build(f"the headers of Python are missing: no '{header}'")
        if "__GNUC__" not in self.ask("-dM", "-E", "-x", "c", os.devnull):  # Clang defines it too
            raise cannot_build(
                "the kernels are written with GNU vector types and need GCC or Clang, "
                f"and '{self.cc[0]}' is neither, or does not run"
            )
        # the machine that code is made for: under a cross compiler, not the one that we run on
        machine = self.ask("-dumpmachine").partition("-")[0]
        self.machine = {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)

    def ask(self, *arguments: str) -> str:
        done = subprocess.run([*self.cc, *arguments], capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    def openmp(self) -> tuple[list[str], list[str]]:
        """Flags to compile and link OpenMP code with; none where it is missing or not wanted."""
        if os.environ.get("FASTCONV_NO_OPENMP", "0") not in ("", "0"):
            print("fastconv: FASTCONV_NO_OPENMP is set: building single-threaded")
            return [], []
        for compile_flags, link_flags in OPENMP.get(sys.platform, OPENMP["linux"]):
            with tempfile.TemporaryDirectory() as folder:
                source, made = Path(folder, "openmp.c"), Path(folder, "openmp.so")
                source.write_text(OPENMP_PROGRAM)
                command = [*self.cc, *compile_flags, "-c", str(source), "-o", f"{source}.o"]
                link = [*self.linker, f"{source}.o", *link_flags, "-o", str(made)]
                if all(
                    subprocess.run(c, capture_output=True, check=False).returncode == 0
                    for c in (command, link)
                ):
                    print(f"fastconv: OpenMP found ({' '.join(compile_flags)})")
                    return compile_flags, link_flags
        print("fastconv: OpenMP not found: building single-threaded")
        return [], []


def sanitizers() -> list[str]:
    names = os.environ.get("FASTCONV_SANITIZE", "")
    if not names:
        return []
    # with checks, more than -O1 takes a minute for each instruction set
    return [
        f"-fsanitize={names}",
        *["-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer", "-O1"],
    ]


def c_units(machine: str) -> dict[str, tuple[Path, list[str]]]:
    """Object name -> source and flags, for everything under csrc/ that this machine can have."""
    emulated = os.environ.get("FASTCONV_EMULATE", "")
    if emulated and not (emulated in ISAS and ISAS[emulated].emulated_by):
        can = ", ".join(name for name, isa in ISAS.items() if isa.emulated_by)
        raise PlatformError(
            f"fastconv: FASTCONV_EMULATE is '{emulated}', and only these can be emulated: {can}"
        )
    # the tables and the code that chooses among them must agree on what is emulated
    everywhere = ["-DFC_EMULATE"] if emulated else []
    units: dict[str, tuple[Path, list[str]]] = {}
    for source in sorted(set(CSRC.glob("*.c")) - set(CSRC.glob("*.inc.c"))):
        flags = list(everywhere)
        if source.stem.startswith("isa_"):
            name = source.stem.removeprefix("isa_")
            isa = ISAS[name]
            if isa.machines and machine not in isa.machines:
                continue
            flags += (isa.emulated_by if name == emulated else isa.flags).split()
        if source.stem == "dispatch":
            units[source.stem] = source, flags
        else:
            for dtype, define in DTYPES.items():
                units[f"{source.stem}-{dtype}"] = source, [*define, *flags]
    return units


class BuildKernels(build_ext):
    """Compile csrc/ with flags per file, in parallel, and link the objects into the extension."""

    def build_extensions(self) -> None:
        toolchain = Toolchain(self.compiler)
        compile_openmp, link_openmp = toolchain.openmp()
        objects = self.compile_c(toolchain)
        for extension in self.extensions:
            extension.extra_objects += map(str, objects)
            extension.depends += [*map(str, objects), str(self.configuration)]
            # linking with -ffast-math would make the whole process flush denormals
            both = ["-g0", "-fno-fast-math", *sanitizers()]
            # -O1: it only calls; more takes seconds longer to compile
            extension.extra_compile_args += ["-O1", *compile_openmp, *both]
            extension.extra_link_args += [*link_openmp, *both]
            extension.cython_c_in_temp = True  # type: ignore[attr-defined]
        self.configure(repr((toolchain.cc, compile_openmp, link_openmp, sanitizers())))
        super().build_extensions()

    @property
    def configuration(self) -> Path:
        return Path(self.build_temp, "configuration.txt")

    def configure(self, text: str) -> None:
        """Write the configuration if it differs: what depends on the file is built again."""
        self.configuration.parent.mkdir(parents=True, exist_ok=True)
        if not self.configuration.exists() or self.configuration.read_text() != text:
            self.configuration.write_text(text)

    def compile_c(self, toolchain: Toolchain) -> list[Path]:
        folder = Path(self.build_temp, CSRC)
        folder.mkdir(parents=True, exist_ok=True)
        shared = [Path(__file__), *CSRC.glob("*.h"), *CSRC.glob("*.inc.c"), *CSRC.glob("*.def")]
        newest_shared = max(path.stat().st_mtime_ns for path in shared)

        def compile_one(unit: tuple[str, tuple[Path, list[str]]]) -> Path:
            name, (source, flags) = unit
            made, recipe = folder / f"{name}.o", folder / f"{name}.txt"
            tail = [*C_FLAGS, *flags, *sanitizers()]
            command = [*toolchain.cc, *tail, "-c", str(source), "-o", str(made)]
            if (
                not self.force
                and made.exists()
                and recipe.exists()
                and recipe.read_text() == shlex.join(command)
                and made.stat().st_mtime_ns > max(newest_shared, source.stat().st_mtime_ns)
            ):
                return made
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(
                    f"fastconv: {source} does not compile:\n{shlex.join(command)}\n{done.stderr}"
                )
            # one write, newline included: several threads print
            sys.stdout.write(f"{toolchain.cc[0]} {source} {shlex.join(flags)}\n{done.stderr}")
            recipe.write_text(shlex.join(command))
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_one, c_units(toolchain.machine).items()))


if sys.platform == "darwin":
    # a universal Python would compile every file for two machines at once; the kernels are for one
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

setup(
    ext_modules=[
        Extension(
            "fastconv.backends._cpu",
            sources=["fastconv/backends/_cpu.pyx"],
            include_dirs=[str(CSRC)],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
