"""Networks of ReLUs and max pools are smooth in pieces; here is how two of them are compared on the same one.

A unit within rounding of zero may be open in one network and closed in the other, an element may be the largest of its
window in one alone. That is no error, but the gradients of the two differ there by all that this unit contributes: by
how much depends on how few units there are, not on the precision. `chosen_by_fastconv` therefore notes what fastconv's
network chose, with its fused kernels as they are, and `as_chosen` makes PyTorch's network choose the same, so that what
is left is rounding, of which bounds are known. PyTorch's own choices are compared with those imposed: a unit whose
choice differs must be within rounding of its kink.
"""

from __future__ import annotations

import contextlib

import torch

from fastconv.nn import basic, combine, conv, norm, pool


@contextlib.contextmanager
def chosen_by_fastconv():
    """Note, in the order of the forward passes in the context, the open units of each ReLU, the picks of each pool."""
    chosen = []

    def noting(cls, method, note):
        original = getattr(cls, method)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            note(result, *args, **kwargs)
            return result

        return cls, method, wrapped

    def fused(result, *args, relu=False, **kwargs):
        if relu:
            chosen.append((result[0] if isinstance(result, tuple) else result) > 0)

    def picked(result, layer, x, out=None):  # indices, which the layer may have found no need for
        chosen.append(layer._pool(x, True, None)[1])

    wrappers = [noting(basic.ReLU, "forward", lambda result, *args: chosen.append(result[0] > 0)),
                noting(conv._Conv, "forward", fused), noting(norm._BatchNorm, "forward", fused),
                noting(combine, "_add", fused), noting(pool._MaxPool, "forward", picked)]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in wrappers]
    for owner, name, wrapper in wrappers:
        setattr(owner, name, wrapper)
    try:
        yield chosen
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


class AsChosen:
    """PyTorch's ReLUs and max pools, choosing what is given; see `as_chosen`."""

    def __init__(self, chosen):
        self.left = list(reversed(chosen))
        self.gaps = []
        """For each ReLU and pool what its input would have to change by to choose otherwise, where it did: the
        distance to zero, or from the largest element to the one that was picked."""
        self.inputs = []
        """For each ReLU and pool its input."""

    def relu(self, x, inplace=False):
        open_units = torch.tensor(self.left.pop())
        assert open_units.dtype == torch.bool and open_units.shape == x.shape
        y = x.detach()
        self.gaps.append(y[(y > 0) != open_units].abs())
        self.inputs.append(y)
        return x * open_units

    def max_pool(self, original, x, *args, **kwargs):
        indices = torch.tensor(self.left.pop())
        y = x.flatten(2).gather(2, indices.flatten(2)).reshape(indices.shape)
        largest = original(x.detach(), *args, **kwargs)
        assert indices.dtype == torch.int64 and largest.shape == y.shape
        gap = largest - y.detach()
        self.gaps.append(gap[gap > 0])
        self.inputs.append(x.detach())
        return y


@contextlib.contextmanager
def as_chosen(chosen):
    """Make PyTorch's ReLUs and max pools choose what was noted, in the same order; all must be used up."""
    functional = torch.nn.functional
    choices = AsChosen(chosen)
    names = ["relu", "max_pool1d", "max_pool2d", "max_pool3d"]
    originals = {name: getattr(functional, name) for name in names}

    def replacement(name):
        if name == "relu":
            return choices.relu
        return lambda *args, **kwargs: choices.max_pool(originals[name], *args, **kwargs)

    for name in names:
        setattr(functional, name, replacement(name))
    try:
        yield choices
    finally:
        for name, original in originals.items():
            setattr(functional, name, original)
    assert not choices.left


def sizes_of_errors(exact, moved, share):
    """For each ReLU and pool, the size that rounding errors of its input are relative to.

    It is the rms of what noise of `share` moves them by, over `share`, or that of the input if larger; `exact` and
    `moved` are the choices of a network without and with the noise.
    """
    return [max(float((y - x).square().mean().sqrt()) / share, float(x.square().mean().sqrt()))
            for x, y in zip(exact.inputs, moved.inputs, strict=True)]


def assert_same_piece(choices, sizes, bound):
    """Fail unless all choices that differ are within rounding of a kink: `bound` times `sizes`."""
    for number, (gap, size) in enumerate(zip(choices.gaps, sizes, strict=True)):
        # two elements of a window may both be off
        assert not len(gap) or gap.max() <= 2 * bound * size, (
            f"ReLU or pool {number} chose otherwise {float(gap.max()):.3g} away from a kink, where rounding errors are "
            f"{bound * size:.3g}")
