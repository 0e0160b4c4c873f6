"""NVRTC by ctypes: compiles CUDA without a GPU, a driver or CuPy, and reports what ptxas says."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Usage(NamedTuple):
    """What a kernel takes of a multiprocessor; bytes but for the registers."""

    registers: int
    stack: int
    spilled: int


@cache
def library() -> ctypes.CDLL:
    """libnvrtc of the wheel nvidia-cuda-nvrtc; skips where that is missing."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    found = [f for folder in folders for f in sorted(folder.glob("*/lib/libnvrtc.so.1[0-9]"))]
    if not found:
        pytest.skip('no NVRTC. Hint: pip install "nvidia-cuda-nvrtc==13.0.*"')
    for builtins in found[-1].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)  # wheels have it beside, where the loader does not look
    return ctypes.CDLL(str(found[-1]))


def _get(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert nvrtc[f"nvrtcGet{what}"](program, buffer) == 0
    return buffer.raw


class Compiled(NamedTuple):
    """A compiled source: the machine code, its assembly, and what each kernel takes."""

    cubin: bytes
    ptx: str
    usage: dict[str, Usage]


def compile_source(source: str, architecture: str, defines: tuple[tuple[str, object], ...] = (),
                   *more: str) -> Compiled:
    """Compile for "sm_90" and the like; `more` are further options.

    Raises
    ------
    AssertionError
        With the compiler's messages.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    # the first four as CuPy does
    options = [f"-arch={architecture}", "-std=c++17", "-ftz=true", "--device-as-default-execution-space",
               "--ptxas-options=-v", *(f"-D{name}={value}" for name, value in defines), *more]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(
        *[option.encode() for option in options]))
    log = _get(nvrtc, "ProgramLog", program).decode().rstrip("\0")
    assert status == 0, log
    assert "warning" not in log, log
    rows = re.findall(r"entry function '(\w+)' for .*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
                      r"(\d+) bytes spill loads.*?Used (\d+) registers", log, re.S)
    usage = {name: Usage(int(registers), int(stack), int(stores) + int(loads))
             for name, stack, stores, loads, registers in rows}
    result = Compiled(_get(nvrtc, "CUBIN", program), _get(nvrtc, "PTX", program).decode(), usage)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return result


def look(source: str, architecture: str, defines: tuple[tuple[str, object], ...], name: str,
         instructions: tuple[str, ...]) -> tuple[Usage | None, list[str]]:
    """What kernel `name` takes, and which instructions its assembly lacks; None and the messages if it fails."""
    try:
        compiled = compile_source(source, architecture, defines)
    except AssertionError as error:
        return None, [str(error)]
    return compiled.usage[name], [i for i in instructions if i not in compiled.ptx]


def look_at_all(arguments: list[tuple[Any, ...]]) -> list[tuple[Usage | None, list[str]]]:
    """`look` at many, on all cores."""
    library()  # or skip
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        return list(pool.map(look, *zip(*arguments, strict=True), chunksize=4))
