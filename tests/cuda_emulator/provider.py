"""The provider of the GPU backend that launches kernels on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from cuda_emulator.array import DeviceArray
from fastconv.backends.cuda import device as backend
from fastconv.backends.cuda.device import Kernel

HERE = Path(__file__).parent

# Orders in which warps run, and whether copies of cp.async land at once or as late as they may.
REVERSE, SHUFFLE, CP_ASYNC_EAGER = 1, 2, 4
SCHEDULES = {"forward": 0, "reverse": REVERSE, "shuffled": SHUFFLE, "eager": CP_ASYNC_EAGER,
             "reverse, eager": REVERSE | CP_ASYNC_EAGER, "shuffled, eager": SHUFFLE | CP_ASYNC_EAGER}

FLAGS = ("-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing",
         "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Werror")
# -O1 compiles fastest, and kernels of tests run for milliseconds. Sanitizers and gcov come through the environment.
OPTIMIZATION = ("-O1",)


def require_compiler() -> None:
    """Skip where there is no g++ to compile CUDA sources with."""
    if shutil.which("g++") is None:
        pytest.skip("no g++, which the emulator compiles CUDA sources with")


def extra_flags() -> tuple[str, ...]:
    """Further flags for the compiler, from FASTCONV_EMULATOR_FLAGS."""
    return tuple(os.environ.get("FASTCONV_EMULATOR_FLAGS", "").split())


def cache() -> Path:
    """Where compiled kernels are kept for further runs, under names that hold everything they depend on."""
    given = os.environ.get("FASTCONV_EMULATOR_CACHE")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"fastconv-cuda-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def compile_library(source: Path, text: str, flags: tuple[str, ...]) -> Path:
    """Compile `text`, the contents of `source`, unless that was done before; return the library."""
    depends = "\0".join([text, (HERE / "cuda_emulator.h").read_text(), *FLAGS, *OPTIMIZATION, *flags])
    made = cache() / f"{source.stem}-{hashlib.sha256(depends.encode()).hexdigest()[:16]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as folder:
            copy, library = Path(folder) / source.name, Path(folder) / "kernel.so"
            copy.write_text(text)
            if "--coverage" in flags:  # notes and counts of gcov lie beside the library, not in a folder that goes
                flags = (*flags, "-dumpdir", f"{cache()}/", "-dumpbase", made.stem)
            command = ["g++", *FLAGS, *OPTIMIZATION, f"-I{HERE}", "-include", str(HERE / "cuda_emulator.h"), *flags,
                       "-x", "c++", str(copy), "-o", str(library)]
            # without the sanitizers that this process may run under
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
            library.rename(made)
    return made


def compile_kernel(kernel: Kernel) -> Path:
    """Compile a kernel for the emulator."""
    defines = tuple(f"-D{name}={value}" for name, value in kernel.defines)
    return compile_library(Path(kernel.source), backend.source_text(kernel.source), (*extra_flags(), *defines))


def compile_all(kernels: Iterable[Kernel]) -> None:
    """Compile kernels side by side, on all cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(compile_kernel, kernels):  # raises what a compilation raised
            pass


# Of runtime.cpp; 128 bytes, as the driver's.
TENSOR_MAP = np.dtype({
    "names": ["magic", "im2col", "axes", "itemsize", "swizzle", "address", "dims", "strides", "box", "steps", "lower",
              "upper", "channels", "pixels"],
    "formats": ["u4", "u1", "u1", "u1", "u1", "u8", ("u4", 5), ("u8", 4), ("u2", 5), ("u1", 5), ("i2", 3), ("i2", 3),
                "u2", "u2"],
    "offsets": [0, 4, 5, 6, 7, 8, 16, 40, 72, 82, 88, 94, 100, 102], "itemsize": 128})


