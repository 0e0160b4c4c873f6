"""How far a result may be from the exact one: one rule for all tests."""

import numpy as np

# Measured and documented bounds of fast algorithms, which round more than the plain sum: error
# relative to the root mean square of the result, float32, by the number of spatial axes.
_WINOGRAD = {1: 1e-5, 2: 2e-5, 3: 5e-5}


def tolerance(
    dtype: object, reduction_length: int, algorithm: str = "direct", *, ndim: int = 2
) -> float:
    """Return the largest error to accept in any element, relative to the rms of the exact result.

    A sum of n products a * b of independent values of variance 1 has the rms sqrt(n). Computed in
    floating point, step j of the sum rounds a partial sum of size sqrt(j), with an error of at most
    u * sqrt(j), u = eps / 2, that is as good as random (variance u**2 * j / 3 if uniform). All
    steps together err by sqrt(sum of u**2 * j / 3) = u * n / sqrt(6), which relative to the rms is
    u * sqrt(n / 6): 0.2 * eps * sqrt(n) is one standard deviation of the error. The n products
    round too, which adds less than eps / 2, as does the result itself.

    Of a million elements the worst is five standard deviations out, which makes eps * sqrt(n). A
    factor of two pays for values that are not exactly independent or of one size, and 4 * eps for
    short sums. Sums in blocks, and sums with FMA, err less. The smallest mistake that there is, one
    product too few, is 1 / sqrt(n) of the rms: in float32 that is above this bound for n < 10**6.

    Parameters
    ----------
    dtype
        Of the computation: float32 or float64.
    reduction_length
        n, the number of products in the sum of one element; 1 for element-wise operations.
    algorithm
        That computed it. ``"winograd"`` is held to its own documented bound.
    ndim
        Number of spatial axes, for ``"winograd"``.
    """
    eps = float(np.finfo(np.dtype(dtype)).eps)
    if algorithm == "winograd":
        return _WINOGRAD[ndim] * eps / float(np.finfo(np.float32).eps)
    return eps * (4 + 2 * max(reduction_length, 1) ** 0.5)


def rms(x: np.ndarray) -> float:
    """Return the root of the mean square of all elements that are finite; 0 if there are none."""
    finite = x[np.isfinite(x)].astype(np.float64)
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def assert_close(
    actual: np.ndarray,
    expected: np.ndarray,
    reduction_length: int,
    *,
    algorithm: str = "direct",
    dtype: object = None,
    magnitude: float = 0.0,
) -> None:
    """Fail unless `actual` has the shape, the NaNs, the infinities and the values of `expected`.

    Parameters
    ----------
    reduction_length, algorithm
        See `tolerance`.
    dtype
        Of the computation; that of `actual` if None.
    magnitude
        The rms that the result is known to have where no padding takes part, if it is known: n
        products of standard normal values have sqrt(n). A result of few elements, or one that is
        mostly padding, has a smaller rms by chance, but no smaller errors.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, but {expected.shape} is right"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    scale = max(rms(expected), magnitude)
    bound = scale * tolerance(
        dtype or actual.dtype, reduction_length, algorithm, ndim=actual.ndim - 2
    )
    error = np.abs(actual[finite].astype(np.float64) - expected[finite])
    # written so that NaN where a number is right fails
    if not np.all(error <= bound):
        wrong = ~(error <= bound)
        worst = np.argwhere(finite)[np.argmax(np.where(np.isnan(error), np.inf, error))]
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {expected.size} elements are off by over {bound:.3g} "
            f"(rms {scale:.3g}, n {reduction_length}); the worst, at {tuple(map(int, worst))}, is "
            f"{actual[tuple(worst)]!r}, but {expected[tuple(worst)]!r} is right"
        )
