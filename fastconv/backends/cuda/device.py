"""The one door to the GPU: arrays on it, and `launcher`, behind which stands a provider.

Everything else in this package is arithmetic on shapes. The provider for users is CuPy, found when it is first needed;
tests put an emulator in its place (`use`), so that all of the package but the silicon runs without a GPU.
"""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastconv.arrays import Array

_SOURCES = Path(__file__).parent

HOW_TO_GET_CUPY = ("arrays on a GPU need CuPy 13 or later and an NVIDIA driver. "
                   'Hint: pip install "fastconv[cuda13]" (or [cuda12]), or copy the arrays to the CPU')


BFLOAT16 = "<V2"  # as PyTorch's array interface and ml_dtypes call it


def bfloat16() -> np.dtype[Any]:
    """The dtype of arrays of bfloat16, which NumPy itself lacks.

    Raises
    ------
    RuntimeError
        Without ml_dtypes.
    """
    try:
        import ml_dtypes
    except ImportError as error:
        raise RuntimeError("bfloat16 is a dtype of the package ml_dtypes, which CuPy 14 and later take. "
                           "Hint: pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


class Kernel(NamedTuple):
    """A kernel in one of its forms: which source, which function, and what is defined when it is compiled.

    `architecture` is what it needs beyond the GPU's own: "sm_90a".
    """

    source: str
    name: str
    defines: tuple[tuple[str, str | int], ...] = ()
    architecture: str = ""


class TensorMap(NamedTuple):
    """What the tensor memory accelerator is told of an array of 16-bit numbers; tiles have rows of 128 bytes, swizzled.

    Axes come fastest first, and the first is dense.

    Attributes
    ----------
    dims, strides
        Extents, and the distances in bytes of all axes but the first.
    box
        Extents of a tile; of an image only that of the first axis, its channels.
    pixels
        Pixels of a tile of an image (im2col mode), 0 for a matrix.
    lower, upper, steps
        Of an image: where the box that pixels go through starts along each spatial axis, where it ends relative to
        the end of the axis, and how far apart pixels are (for all axes).
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    pixels: int = 0
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


class Provider(Protocol):
    """What is needed of whoever has the GPU."""

    def is_array(self, obj: object) -> bool:
        """Whether `obj` is one of the provider's own arrays."""

    def adopt(self, obj: Any) -> Any:
        """View a foreign array on the GPU as one of the provider's, without a copy."""

    def empty(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> Any:
        """An uninitialised array in C order, or with these strides, in bytes and of a dense array."""

    def upload(self, array: Array) -> Any:
        """A copy of a NumPy array on the GPU."""

    def multiprocessors(self) -> int:
        """How many multiprocessors the current GPU has."""

    def capability(self) -> tuple[int, int]:
        """Compute capability of the current GPU, as (9, 0)."""

    def mapper(self, dtype: str, layout: TensorMap) -> Callable[[Any], Any]:
        """What gives the map of each array of this layout, 128 bytes to be passed by value."""

    def name(self) -> str:
        """What the current GPU is called."""

    def synchronize(self) -> None:
        """Wait for all that was launched on the current stream."""

    def seconds(self, call: Callable[[], object]) -> float:
        """How long the GPU takes for what `call` launches."""

    def launcher(self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
                 smem: int = 0) -> Callable[..., None]:
        """What runs a kernel on the current stream, each time that it is called.

        It takes the arguments that come before `args`: arrays of the provider, None (a null pointer) and maps. `args`
        are NumPy scalars and structured NumPy arrays without axes, which are passed by value, as they are now; `smem`
        is in bytes.
        """


def source_text(name: str) -> str:
    """A CUDA source of this package with its own includes in place, so that no compiler needs a search path.

    ``#line`` says which line of which file each line is.
    """
    lines = [f'#line 1 "{name}"\n']
    for number, line in enumerate((_SOURCES / name).read_text().splitlines(keepends=True), 1):
        include = re.fullmatch(r'#include "(\w+\.cuh)"\n', line)
        lines += [line] if include is None else [
            f'#line 1 "{include[1]}"\n', (_SOURCES / include[1]).read_text(), f'#line {number + 1} "{name}"\n']
    return "".join(lines)


class CupyProvider:
    """CuPy: kernels are compiled by NVRTC at their first launch and kept in CuPy's own cache on disk."""

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise RuntimeError(f"fastconv: {HOW_TO_GET_CUPY} (import cupy: {error})") from error
        if not cupy.cuda.is_available():
            raise RuntimeError(f"fastconv: {HOW_TO_GET_CUPY} (CuPy {cupy.__version__} finds no GPU)")
        self._cupy = cupy
        self._array, self._alloc = cupy.ndarray, cupy.cuda.alloc
        # CuPy 13 passes None as no argument at all, and scalars take longer.
        self._null = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(0, 0, None, 0), 0)
        self._functions: dict[tuple[int, Kernel], Any] = {}
        self._multiprocessors: dict[int, int] = {}  # CuPy asks the driver for all attributes each time
        self._capabilities: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def is_array(self, obj: object) -> bool:
        return isinstance(obj, self._cupy.ndarray)

    def adopt(self, obj: Any) -> Any:
        interface = getattr(obj, "__cuda_array_interface__", None)
        if interface is None:
            return self._cupy.from_dlpack(obj)
        if interface["typestr"] == BFLOAT16:
            words = SimpleNamespace(__cuda_array_interface__={**interface, "typestr": "<u2"}, owner=obj)
            return self._cupy.asarray(words).view(bfloat16())
        return self._cupy.asarray(obj)

    def empty(self, shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None) -> Any:
        if strides is None:
            return self._array(shape, dtype)
        return self._array(shape, dtype, self._alloc(math.prod(shape) * np.dtype(dtype).itemsize), strides)

    def upload(self, array: Array) -> Any:
        return self._cupy.asarray(array)

    def multiprocessors(self) -> int:
        device = self._cupy.cuda.runtime.getDevice()
        if device not in self._multiprocessors:
            self._multiprocessors[device] = int(self._cupy.cuda.Device(device).attributes["MultiProcessorCount"])
        return self._multiprocessors[device]

    def capability(self) -> tuple[int, int]:
        device = self._cupy.cuda.runtime.getDevice()
        if device not in self._capabilities:
            digits = self._cupy.cuda.Device(device).compute_capability
            self._capabilities[device] = int(digits[:-1]), int(digits[-1])
        return self._capabilities[device]

    def name(self) -> str:
        return str(self._cupy.cuda.runtime.getDeviceProperties(self._cupy.cuda.runtime.getDevice())["name"].decode())

    def synchronize(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        call()  # compiles, and fills caches
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        begin.record()
        for _ in range(_CALLS):
            call()
        end.record()
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) / 1e3 / _CALLS

    def mapper(self, dtype: str, layout: TensorMap) -> Callable[[Any], Any]:
        from fastconv.backends.cuda import driver

        maps: dict[int, Any] = {}  # by address, on which alone a map depends

        def map_of(array: Any) -> Any:
            address = array.data.ptr
            found = maps.get(address)
            if found is None:
                if len(maps) >= _MAPS:
                    maps.clear()
                found = maps[address] = driver.tensor_map(address, dtype, layout)
            return found

        return map_of

    def launcher(self, kernel: Kernel, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
                 smem: int = 0) -> Callable[..., None]:
        values, null = tuple(_as_bytes(arg) for arg in args), self._null
        functions: dict[int, Any] = {}  # by device
        current_device = self._cupy.cuda.runtime.getDevice

        def launch(*first: Any) -> None:
            device = current_device()
            function = functions.get(device)
            if function is None:
                function = functions[device] = self._function(device, kernel, smem)
            function(grid, block, (*[null if arg is None else arg for arg in first], *values), smem)

        return launch

    def _function(self, device: int, kernel: Kernel, smem: int) -> Any:
        with self._lock:
            function = self._functions.get((device, kernel))
            if function is None:
                function = self._functions[device, kernel] = self._compile(kernel, smem)
        return function

    def _compile(self, kernel: Kernel, smem: int) -> Any:
        """The kernel for the current device."""
        options = ("-std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines))
        if kernel.architecture:  # CuPy adds the GPU's own, and the longer name wins
            options += (f"-arch={kernel.architecture}",)
        module = self._cupy.RawModule(code=source_text(kernel.source), options=options)
        function = module.get_function(kernel.name)
        if smem > 48 * 1024:  # beyond what every kernel may have without asking
            function.max_dynamic_shared_size_bytes = smem
        return function.kernel  # not the `RawKernel`, which would look for it at each launch


def _as_bytes(arg: Any) -> Any:
    """A structure as bytes without fields: CuPy asks for its array interface at each launch, which lists all fields."""
    return arg.copy().view((np.void, arg.nbytes)) if isinstance(arg, np.ndarray) else arg


_MAPS = 64  # that are kept of one operand of a launch
_CALLS = 5  # that are timed as one
_provider: Provider | None = None


def provider() -> Provider:
    """The provider in use.

    Raises
    ------
    RuntimeError
        If there is no CuPy or no GPU; the message says what to install.
    """
    global _provider
    if _provider is None:
        _provider = CupyProvider()
    return _provider


@contextmanager
def use(other: Provider) -> Iterator[Provider]:
    """Put another provider in the place of CuPy meanwhile, in the whole process."""
    global _provider
    previous, _provider = _provider, other
    _forget()
    try:
        yield other
    finally:
        _provider = previous
        _forget()


def _forget() -> None:
    for function in _caches:
        function.cache_clear()


_caches: list[Any] = []


def cached(function: Any) -> Any:
    """`functools.lru_cache` for what lies on the GPU: emptied when the provider changes."""
    result = lru_cache(1024)(function)
    _caches.append(result)
    return result


def adopt(obj: Any) -> Any | None:
    """View `obj` as an array on the GPU if it is one, else None.

    Raises
    ------
    RuntimeError
        If it is on a GPU, but CuPy or a driver is missing.
    """
    if _provider is not None and _provider.is_array(obj):
        return obj
    cupy = sys.modules.get("cupy")
    if _provider is None and cupy is not None and isinstance(obj, cupy.ndarray):
        return obj  # CuPy made it, so it has a GPU
    if hasattr(obj, "__cuda_array_interface__") or _dlpack_device(obj) == _CUDA:
        return provider().adopt(obj)
    return None


_CUDA = 2  # DLPack's number of the device type; managed memory, 13, the CPU can read


def _dlpack_device(obj: Any) -> int:
    try:
        return int(obj.__dlpack_device__()[0])
    except Exception:  # not on a device, or not willing to say: `as_array` finds the words
        return 0