class Launched(NamedTuple):
    """A launch, as tests look back at it."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    smem: int


class EmulatorProvider:
    """Runs kernels by the emulator; see `fastconv.backends.cuda.device.Provider`.

    Attributes
    ----------
    flags
        The schedule of the next launches.
    launched
        What was launched so far.
    null
        Whether launches do nothing, to time what the host does.
    clock
        How long a GPU would take for some launches: seconds, made up.
    """

    _runtime: Any = None
    _entries: dict[Kernel, Any] = {}  # noqa: RUF012
    _lock = threading.Lock()

    def __init__(self, flags: int = 0, *, null: bool = False) -> None:
        self.flags = flags
        self.null = null
        self.launched: list[Launched] = []
        self.clock: Callable[[list[Launched]], float] = lambda launched: 1e-3 * len(launched)

    def is_array(self, obj: object) -> bool:
        return type(obj) is DeviceArray

    def adopt(self, obj: Any) -> DeviceArray:
        # The memory is that of the CPU after all.
        interface = obj.__cuda_array_interface__
        x = np.asarray(SimpleNamespace(__array_interface__=interface, owner=obj))
        return DeviceArray(x.view(backend.bfloat16()) if interface["typestr"] == backend.BFLOAT16 else x)

    def empty(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> DeviceArray:
        array = np.empty(shape, dtype)
        array.view(np.uint8).reshape(-1)[...] = 0xFF  # NaN, -1: nobody may count on zeros
        return DeviceArray(array if strides is None else np.ndarray(shape, dtype, array, 0, strides))

    def upload(self, array: np.ndarray) -> DeviceArray:
        return DeviceArray(np.array(array))

    def multiprocessors(self) -> int:
        return 132

    def capability(self) -> tuple[int, int]:
        return (9, 0)

    def mapper(self, dtype: str, layout: backend.TensorMap) -> Callable[[DeviceArray], np.ndarray]:
        def map_of(array: DeviceArray) -> np.ndarray:
            assert array.dtype.name == dtype
            return self._tensor_map(array, layout)

        return map_of

    def _tensor_map(self, array: DeviceArray, layout: backend.TensorMap) -> np.ndarray:
        """Encode for runtime.cpp, and refuse what the driver refuses."""
        m, address = np.zeros((), TENSOR_MAP), array.data.ptr
        image = bool(layout.pixels)
        axes = len(layout.dims)
        assert address % 16 == 0, "the address of a tensor map must be a multiple of 16"
        assert len(layout.strides) == axes - 1
        assert all(0 < d <= 2**32 for d in layout.dims)
        assert all(0 <= s < 2**40 and s % 16 == 0 for s in layout.strides), f"strides {layout.strides}"
        assert all(1 <= s <= 8 for s in layout.steps)
        assert layout.box[0] * array.itemsize <= 128, "rows of the 128B swizzle have 128 bytes"
        assert layout.box[0] * array.itemsize % 16 == 0
        assert all(1 <= n <= 256 for n in layout.box)
        m["magic"], m["im2col"], m["axes"], m["itemsize"], m["swizzle"] = 0x7A3B5C1D, image, axes, array.itemsize, 1
        m["address"] = address
        m["dims"][:axes], m["strides"][:axes - 1] = layout.dims, layout.strides
        m["steps"] = 1
        if image:
            limit = {3: 2**15, 4: 2**7, 5: 2**4}[axes]
            assert all(-limit <= n < limit for n in (*layout.lower, *layout.upper)), "corners of the box"
            assert 1 <= layout.pixels <= 1024
            m["channels"], m["pixels"] = layout.box[0], layout.pixels
            m["lower"][:axes - 2], m["upper"][:axes - 2] = layout.lower, layout.upper
            m["steps"][:axes] = layout.steps
        else:
            m["box"][:axes] = layout.box
        return m

    def name(self) -> str:
        return "emulator"

    def synchronize(self) -> None:
        pass  # launches return when they are done

    def seconds(self, call: Callable[[], object]) -> float:
        before = len(self.launched)
        call()
        return self.clock(self.launched[before:])

    def launcher(self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
                 smem: int = 0) -> Callable[..., None]:
        values = tuple(arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args)

        def launch(*first: Any) -> None:
            if self.null:
                return
            self.launched.append(Launched(kernel, grid, block, smem))
            with self._lock:
                self._run(kernel, grid, block, first + values, smem)

        return launch

    def _run(self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
             smem: int) -> None:
        runtime, entry = self._load(kernel)
        values = [_value(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(args))(*[v.ctypes.data for v in values])
        sizes = (ctypes.c_size_t * (len(args) + 1))(*[v.nbytes for v in values], ctypes.c_size_t(-1).value)
        three = ctypes.c_uint * 3
        message = ctypes.create_string_buffer(1024)
        status = runtime.emu_launch(entry, three(*(*grid, 1, 1)[:3]), three(*(*block, 1, 1)[:3]),
                                    ctypes.c_size_t(smem), pointers, sizes, self.flags, message, ctypes.c_size_t(1024))
        if status:
            raise RuntimeError(f"{kernel.name}: {message.value.decode()}")

    @classmethod
    def _load(cls, kernel: Kernel) -> tuple[Any, Any]:
        if cls._runtime is None:
            source = HERE / "runtime.cpp"
            library = compile_library(source, source.read_text(), extra_flags())
            cls._runtime = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            cls._runtime.emu_launch.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t] + [ctypes.c_void_p] * 2 + [
                ctypes.c_uint, ctypes.c_char_p, ctypes.c_size_t]
        if kernel not in cls._entries:
            cls._entries[kernel] = ctypes.CDLL(str(compile_kernel(kernel)))[f"fc_entry_{kernel.name}"]
        return cls._runtime, cls._entries[kernel]


def _value(arg: Any) -> np.ndarray:
    """What the kernel is handed, in memory: an address, a number, a structure."""
    if arg is None:
        return np.array(0, np.uint64)
    if isinstance(arg, DeviceArray):
        return np.array(arg.data.ptr, np.uint64)
    if isinstance(arg, np.generic) or (type(arg) is np.ndarray and arg.ndim == 0):
        return np.array(arg)
    raise TypeError(f"a kernel was handed a {type(arg).__qualname__}, which CuPy would pass in a form of its own")


@contextmanager
def emulated(flags: int = 0, *, null: bool = False) -> Iterator[EmulatorProvider]:
    """Let the GPU backend run on the emulator meanwhile."""
    require_compiler()
    provider = EmulatorProvider(flags, null=null)
    with backend.use(provider):
        yield provider
