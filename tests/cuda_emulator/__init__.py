"""The GPU backend without a GPU: its CUDA sources compiled by g++ and run on the CPU, on arrays that stand for CuPy's.

::

    with emulated(REVERSE):                # threads in another order
        y = functional.conv(device(x), device(w))
    result = host(y)
"""

from cuda_emulator.array import DeviceArray, device, host
from cuda_emulator.provider import (
    CP_ASYNC_EAGER,
    REVERSE,
    SCHEDULES,
    SHUFFLE,
    EmulatorProvider,
    Launched,
    compile_all,
    emulated,
    require_compiler,
)

__all__ = [
    "CP_ASYNC_EAGER",
    "REVERSE",
    "SCHEDULES",
    "SHUFFLE",
    "DeviceArray",
    "EmulatorProvider",
    "Launched",
    "compile_all",
    "device",
    "emulated",
    "host",
    "require_compiler",
]
