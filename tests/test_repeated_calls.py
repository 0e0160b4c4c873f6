"""Calls that are recognised by their layouts: what they refuse, and that nothing is mixed up."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal as assert_same_bits

import fastconv
from fastconv import functional
from fastconv.backends._cpu import call_key

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 8, 8), np.float32)
W = RNG.standard_normal((4, 3, 3, 3), np.float32)
B = RNG.standard_normal(4, np.float32)
WT = RNG.standard_normal((3, 4, 2, 2), np.float32)

CALLS = {  # function of (x, out), shape of the result
    "conv": (lambda x, out=None: functional.conv(x, W, B, padding=1, out=out), (2, 4, 8, 8)),
    "conv2d": (lambda x, out=None: functional.conv2d(x, W, B, 2, out=out), (2, 4, 3, 3)),
    "conv_transpose": (lambda x, out=None: functional.conv_transpose(x, WT, B, 2, out=out), (2, 4, 16, 16)),
    "prepare_conv": (fastconv.prepare_conv(W, B, padding=1, activation="relu"), (2, 4, 8, 8)),
    "prepare_conv_transpose": (fastconv.prepare_conv_transpose(WT, B, 2), (2, 4, 16, 16)),
    "max_pool": (lambda x, out=None: functional.max_pool(x, 3, 2, 1, ceil_mode=True, out=out), (2, 3, 5, 5)),
    "max_pool2d": (lambda x, out=None: functional.max_pool2d(x, 2, out=out), (2, 3, 4, 4)),
    "avg_pool": (lambda x, out=None: functional.avg_pool(x, 3, 1, 1, count_include_pad=False, out=out), (2, 3, 8, 8)),
    "lp_pool": (lambda x, out=None: functional.lp_pool(x, 2, 2, out=out), (2, 3, 4, 4)),
    "adaptive_avg_pool": (lambda x, out=None: functional.adaptive_avg_pool(x, (3, None), out=out), (2, 3, 3, 8)),
    "global_max_pool": (lambda x, out=None: functional.global_max_pool(x, out=out), (2, 3, 1, 1)),
}


@pytest.fixture(params=CALLS)
def call(request):
    """The function, the shape of its result, and the result itself; it has run, with and without `out`."""
    function, shape = CALLS[request.param]
    function(X)
    y = function(X)
    for _ in range(2):
        out = np.full(shape, np.nan, np.float32)
        returned = function(X, out=out)
        assert np.shares_memory(returned, out)
        assert_same_bits(out, y)
    return function, shape, y


def test_out_may_have_any_layout(call):
    function, shape, y = call
    wide = np.full((*shape[:-1], 2 * shape[-1]), np.nan, np.float32)
    for out in (wide[..., ::2], wide[..., -1::-2], np.full(shape[::-1], np.nan, np.float32).T):
        for _ in range(2):
            out[...] = np.nan
            function(X, out=out)
            np.testing.assert_allclose(out, y, rtol=1e-5, atol=1e-5)
    assert np.isnan(function(X) - y).sum() == 0


def test_errors_of_out_are_raised_after_a_good_call(call):
    function, shape, _ = call
    frozen = np.empty(shape, np.float32)
    function(X, out=frozen)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        function(X, out=frozen)
    with pytest.raises(ValueError, match="shape"):
        function(X, out=np.empty((*shape[:-1], shape[-1] + 1), np.float32))
    with pytest.raises(TypeError, match="dtype"):
        function(X, out=np.empty(shape))
    with pytest.raises((TypeError, ValueError)):
        function(X, out=np.empty(shape, np.float32).tolist())
    with pytest.raises(ValueError, match="several elements"):
        function(X, out=np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0, 0, 0, 0)))


def test_overlap_is_refused_after_a_good_call(call):
    function, shape, _ = call
    size = int(np.prod(shape))
    memory = np.zeros(size + 2 * X.size, np.float32)
    apart = memory[: X.size].reshape(X.shape), memory[X.size : X.size + size].reshape(shape)
    apart[0][...] = X
    for _ in range(2):
        function(apart[0], out=apart[1])  # side by side is well
    for shift in (0, 1, size // 2, size - 1):
        x = memory[shift : shift + X.size].reshape(X.shape)
        for _ in range(2):
            with pytest.raises(ValueError, match="shares memory"):
                function(x, out=memory[:size].reshape(shape))


def test_interleaved_out_is_accepted():
    memory = np.zeros((2, 3, 8, 16), np.float32)
    x, out = memory[..., ::2], memory[..., 1::2]
    x[...] = X
    y = functional.max_pool(X, 3, 1, 1)
    for _ in range(3):
        functional.max_pool(x, 3, 1, 1, out=out)
        assert_same_bits(out, y)
        assert_same_bits(x, X)


def test_overlap_with_weights_bias_and_residual_is_refused():
    memory = np.zeros(W.size + 512, np.float32)
    out, w = memory[:512].reshape(2, 4, 8, 8), memory[512:].reshape(W.shape)
    for _ in range(2):
        functional.conv(X, w, None, 1, 1, out=out)
        with pytest.raises(ValueError, match="shares memory"):
            functional.conv(X, memory[256 : 256 + W.size].reshape(W.shape), None, 1, 1, out=out)
        with pytest.raises(ValueError, match="shares memory"):
            functional.conv(X, W, memory[:4], 1, 1, out=out)
    prepared = fastconv.prepare_conv(W, B, padding=1)
    residual = np.zeros((2, 4, 8, 8), np.float32)
    for _ in range(2):
        prepared(X, residual=residual, out=out)
        with pytest.raises(ValueError, match="shares memory"):
            prepared(X, residual=out, out=out)


def test_without_a_batch():
    prepared = fastconv.prepare_conv(W, B, padding=1)
    out = np.full((4, 8, 8), np.nan, np.float32)
    for _ in range(3):
        assert np.shares_memory(prepared(X[0], out=out), out)
        assert_same_bits(out, prepared(X)[0])
        out[...] = np.nan
    pooled = np.full((3, 4, 4), np.nan, np.float32)
    for _ in range(3):
        assert functional.max_pool2d(X[0], 2, out=pooled).shape == pooled.shape
        assert_same_bits(pooled, functional.max_pool2d(X, 2)[0])
        y, indices = functional.max_pool2d(X[0], 2, return_indices=True)
        assert y.shape == indices.shape == (3, 4, 4)


@pytest.mark.parametrize("order", [[True, 1, 1.0], [1, True, 1.0]])
def test_equal_options_of_other_types_are_checked(order):
    """1, 1.0 and True are equal, and what one of them may be the others need not."""
    def outcome(stride):
        try:
            return functional.conv(X, W, stride=stride).shape
        except (TypeError, ValueError) as error:
            return type(error)

    expected = {id(value): outcome(value) for value in order}
    for value in (*order, *reversed(order)):
        assert outcome(value) == expected[id(value)]
    assert expected[id(order[-1])] is TypeError


def test_key_tells_booleans_from_numbers():
    keys = {call_key(((True, 1),), X), call_key(((1, True),), X), call_key(((1, 1),), X), call_key(((True, True),), X)}
    assert len(keys) == 4 and None not in keys
    assert call_key((1.0,), X) is None
    assert call_key((tuple(range(100)),), X) is None
    assert call_key((1,), X, out=X) is None
    assert call_key((1,), X[:1], out=X[1:]) is not None


def test_indices_are_given_only_where_they_are_asked_for():
    for _ in range(2):
        y, indices = functional.max_pool(X, 2, return_indices=True)
        assert indices.dtype == np.int64
        assert_same_bits(functional.max_pool(X, 2), y)


def test_the_reference_runs_where_it_is_forced():
    y = functional.max_pool(X, 2)
    with fastconv.config(algorithm="reference"):
        for _ in range(2):
            assert_same_bits(functional.max_pool(X, 2), y)
            prepared = fastconv.prepare_conv(W, B, algorithm="reference")
            assert prepared(X[0]).shape == (4, 6, 6)
            assert prepared(X[0]).shape == (4, 6, 6)
