"""Passes of a convolution as lattices, the one form that the compiled kernels know (fc_lattice in csrc/fastconv.h):

    out[n, k, o] = sum over taps t, channels c of in[n, c, o * step + tap_at[t]] * w[k, c, t]

The forward pass is one lattice. In the data gradient at stride s, element i of dx meets tap t only if
i + pad - t * dilation is divisible by s, so the elements with the same i mod s (a phase) meet the same taps, and each
phase is a convolution of dy at step 1. In one dimension, kernel 3, stride 2, padding 1:

    dx[0] dx[2] dx[4] …   tap 1             phase 0: taps {1}
    dx[1] dx[3] dx[5] …   taps 0 and 2      phase 1: taps {0, 2}

No zeros are inserted and nothing is scattered.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any, NamedTuple

from fastconv.problem import ConvProblem


class Lattice(NamedTuple):
    """See fc_lattice in csrc/fastconv.h; channels are those of one group, strides are in elements."""

    batch: int
    groups: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    step: tuple[int, ...]
    tap_at: tuple[tuple[int, ...], ...]
    tap_w: tuple[int, ...]
    in_strides: tuple[int, ...]
    out_strides: tuple[int, ...]
    in_offset: int
    out_offset: int
    w_strides: tuple[int, int, int]


def forward(p: ConvProblem) -> Lattice:
    """The lattice of y, and with dy in the place of y that of the weight gradient."""
    taps = list(itertools.product(*map(range, p.kernel)))
    per_group = p.out_channels // p.groups
    return Lattice(
        batch=p.batch, groups=p.groups, in_channels=p.in_channels // p.groups, out_channels=per_group,
        in_size=p.in_size, out_size=p.out_size, step=p.stride,
        tap_at=tuple(tuple(t * d - lo for t, d, lo in zip(tap, p.dilation, p.pad_lo, strict=True)) for tap in taps),
        tap_w=tuple(_dot(tap, p.w_strides[2:]) for tap in taps),
        in_strides=p.x_strides, out_strides=p.y_strides, in_offset=0, out_offset=0,
        w_strides=(per_group * p.w_strides[0], p.w_strides[0], p.w_strides[1]))


def swapped(p: ConvProblem) -> Lattice:
    """The lattice of the weight gradient of a 1x1 convolution at step 1, with x and dy in each other's place."""
    return forward(p)._replace(
        in_channels=p.out_channels, out_channels=p.in_channels, in_strides=p.y_strides, out_strides=p.x_strides,
        w_strides=(0, p.w_strides[1], p.w_strides[0]))


def depth_slices(lattice: Lattice) -> tuple[Lattice, ...]:
    """A lattice for the taps at each depth."""
    slices: dict[int, list[int]] = {}
    for i, at in enumerate(lattice.tap_at):
        slices.setdefault(at[0], []).append(i)
    return tuple(
        lattice._replace(tap_at=tuple(lattice.tap_at[i] for i in taps), tap_w=tuple(lattice.tap_w[i] for i in taps))
        for taps in slices.values())


def linear(lattice: Lattice) -> Lattice:
    """A lattice with one output per image and no padding as one whose pixels are the images, where strides allow.

    Fully connected layers, and kernels as large as their input, are products of matrices; image by image they would
    read all weights for each.
    """
    taps, n = lattice.tap_at, len(lattice.tap_at)
    if lattice.out_size != (1, 1, 1) or lattice.batch == 1 or not n or not all(
            0 <= at < size for tap in taps for at, size in zip(tap, lattice.in_size, strict=True)):
        return lattice
    at = [_dot(tap, lattice.in_strides[2:]) for tap in taps]
    step = at[1] - at[0] if n > 1 else 0
    w_step = lattice.tap_w[1] - lattice.tap_w[0] if n > 1 else 0
    if at != [at[0] + i * step for i in range(n)]:
        return lattice
    in_batch, in_channel = lattice.in_strides[:2]
    out_batch, out_channel = lattice.out_strides[:2]
    pixels = lattice._replace(
        batch=1, in_size=(1, n, lattice.batch), out_size=(1, 1, lattice.batch), step=(1, 1, 1),
        tap_at=tuple((0, i, 0) for i in range(n)), in_offset=lattice.in_offset + at[0],
        in_strides=(0, in_channel, 0, step, in_batch), out_strides=(0, out_channel, 0, 0, out_batch))
    if n > 1 and in_channel == n * step and lattice.w_strides[2] == n * w_step and lattice.tap_w == tuple(
            lattice.tap_w[0] + i * w_step for i in range(n)):  # taps are inner channels, in memory and in the weights
        return pixels._replace(
            in_channels=n * lattice.in_channels, in_size=(1, 1, lattice.batch), tap_at=((0, 0, 0),),
            tap_w=lattice.tap_w[:1], in_strides=(0, step, 0, 0, in_batch), w_strides=(*lattice.w_strides[:2], w_step))
    return pixels


def linear_input_grad(p: ConvProblem) -> Lattice | None:
    """The data gradient of a kernel as large as its input, whose taps lie in dx as they do in the weights, as the
    product of dy and weights; None for others."""
    taps = tuple(_dot(tap, p.x_strides[2:]) for tap in itertools.product(*map(range, p.kernel)))
    dilated = any(d > 1 and n > 1 for d, n in zip(p.dilation, p.kernel, strict=True))
    if (p.out_size != (1, 1, 1) or p.kernel != p.in_size or p.batch == 1 or p.groups > 1 or any(p.pad_lo + p.pad_hi)
            or dilated or taps != tuple(range(len(taps)))
            or (p.in_channels > 1 and p.x_strides[1] != len(taps)) or p.w_strides[1:] != p.x_strides[1:]):
        return None
    return Lattice(
        batch=1, groups=1, in_channels=p.out_channels, out_channels=p.in_channels * len(taps),
        in_size=(1, 1, p.batch), out_size=(1, 1, p.batch), step=(1, 1, 1), tap_at=((0, 0, 0),), tap_w=(0,),
        in_strides=(0, p.y_strides[1], 0, 0, p.y_strides[0]), out_strides=(0, 1, 0, 0, p.x_strides[0]), in_offset=0,
        out_offset=0, w_strides=(p.out_channels * p.w_strides[0], 1, p.w_strides[0]))


