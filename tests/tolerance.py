"""How far a result may be from the exact one: one rule for all tests."""

import numpy as np

# Measured and documented bounds of fast algorithms, which round more than the plain sum: error
# relative to the root mean square of the result, float32, by the number of spatial axes. Larger tiles than
# F(4, 3) round more as `amplification` says.
_WINOGRAD = {1: 1e-5, 2: 2e-5, 3: 5e-5}
_LARGEST = {1: "f4_3", 2: "f6x6_3x3", 3: "f4x4x4_3x3x3"}


# Points of the transforms of 4 to 8 points, besides infinity.
_POINTS = {
    4: (0, 1, -1),
    5: (0.5, -0.5, 1.25, -1.25),
    6: (0, 0.625, -0.625, 1.5, -1.5),
    7: (0.3125, -0.3125, 0.8125, -0.8125, 1.6875, -1.6875),
    8: (0, 0.5, -0.5, 1, -1, 2, -2),
}
# The weight gradient takes taps from tiles of dy; its sums in registers are of at most so many tiles.
_GRADIENT_TILES = {2: (4,), 3: (2, 3, 4, 5, 6), 5: (2,)}
_TILES_OF_A_SUM = 64
# Of a sum on tensor cores: products (of TF32) that are added at once, and what their cuts make of the rms; see below.
_PRODUCTS = 8
_CUT = 0.36 * 5 / 3**0.5


def amplification(points: tuple[float, ...], outputs: int, taps: int) -> float:
    """Return how much larger the products of a minimal filter are than its result.

    F(m, r) is y = A^T [(G w) * (B^T x)]. With independent inputs of variance 1, product q has the variance
    |G_q|^2 |B_q|^2, so that errors of one relative size in all products add up to the variance
    sum_q A_jq^2 |G_q|^2 |B_q|^2 in output j, whose own is r. The matrices are Cook's and Toom's for the finite
    points given, and infinity.
    """
    at = np.zeros((outputs, outputs + taps - 1))
    g, bt = np.zeros((at.shape[1], taps)), np.zeros((at.shape[1], at.shape[1]))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        at[:, i] = float(point) ** np.arange(outputs)
        g[i] = float(point) ** np.arange(taps) / np.prod(point - others)
        bt[i, :-1] = np.poly(others)[::-1]
    at[-1, -1] = g[-1, -1] = 1
    bt[-1] = np.poly(points)[::-1]
    x, w = np.arange(at.shape[1]) + 1.0, np.arange(taps) - 3.0
    np.testing.assert_allclose(at @ ((g @ w) * (bt @ x)), np.correlate(x, w), rtol=1e-9)
    return float(np.sqrt(max(at**2 @ ((g**2).sum(1) * (bt**2).sum(1))) / taps))


def tolerance(
    dtype: object, reduction_length: int, algorithm: str = "direct", *, ndim: int = 2, taps: int = 3
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
        That computed it. ``"winograd f4x4_3x3"`` is held to its tile's documented bound, ``"winograd"`` to that of the
        largest one. ``"winograd weight gradient"``, with a tile or without, sums as
        above, over at most 64 tiles in registers and then over those sums, but its errors are those of products that
        are larger by `amplification` for each axis; the transforms before and after round some times more, which
        counts as four more terms of the sum for each axis.
        ``"tensor cores"``, those of a GPU with sums in float32, do not round to nearest (Fasi, Higham, Mikaitis,
        Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021): they cut off. Products that lose their
        last bits where they are aligned have any sign, so that their errors add up as above, but are of a whole
        eps instead of its half: that takes the factor of two. The sum itself loses bits toward zero each time that 8
        products have been added, m = n / 8 times, so that these errors do not cancel: half a last bit on average,
        which is 0.36 * eps of a partial sum (eps / 2 of its power of two, whose ratio to the sum is 0.72 on
        average). Partial sums are a random walk to sqrt(n); added up they have the standard deviation
        m * sqrt(n) / sqrt(3), and the worst of a million is 5 of those out. Relative to the rms the loss
        is 0.36 * eps * 5 / sqrt(3) * m = 1.04 * eps * m, as m cuts are close to their average. One product too few
        is above this bound for n < 10**5.
    ndim, taps
        Number of spatial axes, and taps along each, for Winograd.
    """
    eps = spacing(dtype)
    algorithm, _, tile = algorithm.partition(" f")
    if algorithm == "winograd weight gradient":
        outputs = {int(m) for m in tile.split("_")[0].split("x")} - {1} if tile else _GRADIENT_TILES[taps]
        worst = max(amplification(_POINTS[m + taps - 1], taps, m) for m in outputs)
        terms = min(reduction_length, _TILES_OF_A_SUM) + reduction_length / _TILES_OF_A_SUM + 4 * ndim
        return eps * worst**ndim * (4 + 2 * terms**0.5)
    if algorithm == "winograd":
        outputs = max(4, *map(int, (tile or _LARGEST[ndim][1:]).split("_")[0].split("x")))
        larger = amplification(_POINTS[outputs + 2], outputs, 3) / amplification(_POINTS[6], 4, 3)
        return _WINOGRAD[ndim] * larger**ndim * eps / float(np.finfo(np.float32).eps)
    cut = _CUT * reduction_length / _PRODUCTS if algorithm == "tensor cores" else 0
    return eps * (4 + 2 * max(reduction_length, 1) ** 0.5 + cut)


def spacing(dtype: object) -> float:
    """Return the distance from 1 to the next number of a floating-point dtype."""
    if np.dtype(dtype).name == "bfloat16":  # of ml_dtypes, whose numbers finfo does not know
        return 2.0**-7
    return float(np.finfo(np.dtype(dtype)).eps)


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
    magnitude: float | np.ndarray = 0.0,
    taps: int = 3,
) -> None:
    """Fail unless `actual` has the shape, the NaNs, the infinities and the values of `expected`.

    Parameters
    ----------
    reduction_length, algorithm, taps
        See `tolerance`.
    dtype
        Of the computation; that of `actual` if None.
    magnitude
        The rms that the result is known to have where no padding takes part, if it is known: n
        products of standard normal values have sqrt(n). A result of few elements, or one that is
        mostly padding, has a smaller rms by chance, but no smaller errors. An array, which is broadcast, if it
        is not the same everywhere.
    """
    assert actual.shape == expected.shape, f"shape {actual.shape}, but {expected.shape} is right"
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    scale = np.broadcast_to(np.maximum(rms(expected), magnitude), expected.shape)
    bound = scale[finite] * tolerance(
        dtype or actual.dtype, reduction_length, algorithm, ndim=actual.ndim - 2, taps=taps
    )
    error = np.abs(actual[finite].astype(np.float64) - expected[finite])
    # written so that NaN where a number is right fails
    if not np.all(error <= bound):
        wrong = ~(error <= bound)
        i = int(np.argmax(np.where(np.isnan(error), np.inf, error - bound)))
        worst = tuple(map(int, np.argwhere(finite)[i]))
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {expected.size} elements are off by too much; the worst, at {worst}, is "
            f"{actual[worst]!r}, but {expected[worst]!r} is right, and the bound {bound[i]:.3g} "
            f"(rms {scale[worst]:.3g}, n {reduction_length})"
        )
