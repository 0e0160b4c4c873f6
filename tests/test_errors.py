"""Bad input: every error names the function, the argument, what was given, the rule with its numbers, and a hint."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastconv.functional as F
from fastconv.config import config

X = np.zeros((2, 4, 8, 9), np.float32)
W = np.zeros((6, 4, 3, 3), np.float32)
B = np.zeros(6, np.float32)
DY = np.zeros((2, 6, 6, 7), np.float32)
WT = np.zeros((4, 6, 3, 3), np.float32)
POOLED = np.zeros((2, 4, 4, 4), np.float32)
AT = np.zeros((2, 4, 4, 4), np.int64)
READ_ONLY = np.zeros((2, 6, 6, 7), np.float32)
READ_ONLY.flags.writeable = False


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """An array of any shape that takes no memory."""
    return np.broadcast_to(dtype(0), shape)


conv = partial(F.conv2d, X, W)
max_pool, avg_pool = partial(F.max_pool2d, X), partial(F.avg_pool2d, X)

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # ---- shapes and channels
    "channels": (lambda: F.conv2d(X, W[:, :3]), ValueError,
                 r"conv2d: weight has 3 input channels per group, but input has 4 channels and groups=1: "
                 r"4 / 1 = 4 is needed. Hint: give weight the shape \(6, 4, 3, 3\)"),
    "channels of a group": (lambda: F.conv2d(X, W, groups=2), ValueError,
                            r"weight has 4 input channels per group, but input has 4 channels and groups=2: 4 / 2 = 2"),
    "groups and filters": (lambda: F.conv2d(X, W[:5, :2], groups=2), ValueError,
                           r"groups is 2.*does not divide the 5 filters of weight.*5 / 2"),
    "groups and channels": (lambda: F.conv2d(zeros(2, 4, 8, 9), zeros(6, 1, 3, 3), groups=3), ValueError,
                            r"input has 4 channels and groups=3.*4 / 3 is no integer"),
    "NHWC": (lambda: F.conv2d(zeros(2, 8, 9, 4), W), ValueError,
             r"looks like \(N, ..., C\): use np.moveaxis\(input, -1, 1\), which is a free view"),
    "NHWC, transposed": (lambda: F.conv_transpose2d(zeros(2, 8, 9, 4), WT), ValueError,
                         r"use np.moveaxis\(input, -1, 1\)"),
    "rank of input": (lambda: F.conv2d(X[0, 0], W), ValueError,
                      r"input has shape \(8, 9\) with 2 axes, but \(N, C, H, W\) or \(C, H, W\)"),
    "rank of weight": (lambda: F.conv2d(X, W[0]), ValueError,
                       r"weight has shape \(4, 3, 3\) with 3 axes, but 4 are needed: \(K, C/groups, H, W\)"),
    "rank of a general weight": (lambda: F.conv(X, zeros(6, 4)), ValueError, "conv: "),
    "four spatial axes": (lambda: F.conv(zeros(1, 1, 2, 2, 2, 2), zeros(1, 1, 2, 2, 2, 2)), ValueError, "conv"),
    "bias": (lambda: F.conv2d(X, W, B[:5]), ValueError, r"bias has shape \(5,\), but \(6,\) is needed"),
    "bias of rank 2": (lambda: F.conv2d(X, W, B[None]), ValueError, r"bias has shape \(1, 6\)"),
    "no channels": (lambda: F.conv2d(X[:, :0], zeros(6, 0, 3, 3)), ValueError,
                    r"weight has shape \(6, 0, 3, 3\), but every axis must be at least 1"),
    "no pixels": (lambda: F.conv2d(X[:, :, :0], W, padding=1), ValueError,
                  r"input has spatial size \(0, 9\), but at least 1.*only the batch may be empty"),
    "empty kernel": (lambda: F.conv2d(X, W[..., :0]), ValueError, r"weight has shape \(6, 4, 3, 0\)"),
    "no filters": (lambda: F.conv2d(X, W[:0]), ValueError, r"weight has shape \(0, 4, 3, 3\)"),
    "large kernel": (lambda: F.conv2d(X, zeros(6, 4, 3, 5), padding=(0, 1), dilation=(1, 3)), ValueError,
                     r"dilation \* \(kernel - 1\) \+ 1 = 3 \* \(5 - 1\) \+ 1 = 13 elements, but the padded input has "
                     r"only 9 \+ 1 \+ 1 = 11. Hint: pad by 2 more"),
    # ---- parameters
    "stride 0": (lambda: conv(stride=0), ValueError, "stride is 0, but at least 1"),
    "negative stride": (lambda: conv(stride=(1, -2)), ValueError, "stride is -2, but at least 1"),
    "float stride": (lambda: conv(stride=1.0), TypeError, r"stride is 1\.0, but an integer"),
    "bool stride": (lambda: conv(stride=True), TypeError, "stride is True, but an integer"),
    "long stride": (lambda: conv(stride=(1, 1, 1)), ValueError,
                    r"stride is \(1, 1, 1\) with 3 numbers, but 1 or 2 are needed, one per spatial axis \(H, W\)"),
    "text stride": (lambda: conv(stride="2"), TypeError, "stride is '2', but an integer"),
    "huge stride": (lambda: conv(stride=2**31), ValueError, r"stride is 2147483648, but at most 2147483647"),
    "dilation 0": (lambda: conv(dilation=0), ValueError, "dilation is 0, but at least 1"),
    "groups 0": (lambda: conv(groups=0), ValueError, "groups is 0, but at least 1"),
    "negative groups": (lambda: conv(groups=-1), ValueError, "groups is -1, but at least 1"),
    "float groups": (lambda: conv(groups=1.0), TypeError, r"groups is 1\.0, but an integer"),
    "negative padding": (lambda: conv(padding=-1), ValueError, "padding is -1, but at least 0 .*crop the input"),
    "negative pair": (lambda: conv(padding=((0, 0), (0, -3))), ValueError, "padding is -3, but at least 0"),
    "float padding": (lambda: conv(padding=0.5), TypeError, r"padding is 0\.5, but an integer"),
    "unknown padding": (lambda: conv(padding="full"), ValueError,
                        "padding is 'full', but 'valid', 'same', 'same_lower' or numbers"),
    "triples": (lambda: conv(padding=((1, 2, 3), (1, 2, 3))), ValueError, r"2 pairs \(lo, hi\) are needed"),
    "number and pair": (lambda: conv(padding=(1, (1, 2))), ValueError, r"2 pairs \(lo, hi\) are needed"),
    "huge padding": (lambda: conv(padding=2**40), ValueError, "padding is 1099511627776, but at most 2147483647"),
    "padding_mode": (lambda: conv(padding=1, padding_mode="mirror"), ValueError, "padding_mode is 'mirror'"),
    "algorithm": (lambda: conv(algorithm="fast"), ValueError, "algorithm"),
    "overflow": (lambda: F.conv1d(zeros(1, 1, 2**40), zeros(2**30, 1, 1)), ValueError,
                 r"output would have shape \(1, 1073741824, 1099511627776\).*2\*\*63 - 1"),
    # ---- types
    "lists": (lambda: F.conv2d([[1.0]], W), TypeError, "input is a builtins.list"),
    "mixed dtypes": (lambda: F.conv2d(X, W.astype(np.float64)), TypeError,
                     r"weight has dtype float64, but input has dtype float32; both must be the same. "
                     r"Hint: weight.astype\(np.float32\)"),
    "dtype of bias": (lambda: F.conv2d(X, W, B.astype(np.float64)), TypeError, "bias has dtype float64"),
    "integers": (lambda: F.conv2d(X.astype(int), W), TypeError, "input has dtype int64, but float32 or float64"),
    "half precision": (lambda: F.conv2d(X, W.astype(np.float16)), TypeError, "weight has dtype float16"),
    "complex": (lambda: F.conv2d(X.astype(np.complex64), W), TypeError, "input has complex dtype complex64"),
    "byte order": (lambda: F.conv2d(X.astype(">f4"), W), TypeError, "input has .*non-native byte order"),
    # ---- outputs
    "shape of out": (lambda: conv(out=np.zeros((2, 6, 6, 6), np.float32)), ValueError,
                     r"out has shape \(2, 6, 6, 6\), but the result has shape \(2, 6, 6, 7\)"),
    "rank of out": (lambda: conv(out=B), ValueError, r"out has shape \(6,\)"),
    "dtype of out": (lambda: conv(out=np.zeros((2, 6, 6, 7))), TypeError, "out has dtype float64"),
    "read-only out": (lambda: conv(out=READ_ONLY), ValueError, "out is read-only"),
    "input as out": (lambda: F.conv2d(X, np.zeros((4, 4, 1, 1), np.float32), out=X), ValueError,
                     "out shares memory with an input"),
    "out of one element": (lambda: conv(out=np.lib.stride_tricks.as_strided(B, (2, 6, 6, 7), (0, 0, 0, 0))),
                           ValueError, "several elements may share memory"),
    # ---- gradients
    "input_size": (lambda: F.conv_input_grad((2, 4, 8, 8), W, DY), ValueError,
                   r"grad_output has shape \(2, 6, 6, 7\), but the output has shape \(2, 6, 6, 6\)"),
    "batch of input_size": (lambda: F.conv_input_grad((3, 4, 8, 9), W, DY), ValueError, "grad_output has shape"),
    "channels of input_size": (lambda: F.conv_input_grad((2, 5, 8, 9), W, DY), ValueError,
                               "weight has 4 input channels per group"),
    "input_size is a number": (lambda: F.conv_input_grad(8, W, DY), TypeError, "input_size is 8, but a tuple"),
    "negative input_size": (lambda: F.conv_input_grad((2, 4, -8, 9), W, DY), ValueError, "input_size is -8"),
    "weight_size": (lambda: F.conv_weight_grad(X, (6, 4, 3, 2), DY), ValueError, "grad_output has shape"),
    "rank of weight_size": (lambda: F.conv_weight_grad(X, (6, 4), DY), ValueError, "conv_weight_grad: "),
    "dtype of grad_output": (lambda: F.conv_weight_grad(X, W.shape, DY.astype(np.float64)), TypeError,
                             "grad_output has dtype float64, but input has dtype float32"),
    # ---- transposed
    "transposed channels": (lambda: F.conv_transpose2d(X, W), ValueError,
                            r"weight has shape \(6, 4, 3, 3\) for 6 input channels, but input has 4"),
    "transposed groups": (lambda: F.conv_transpose2d(X, WT, groups=3), ValueError,
                          "groups is 3, which does not divide the 4 input channels of weight"),
    "output_padding": (lambda: F.conv_transpose2d(X, WT, stride=2, output_padding=(0, 3), dilation=3), ValueError,
                       r"output_padding is 3, but less than max\(stride, dilation\) = max\(2, 3\) = 3"),
    "negative output_padding": (lambda: F.conv_transpose2d(X, WT, output_padding=-1), ValueError,
                                "output_padding is -1, but at least 0"),
    "transposed same": (lambda: F.conv_transpose2d(X, WT, padding="same"), ValueError, "padding is 'same'"),
    "cropped away": (lambda: F.conv_transpose2d(X, WT, padding=(5, 0)), ValueError,
                     r"\(8 - 1\) \* 1 - 5 - 5 \+ 1 \* \(3 - 1\) \+ 0 \+ 1 = 0, but at least 1.*reduce padding by 1"),
    # ---- pools
    "pool rank": (lambda: F.max_pool2d(X[0, 0], 2), ValueError, r"max_pool2d: input has shape \(8, 9\) with 2 axes"),
    "pool without axes": (lambda: F.max_pool(np.zeros((2, 3), np.float32), 2), ValueError, "0 spatial axes"),
    "pool kernel 0": (lambda: max_pool(0), ValueError, "max_pool2d: kernel_size is 0, but at least 1"),
    "pool kernel of 3": (lambda: max_pool((2, 2, 2)), ValueError, r"kernel_size is \(2, 2, 2\) with 3 numbers"),
    "pool kernel None": (lambda: max_pool(None), TypeError, "kernel_size is None"),
    "pool stride 0": (lambda: max_pool(2, 0), ValueError, "stride is 0"),
    "pool padding": (lambda: max_pool(3, 1, 2), ValueError,
                     r"padding is 2, but at most half of kernel_size is allowed: 3 // 2 = 1"),
    "pool negative padding": (lambda: avg_pool(3, 1, -1), ValueError, "avg_pool2d: padding is -1"),
    "pool padding without input": (lambda: avg_pool(2, 1, ((0, 0), (3, 0))), ValueError,
                                   r"some window covers only padding.*padding \(3, 0\)"),
    "absurd padding": (lambda: avg_pool(2, 1, ((0, 0), (2**31 - 1, 0))), ValueError, "covers only padding"),
    "window in a gap": (lambda: F.max_pool1d(X[0, :, 0, :4], 2, 1, 1, 5), ValueError,
                        "some window covers only padding: input size 4, kernel_size 2, stride 1, dilation 5"),
    "rank of weight gradient": (lambda: F.conv_weight_grad(X, W.shape, DY, out=B), ValueError, "out has 1 axes"),
    "pool dilation": (lambda: max_pool(3, 1, 1, 0), ValueError, "dilation is 0"),
    "pool too large": (lambda: max_pool(9), ValueError,
                       r"1 \* \(9 - 1\) \+ 1 = 9 elements, but the padded input has only 8 \+ 0 \+ 0 = 8"),
    "pool of nothing": (lambda: F.avg_pool2d(X[:, :0], 2), ValueError, "only the batch may be empty"),
    "divisor 0": (lambda: avg_pool(2, divisor_override=0), ValueError, "divisor_override is 0"),
    "float divisor": (lambda: avg_pool(2, divisor_override=0.5), TypeError, r"divisor_override is 0\.5"),
    "norm_type 0": (lambda: F.lp_pool2d(X, 0, 2), ValueError, "norm_type is 0"),
    "norm_type inf": (lambda: F.lp_pool2d(X, float("inf"), 2), ValueError, "norm_type is inf.*max_pool"),
    "norm_type text": (lambda: F.lp_pool2d(X, "2", 2), TypeError, "norm_type is '2'"),
    "output_size": (lambda: F.adaptive_avg_pool2d(X, (1, 2, 3)), ValueError,
                    r"output_size is \(1, 2, 3\) with 3 numbers, but 2 are needed"),
    "negative output_size": (lambda: F.adaptive_max_pool2d(X, -1), ValueError, "output_size is -1"),
    "float output_size": (lambda: F.adaptive_max_pool2d(X, 2.0), TypeError, r"output_size is 2\.0"),
    "pool integers": (lambda: F.max_pool2d(X.astype(int), 2), TypeError, "input has dtype int64"),
    "pool out": (lambda: max_pool(2, out=np.zeros((2, 4, 4, 5), np.float32)), ValueError,
                 r"out has shape \(2, 4, 4, 5\), but the result has shape \(2, 4, 4, 4\)"),
    "pool rank of out": (lambda: max_pool(2, out=np.zeros((2, 4, 4), np.float32)), ValueError, "out has shape"),
    "pool input as out": (lambda: max_pool(1, out=X), ValueError, "shares memory with an input"),
    "pool input_size": (lambda: F.avg_pool_grad(POOLED, (2, 4, 8, 12), 2), ValueError,
                        r"grad_output has shape \(2, 4, 4, 4\), but the output has shape \(2, 4, 4, 6\)"),
    "pool rank of input_size": (lambda: F.avg_pool_grad(POOLED, (4, 8, 8), 2), ValueError, "input_size has shape"),
    "max_pool_grad batch": (lambda: F.max_pool_grad(POOLED, AT, (3, 4, 8, 8)), ValueError, r"input_size is \(3"),
    "max_pool_grad indices": (lambda: F.max_pool_grad(POOLED, AT[1:], X.shape), ValueError,
                              r"indices have shape \(1, 4, 4, 4\), but \(2, 4, 4, 4\)"),
    "indices too high": (lambda: F.max_pool_grad(POOLED, AT + 72, X.shape), ValueError,
                         r"indices.* 72, but positions in a plane of .* run from 0 to .*71"),
    "indices too low": (lambda: F.max_pool_grad(POOLED, AT - 1, X.shape), ValueError, r"indices.* -1, but positions"),
    "int32 indices": (lambda: F.max_unpool2d(POOLED, AT.astype(np.int32), 2), TypeError, "indices has dtype int32"),
    "unpool indices": (lambda: F.max_unpool2d(POOLED, AT + 64, 2), ValueError, "indices.* 64, but .*63"),
    "unpool size": (lambda: F.max_unpool2d(POOLED, AT, 2, output_size=(10, 8)), ValueError,
                    r"output_size is \(10, 8\).*8 - 2 < 10 < 8 \+ 2 is false"),
    "unpool to nothing": (lambda: F.max_unpool2d(POOLED, AT, 1, 1, 2), ValueError, r"= \(0, 0\), but at least 1"),
    "unpool_grad indices": (lambda: F.max_unpool_grad(X, AT + 72), ValueError, "indices.* 72, but .*71"),
    "unpool_grad channels": (lambda: F.max_unpool_grad(X, AT[:, :3]), ValueError, "batch and channels"),
    "lp output": (lambda: F.lp_pool_grad(POOLED, X, POOLED[:1], 2, 2), ValueError, "output has shape"),
    "lp dtype": (lambda: F.lp_pool_grad(POOLED.astype(np.float64), X, POOLED, 2, 2), TypeError,
                 "grad_output has dtype float64"),
}


@pytest.mark.parametrize("algorithm", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, algorithm: str) -> None:
    call, error, pattern = CASES[case]
    with pytest.raises(error, match=pattern) as caught, config(algorithm=algorithm):
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    operation, _, rest = message.partition(": ")
    assert operation.replace("_", "").isalnum(), message
    assert "Hint: " in rest, message
    assert "\n" not in message


def test_a_bad_call_does_not_poison_the_good_one() -> None:
    """Problems are cached by their arguments; errors must not be, and equal numbers of other types must not hit."""
    for _ in range(2):
        assert F.max_pool2d(X, 2).shape == (2, 4, 4, 4)
        for stride in (True, 2.0, np.float32(2)):
            with pytest.raises(TypeError, match="stride"):
                F.max_pool2d(X, 2, stride)


def test_nothing_is_written_before_the_checks() -> None:
    out = np.full((2, 6, 6, 7), 5, np.float32)
    for bad in ({"stride": 0}, {"groups": 2}, {"bias": B[:2]}):
        with pytest.raises(ValueError, match="Hint"):
            F.conv2d(X, W, out=out, **bad)
    assert (out == 5).all()