def input_grad(p: ConvProblem) -> tuple[tuple[Lattice, ...], bool]:
    """The lattices of dx, one for each phase that meets any tap, and whether they cover all of dx."""
    axes = [_phases_of_axis(*sizes) for sizes in
            zip(p.in_size, p.kernel, p.stride, p.dilation, p.pad_lo, strict=True)]
    per_group = p.out_channels // p.groups
    lattices = []
    for phases in itertools.product(*axes):
        first = [phase for phase, _ in phases]
        taps = list(itertools.product(*(taps for _, taps in phases)))
        lattices.append(Lattice(
            batch=p.batch, groups=p.groups, in_channels=per_group, out_channels=p.in_channels // p.groups,
            in_size=p.out_size,
            out_size=tuple(-(-(n - f) // s) for n, f, s in zip(p.in_size, first, p.stride, strict=True)),
            step=(1, 1, 1),
            tap_at=tuple(tuple(at for _, at in tap) for tap in taps),
            tap_w=tuple(_dot([t for t, _ in tap], p.w_strides[2:]) for tap in taps),
            in_strides=p.y_strides,
            out_strides=_times(p.x_strides, p.stride),
            in_offset=0, out_offset=_dot(first, p.x_strides[2:]),
            w_strides=(per_group * p.w_strides[0], p.w_strides[1], p.w_strides[0])))
    covered = math.prod(len(phases) == min(s, n) for phases, s, n in zip(axes, p.stride, p.in_size, strict=True))
    return tuple(lattices), bool(covered)


def width_phases(p: ConvProblem) -> int:
    """How many neighbours among the lattices of `input_grad` write the same rows: the phases along the width."""
    return len(_phases_of_axis(p.in_size[2], p.kernel[2], p.stride[2], p.dilation[2], p.pad_lo[2]))


def interleaved_input_grad(p: ConvProblem) -> tuple[tuple[Lattice, ...], ...]:
    """The lattices of dx for one input channel and a kernel of whole strides, so that all phases along the width meet
    as many taps: `stride` neighbours are output channels of one lattice, which read the same dy.

    In one dimension, kernel 4, stride 2, padding 1:

        dx[0]     tap 1 3                       a lattice of its own, for what begins before 0 or ends behind the last
        dx[1:3]   taps 0 2 of channel 0         x + padding = 2 g + channel, and tap t = 2 j + channel meets dy[g - j]
        dx[3:5]   taps 1 3 of channel 1

    Returns
    -------
    tuple
        Sets of lattices that write the same rows: one of several channels, or some of one. Empty for others.
    """
    n, kernel, stride, pad = p.in_size[2], p.kernel[2], p.stride[2], p.pad_lo[2]
    first = -pad % stride
    groups = (n - first) // stride
    if p.in_channels != 1 or stride == 1 or p.dilation[2] != 1 or kernel % stride or groups < stride:
        return ()
    step, sets = p.w_strides[4], []
    outer = replace(p, in_size=(*p.in_size[:2], 1), kernel=(*p.kernel[:2], 1), stride=(*p.stride[:2], 1),
                       pad_lo=(*p.pad_lo[:2], 0))
    for rows in input_grad(outer)[0]:
        def at(x: int, size: int, channels: int, rows: Lattice = rows) -> Lattice:
            begin = (x + pad) // stride
            taps = range((x + pad) % stride, kernel, stride)
            return rows._replace(
                out_channels=channels, out_size=(*rows.out_size[:2], size),
                tap_at=tuple((*outside[:2], begin - j) for outside in rows.tap_at for j in range(len(taps))),
                tap_w=tuple(w + t * step for w in rows.tap_w for t in taps),
                out_strides=(rows.out_strides[0], p.x_strides[4], *rows.out_strides[2:4], stride * p.x_strides[4]),
                out_offset=rows.out_offset + x * p.x_strides[4],
                w_strides=(rows.w_strides[0], step, rows.w_strides[2]))
        end = first + groups * stride
        sets += [(at(first, groups, stride),), tuple(at(x, 1, 1) for x in range(first)),
                 tuple(at(x, 1, 1) for x in range(end, n))]
    return tuple(lattices for lattices in sets if lattices)


def _times(strides: tuple[int, ...], factors: tuple[int, ...]) -> tuple[int, ...]:
    return (*strides[:2], *(s * f for s, f in zip(strides[2:], factors, strict=True)))


def _phases_of_axis(n: int, kernel: int, stride: int, dilation: int, pad: int) -> list[tuple[int, list[Any]]]:
    """(phase, [(tap, position of dy relative to the index within the phase), …]) for each phase that meets a tap."""
    met: dict[int, list[Any]] = {}
    for t in range(kernel):
        phase = (t * dilation - pad) % stride
        if phase < n:
            met.setdefault(phase, []).append((t, (phase + pad - t * dilation) // stride))
    return sorted(met.items())


def _dot(a: tuple[int, ...] | list[int], b: tuple[int, ...]) -> int:
    return sum(x * y for x, y in zip(a, b, strict=True))
