"""Problems: one frozen description of each convolution and pool, checked once.

All of fastconv works on three spatial axes (depth, height, width). A 1D or 2D problem is the 3D problem with leading
axes of length 1, so that there is one family of code. This package turns the arguments of a public function into such
a description, and says what is wrong with them; nothing behind it checks shapes again.

Builders are cached by the raw arguments: the second call with the same shapes, strides and parameters costs one
dictionary look-up.
"""

from fastconv.problem.common import batched, check_bias, check_ndim, explicit_padding
from fastconv.problem.conv import (
    ConvProblem,
    conv_input_grad_problem,
    conv_problem,
    conv_transpose_input_grad_problem,
    conv_transpose_problem,
    conv_transpose_weight_grad_problem,
    conv_weight_grad_problem,
)
from fastconv.problem.pool import (
    PoolProblem,
    Windows,
    adaptive_pool_grad_problem,
    adaptive_pool_problem,
    indexed_grad_problem,
    pool_grad_problem,
    pool_problem,
    unpool_grad_problem,
    unpool_problem,
)

__all__ = [
    "ConvProblem",
    "PoolProblem",
    "Windows",
    "adaptive_pool_grad_problem",
    "adaptive_pool_problem",
    "batched",
    "check_bias",
    "check_ndim",
    "conv_input_grad_problem",
    "conv_problem",
    "conv_transpose_input_grad_problem",
    "conv_transpose_problem",
    "conv_transpose_weight_grad_problem",
    "conv_weight_grad_problem",
    "explicit_padding",
    "indexed_grad_problem",
    "pool_grad_problem",
    "pool_problem",
    "unpool_grad_problem",
    "unpool_problem",
]
