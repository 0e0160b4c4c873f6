"""The GPU backend: the functions of `reference` for arrays on an NVIDIA GPU, which CuPy holds.

Kernels are CUDA sources in this package, compiled when they are first needed by NVRTC, which comes with CuPy: neither a
toolkit nor cuDNN is needed. See docs/gpu.md.
"""

from fastconv.backends.cuda.conv import Run, WeightGradRun, conv, conv_input_grad, conv_weight_grad
from fastconv.backends.cuda.pool import (
    avg_pool,
    avg_pool_grad,
    lp_pool,
    lp_pool_grad,
    max_pool,
    max_pool_grad,
    max_pool_input_grad,
    max_unpool,
    max_unpool_grad,
)

__all__ = [
    "avg_pool", "avg_pool_grad", "conv", "conv_input_grad", "conv_weight_grad", "lp_pool", "lp_pool_grad", "max_pool",
    "max_pool_grad", "max_pool_input_grad", "max_unpool", "max_unpool_grad",
]
