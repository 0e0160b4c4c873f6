"""The one table of convolutions, and of memory layouts, that the tests of every kernel run."""

from dataclasses import dataclass

import numpy as np

from fastconv import plan
from fastconv.problem import conv_input_grad_problem, conv_problem, conv_weight_grad_problem


@dataclass(frozen=True)
class Conv:
    """The arguments of one convolution; `padding` is one pair (before, behind) per axis."""

    x: tuple[int, ...]
    w: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def y(self):
        """The shape of the output."""
        sizes = zip(self.x[2:], self.w[2:], self.stride, self.padding, self.dilation, strict=True)
        out = [(n + lo + hi - d * (k - 1) - 1) // s + 1 for n, k, s, (lo, hi), d in sizes]
        return (self.x[0], self.w[0], *out)

    @property
    def arguments(self):
        """Stride, padding, dilation, groups, in the order of the public functions."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def reduction(self):
        """How many products make one element of (y, dx, dw), at most."""
        taps = int(np.prod(self.w[2:]))
        positions = int(np.prod(self.y[2:]))
        return {
            "conv": self.w[1] * taps,
            "conv_input_grad": self.w[0] // self.groups * taps,
            "conv_weight_grad": self.x[0] * positions,
        }


def conv(x, w, stride=1, padding=0, dilation=1, groups=1):
    """Make a `Conv`; integers serve all axes, and an integer of padding both sides."""
    axes = len(x) - 2
    stride, dilation, padding = (
        value if isinstance(value, tuple) else (value,) * axes for value in (stride, dilation, padding)
    )
    pairs = tuple(pair if isinstance(pair, tuple) else (pair, pair) for pair in padding)
    return Conv(x, w, stride, pairs, dilation, groups)


# Tiles are 4 to 14 rows by 4 to 32 columns of channels or pixels, so that these are each less than,
# equal to, or more than some tile, some multiple of one, or prime.
AROUND_TILES = (5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 28, 31, 32, 33, 64, 65)

CONVS = {
    # sizes of tiles along each axis that is cut into tiles
    **{f"{n} in channels": conv((2, n, 3, 5), (4, n, 2, 2)) for n in AROUND_TILES},
    **{f"{n} out channels": conv((2, 3, 4, 5), (n, 3, 2, 2), padding=1) for n in AROUND_TILES},
    **{f"width {n}": conv((1, 4, 2, n), (3, 4, 1, 3), padding=(0, 1)) for n in AROUND_TILES},
    **{f"length {n}": conv((2, 3, n), (5, 3, 3), padding=1) for n in AROUND_TILES},
    # kernels
    **{f"kernel {k}": conv((1, 3, 12, 13), (8, 3, k, k), padding=k // 2) for k in range(1, 12)},
    "kernel 5x1": conv((1, 8, 9, 7), (8, 8, 5, 1), padding=(2, 0)),
    "kernel 1x7": conv((1, 8, 5, 19), (6, 8, 1, 7), padding=(0, 3)),
    "kernel is input": conv((3, 5, 4, 6), (7, 5, 4, 6)),
    "kernel is padded input": conv((2, 3, 3, 2), (4, 3, 5, 6), padding=(1, 2)),
    # few channels
    "1 channel": conv((2, 1, 9, 11), (6, 1, 3, 3), padding=1),
    "1 channel to 1": conv((2, 1, 17, 9), (1, 1, 3, 3)),
    "3 channels": conv((2, 3, 15, 18), (16, 3, 7, 7), stride=2, padding=3),
    "all ones": conv((1, 1, 1, 1), (1, 1, 1, 1)),
    # 1x1
    "1x1": conv((2, 16, 7, 9), (24, 16, 1, 1)),
    "1x1 stride 2": conv((2, 8, 9, 11), (12, 8, 1, 1), stride=2),
    "1x1 padded": conv((2, 8, 5, 6), (12, 8, 1, 1), padding=1),
    "1x1 of one pixel": conv((5, 33, 1, 1), (17, 33, 1, 1)),
    # stride, dilation, padding
    "stride 2": conv((2, 8, 13, 17), (16, 8, 3, 3), stride=2, padding=1),
    "stride 2x3": conv((1, 4, 11, 17), (8, 4, 3, 3), stride=(2, 3), padding=1),
    "stride above kernel": conv((2, 4, 11, 13), (8, 4, 2, 2), stride=(3, 5)),
    "stride above padded kernel": conv((2, 4, 11, 13), (8, 4, 2, 1), stride=(4, 3), padding=2),
    "stride above input": conv((2, 4, 5, 6), (8, 4, 3, 3), stride=9, padding=1),
    "dilation 2": conv((1, 8, 11, 13), (8, 8, 3, 3), padding=2, dilation=2),
    "dilation 3x1": conv((1, 4, 17, 9), (8, 4, 3, 2), padding=(3, 0), dilation=(3, 1)),
    "dilation above output": conv((2, 17, 12, 13), (33, 17, 3, 3), padding=1, dilation=5),
    "dilation 2 stride 2": conv((1, 4, 13, 15), (8, 4, 3, 3), 2, 2, 2),
    "dilation 3 stride 2": conv((1, 4, 13, 15), (8, 4, 3, 2), 2, 3, 3),
    "dilation 4 stride 6": conv((1, 4, 21, 25), (8, 4, 3, 2), 6, 3, 4),
    "asymmetric padding": conv((2, 4, 7, 9), (8, 4, 3, 3), padding=((0, 2), (3, 1))),
    "asymmetric padding, stride 2": conv((2, 4, 8, 8), (8, 4, 3, 3), 2, ((0, 1), (0, 1))),
    "padding beyond kernel": conv((1, 3, 3, 4), (5, 3, 2, 3), padding=((4, 3), (5, 4))),
    "padding beyond kernel, stride 3": conv((1, 3, 3, 4), (5, 3, 2, 3), 3, ((4, 3), (5, 4))),
    # groups
    "2 groups": conv((2, 8, 7, 9), (12, 4, 3, 3), padding=1, groups=2),
    "3 groups of primes": conv((2, 15, 5, 7), (21, 5, 3, 2), groups=3),
    "4 groups 1x1": conv((1, 16, 6, 5), (32, 4, 1, 1), groups=4),
    "groups, stride, dilation": conv((1, 6, 12, 11), (4, 3, 3, 3), 2, 2, 2, 2),
    "depthwise": conv((2, 17, 9, 10), (17, 1, 3, 3), padding=1, groups=17),
    "depthwise stride 2": conv((1, 16, 11, 9), (16, 1, 5, 5), 2, 2, groups=16),
    "depthwise, dilation": conv((1, 9, 13, 12), (9, 1, 3, 3), 1, 2, 2, 9),
    "depthwise, stride above kernel": conv((1, 8, 13, 17), (8, 1, 2, 2), 3, 1, groups=8),
    "depthwise 7x7": conv((1, 12, 11, 15), (12, 1, 7, 7), padding=3, groups=12),
    "depthwise, asymmetric": conv((2, 5, 6, 8), (5, 1, 2, 3), 2, ((0, 3), (4, 1)), groups=5),
    **{f"{n} depthwise channels": conv((2, n, 3, 5), (n, 1, 3, 3), padding=1, groups=n) for n in AROUND_TILES},
    **{f"depthwise width {n}": conv((1, 3, 2, n), (3, 1, 3, 3), padding=1, groups=3) for n in AROUND_TILES},
    "groups of 4": conv((2, 40, 7, 11), (40, 4, 3, 3), padding=1, groups=10),
    "groups of 3 to 5": conv((1, 33, 5, 9), (55, 3, 2, 3), padding=1, groups=11),
    "groups of 6 to 2, stride": conv((1, 48, 7, 9), (16, 6, 3, 3), 2, 1, groups=8),
    "depthwise times 3": conv((1, 5, 7, 9), (15, 1, 3, 3), padding=1, groups=5),
    # long reductions, which are cut into chunks; many pixels, which are cut into tasks
    "long reduction": conv((1, 300, 4, 5), (10, 300, 3, 3), padding=1),
    "long reduction to x": conv((1, 10, 4, 5), (300, 10, 3, 3), padding=1),
    "many pixels": conv((3, 2, 41, 43), (3, 2, 3, 3), padding=1),
    "many pixels of one channel": conv((1, 1, 71, 67), (2, 1, 2, 2)),
    "many samples": conv((37, 4, 3, 3), (5, 4, 2, 2)),
    # 1D
    "1d kernel 9": conv((2, 12, 40), (20, 12, 9), padding=4),
    "1d kernel 10": conv((2, 9, 27), (8, 9, 10), padding=3),
    "1d kernel 8, stride 2": conv((2, 6, 41), (9, 6, 8), 2, 3),
    "1d stride, dilation": conv((3, 5, 37), (9, 5, 4), 3, ((2, 5),), 2),
    "1d depthwise": conv((2, 19, 30), (19, 1, 5), padding=2, groups=19),
    "1d kernel 33": conv((1, 2, 70), (3, 2, 33), padding=16),
    "1d one element": conv((2, 3, 1), (4, 3, 1)),
    # 3D
    "3d": conv((2, 3, 5, 6, 7), (8, 3, 3, 3, 3), padding=1),
    "3d stride 2": conv((1, 4, 7, 8, 9), (8, 4, 3, 3, 3), 2, 1),
    "3d 1x1x1": conv((1, 9, 3, 4, 5), (14, 9, 1, 1, 1)),
    "3d mixed": conv((1, 4, 6, 9, 8), (6, 2, 2, 1, 3), (1, 2, 3), ((1, 0), (0, 2), (2, 2)), (3, 1, 2), 2),
    "3d depthwise": conv((1, 7, 4, 5, 6), (7, 1, 3, 3, 3), padding=1, groups=7),
    "3d stride above kernel": conv((1, 2, 7, 8, 9), (3, 2, 2, 1, 2), 3),
    # nothing to do
    "no sample": conv((0, 3, 5, 5), (4, 3, 3, 3), padding=1),
    "no sample 1d": conv((0, 3, 5), (4, 3, 3), padding=1),
}


# --------------------------------------------------------------------------------------------------
# Memory layouts: each makes a view of `shape` into a flat buffer, with room around it
# --------------------------------------------------------------------------------------------------

GUARD = 67  # elements before and behind the view; odd, so that views are aligned to elements only


def _dense(shape, axes):
    """Lay axes out in the order `axes`, slowest first."""
    in_memory = [shape[a] for a in axes]
    back = np.argsort(axes)
    return in_memory, lambda block: block.transpose(back)


def _contiguous(shape):
    return _dense(shape, range(len(shape)))


def _channels_last(shape):
    return _dense(shape, [0, *range(2, len(shape)), 1])


def _transposed(shape):
    return _dense(shape, [1, *range(len(shape) - 1, 1, -1), 0])


def _channel_slice(shape):
    """Channels 2 to C + 2 of C + 5, as blocks of dense networks write them."""
    return (shape[0], shape[1] + 5, *shape[2:]), lambda block: block[:, 2:-3]


def _channels_last_slice(shape):
    wide, back = _channels_last((shape[0], shape[1] + 5, *shape[2:]))
    return wide, lambda block: back(block)[:, 2:-3]


def _strided(shape):
    """Every second element of every axis."""
    return [2 * n for n in shape], lambda block: block[(slice(None, None, 2),) * len(shape)]


def _negative(shape):
    """All axes backwards."""
    return shape, lambda block: block[(slice(None, None, -1),) * len(shape)]


def _cropped(shape):
    """The inner part of a larger image: rows with gaps."""
    wide = (*shape[:2], *[n + 3 for n in shape[2:]])
    return wide, lambda block: block[(..., *[slice(1, -2)] * (len(shape) - 2))]


def _channels_last_negative(shape):
    wide, back = _channels_last(shape)
    return wide, lambda block: back(block)[:, ::-1, ::-1]


LAYOUTS = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "channel_slice": _channel_slice,
    "channels_last_slice": _channels_last_slice,
    "strided": _strided,
    "negative": _negative,
    "cropped": _cropped,
    "channels_last_negative": _channels_last_negative,
}


def allocate(shape, dtype, layout, fill):
    """Return (buffer, view): a flat buffer full of `fill`, and a view of `shape` inside it."""
    in_memory, view_of = LAYOUTS[layout](shape)
    size = int(np.prod(in_memory))
    buffer = np.full(size + 2 * GUARD, fill, dtype)
    view = view_of(buffer[GUARD : GUARD + size].reshape(in_memory))
    assert view.shape == tuple(shape)
    assert np.shares_memory(view, buffer) or not view.size
    return buffer, view


def laid_out(values, dtype, layout):
    """Return `values` as a view in `layout`, with NaN all around it: whoever reads those, shows it."""
    _, view = allocate(values.shape, dtype, layout, np.nan)
    view[...] = values
    return view


class Guarded:
    """An output to hand over as ``out=``: full of NaN, with guards around and between its elements."""

    SENTINEL = -12288.0  # exact in 16 bits, too

    def __init__(self, shape, dtype, layout):
        self._buffer, self.view = allocate(shape, dtype, layout, self.SENTINEL)
        self.view[...] = np.nan

    def result(self):
        """Return what was written, after checking that nothing else was."""
        values = self.view.copy()
        self.view[...] = self.SENTINEL
        touched = np.flatnonzero(self._buffer != self.SENTINEL)
        assert not touched.size, f"written outside out=: {touched.size} elements, at {touched[:8]}"
        return values


def label_of(op, case, arrays, algorithm, result):
    """Return what gave this result from x, w and dy: the algorithm, and the tile if it is Winograd's."""
    x, w, dy = arrays
    problem = {
        "conv": lambda: conv_problem(x, w, *case.arguments, out=result),
        "conv_input_grad": lambda: conv_input_grad_problem(case.x, w, dy, *case.arguments, out=result),
        "conv_weight_grad": lambda: conv_weight_grad_problem(x, case.w, dy, *case.arguments, out=result),
    }[op]()
    chosen = plan.plan_for(problem, op, algorithm)
    return plan.label(chosen.algorithm, chosen.variant)
