"""Convolution, pooling and normalisation as their formulas say, in NumPy.

This module is oracle, fallback and documentation, so it is written to be checked by eye: every
function is one loop over the taps of the kernel (never over pixels), accumulates in float64, and
has no branch on the number of dimensions, because 1D and 2D are 3D with leading axes of length 1.

Notation (the same in the compiled kernels): n batch, g group, c input channel within its group,
k output channel within its group, o output position, i input position, t tap; s stride, d dilation,
p low padding. Positions stand for (depth, height, width) triples and are combined axis by axis::

    padded input   0 0 x x x x x x 0        input position of tap t of output o:
    o = 0          t . t . t                i = o * s + t * d - p
    o = 1              t . t . t            (here s = 2, d = 2, p = 2, kernel 3)

Arrays arrive with the caller's number of spatial axes, and results have the same number.
"""

from fastconv.backends.reference.conv import (
    conv,
    conv_input_grad,
    conv_weight_grad,
)
from fastconv.backends.reference.norm import (
    batch_norm,
    batch_norm_grad,
    batch_statistics,
    local_response_norm,
    local_response_norm_grad,
)
from fastconv.backends.reference.pool import (
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
    "avg_pool",
    "avg_pool_grad",
    "batch_norm",
    "batch_norm_grad",
    "batch_statistics",
    "conv",
    "conv_input_grad",
    "conv_weight_grad",
    "local_response_norm",
    "local_response_norm_grad",
    "lp_pool",
    "lp_pool_grad",
    "max_pool",
    "max_pool_grad",
    "max_pool_input_grad",
    "max_unpool",
    "max_unpool_grad",
]
