"""How much memory a convolution takes beside its input and output: never that of im2col."""

import itertools
import subprocess
import sys

import pytest

pytest.importorskip("resource")

# Each call in a process of its own, whose peak is that of the call; operands are touched before.
SCRIPT = """
import resource, sys
import numpy as np
import fastconv
from fastconv import functional

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss would not do: on Linux it starts at the peak of the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

op, order, algorithm = sys.argv[1:]
x_shape, w_shape = (1, 16, 133, 133, 133), (8, 16, 3, 3, 3)
y_shape = (1, 8, 133, 133, 133)
if order == "channels_last":
    full = lambda shape: np.moveaxis(np.full((shape[0], *shape[2:], shape[1]), 0.5, "f4"), -1, 1)
else:
    full = lambda shape: np.full(shape, 0.5, "f4")
x, w, dy = full(x_shape), full(w_shape), full(y_shape)
out = full({"conv": y_shape, "conv_input_grad": x_shape, "conv_weight_grad": w_shape}[op])
small = full((1, 16, 5, 5, 5))
functional.conv(small, w, padding=1)  # threads start
before = peak()
options = {"padding": 1, "out": out, "algorithm": algorithm}
if op == "conv":
    functional.conv(x, w, **options)
elif op == "conv_input_grad":
    functional.conv_input_grad(x_shape, w, dy, **options)
else:
    functional.conv_weight_grad(x, w_shape, dy, **options)
print(peak() - before)
"""

# 16 channels * 27 taps * 133**3 pixels * 4 bytes: the matrix of im2col
assert 16 * 27 * 133**3 * 4 > 4e9


@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("op", "algorithm"),
    list(itertools.product(("conv", "conv_input_grad", "conv_weight_grad"), ("im2col", "auto"))),
)
def test_no_matrix_of_patches(op, order, algorithm, ran):
    """Where im2col would take 4 GB, less than 64 MB beside input and output are taken."""
    command = [sys.executable, "-P", "-c", SCRIPT, op, order, algorithm]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    extra = int(result.stdout)
    ran("memory beside input and output", f"{extra / 2**20:5.1f} MB  {op} {order} {algorithm}")
    assert extra < 64 * 2**20
