"""What this installation is and what it uses on this machine: the text of `fastconv info`."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import numpy as np

import fastconv
from fastconv import plan
from fastconv.backends import _cpu
from fastconv.config import settings, thread_reason

__all__ = ["report", "rows"]


def report() -> str:
    """Version, instruction set, kernels, threads and why, caches and settings, a line each."""
    return "\n".join(f"{name:<12}{text}" for name, text in rows())


def rows() -> list[tuple[str, str]]:
    """Name and text of each line of the report."""
    now = settings()
    available = ", ".join(_cpu.available_isas())
    return [
        ("fastconv", f"{fastconv.__version__}, {Path(fastconv.__file__).parent}"),
        ("Python", f"{platform.python_version()}, NumPy {np.__version__}, {platform.platform()}"),
        ("CPU", cpu_name()),
        ("CPU caches", ", ".join(_cpu_caches()) or "unknown"),
        ("ISA", f"{now.isa} (available: {available}; FASTCONV_CPU caps it)"),
        *(("tiles", _tiles(now.isa, dtype)) for dtype in ("float32", "float64")),
        ("kernels", ", ".join(_cpu.kernel_names())),
        ("algorithms", ", ".join(row.name for row in plan.ROWS)),
        ("OpenMP", "yes" if _cpu.openmp() else "no: this build runs on one thread"),
        ("threads", thread_reason()),
        ("caches", f"{plan.cached_plans()} plans, {_cpu.spare_bytes() / 2**20:.1f} MiB of workspace"),
        (
            "settings",
            f"exact={now.exact}, batch_invariant={now.batch_invariant}, "
            f"algorithm={now.algorithm!r}, tune={now.tune}",
        ),
    ]


def _tiles(isa: str, dtype: str) -> str:
    rows, columns = _cpu.tile(isa, dtype)
    return f"{dtype}: {rows} x {columns}, vectors of {_cpu.vector_lanes(isa, dtype)}"


@cache
def cpu_name() -> str:
    """The model of the CPU, as the operating system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _cpu_caches() -> list[str]:
    """"L1d 32K", "L2 1024K", … of the first CPU, where Linux tells."""
    caches = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            caches.append(f"L{level}{'d' if kind == 'Data' else ''} {size}")
    return caches
