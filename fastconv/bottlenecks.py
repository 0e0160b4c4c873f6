"""What 1x1 convolutions in front of large ones save (Lin et al. 2014, Szegedy et al. 2015, He et al. 2016)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from fastconv.nn import basic, norm
from fastconv.nn.combine import Residual, Sequential
from fastconv.nn.conv import _Conv
from fastconv.nn.layer import Layer
from fastconv.summary import Row, Shape, summarize
from fastconv.tables import columns, human, power

__all__ = ["Bottleneck", "Bottlenecks", "find_bottlenecks"]


@dataclass(frozen=True)
class Bottleneck:
    """Convolutions with a reduction, and what would be in their place without it.

    Attributes
    ----------
    name : str
        Of the large convolution.
    kernel : str
        Its size, such as ``"3²"``.
    channels : tuple of int
        Of the input and behind each convolution.
    macs, parameters : int
        Of the convolutions with the reduction, for one image.
    direct_macs, direct_parameters : int
        Without it: one large convolution from the channels before to those behind; for a residual bottleneck (1x1,
        large, 1x1) the two large convolutions of a basic block between the same channels.
    """

    name: str
    kernel: str
    channels: tuple[int, ...]
    macs: int
    direct_macs: int
    parameters: int
    direct_parameters: int


@dataclass(frozen=True)
class Bottlenecks:
    """All of a network, with its own totals; ``print`` shows a table."""

    items: tuple[Bottleneck, ...]
    macs: int
    parameters: int

    @property
    def direct_macs(self) -> int:
        """Multiply-accumulates of the network without reductions, for one image."""
        return self.macs + sum(item.direct_macs - item.macs for item in self.items)

    @property
    def direct_parameters(self) -> int:
        """Parameters of the network without reductions."""
        return self.parameters + sum(item.direct_parameters - item.parameters for item in self.items)

    def __str__(self) -> str:
        if not self.items:
            return "no 1x1 convolution stands before a larger one"
        numbers = ("macs", "direct_macs", "parameters", "direct_parameters")
        shared = 0  # leading names that say nothing
        if len(self.items) > 1 and len({item.name.partition(".")[0] for item in self.items}) == 1:
            shared = self.items[0].name.index(".") + 1
        sums = [Bottleneck("sum of these", "", (), *(sum(getattr(item, key) for item in self.items)
                                                     for key in numbers)),
                Bottleneck("the network", "", (), *(getattr(self, key) for key in numbers))]
        head = ("convolution", "kernel", "channels", "MACs", "direct", "saves", "params", "direct", "saves")
        return "\n".join(columns([head, *(
            (name, item.kernel, "->".join(map(str, item.channels)),
             human(item.macs), human(item.direct_macs), _ratio(item.direct_macs, item.macs),
             human(item.parameters), human(item.direct_parameters), _ratio(item.direct_parameters, item.parameters))
            for name, item in [*((item.name[shared:], item) for item in self.items),
                               *((item.name, item) for item in sums)])], left=3))


def find_bottlenecks(model: Layer, input_shape: Shape) -> Bottlenecks:
    """Find the 1x1 reductions of a network and count what they save.

    A reduction is a 1x1 convolution straight before a larger one: nothing but normalisation, activation and dropout
    between them. All channels of groups of one are counted; grouped convolutions are left out.

    Parameters
    ----------
    model : Layer
        Any network; see `summarize`.
    input_shape : tuple of int
        (C, \\*spatial) without the batch.

    Returns
    -------
    Bottlenecks

    Raises
    ------
    ValueError
        Where a layer does not fit its input.

    Examples
    --------
    >>> print(find_bottlenecks(googlenet(), (3, 224, 224)))
    """
    summary = summarize(model, input_shape)
    rows = {row.name: row for row in summary.rows}
    names = {id(layer): name for name, layer in model.named_layers()}
    items = []
    for chain in _chains(model):
        convs = [(layer, rows[names[id(layer)]]) for layer in chain]
        index = 0
        while index < len(convs) - 1:
            used = 1
            if _is_residual_bottleneck(chain[index:index + 3]):
                used = 3
            elif _reduces(*chain[index:index + 2]):
                used = 2
            if used > 1:
                items.append(_compare(convs[index:index + used]))
            index += used
    return Bottlenecks(tuple(items), summary.macs, summary.parameters)


def _chains(layer: Layer) -> Iterator[list[_Conv]]:
    """Yield runs of convolutions that follow one another with only elementwise layers and norms between them."""
    chain: list[_Conv] = []
    for step in _steps(layer):
        if isinstance(step, _Conv):
            chain.append(step)
        elif not isinstance(step, _BETWEEN):
            yield chain
            chain = []
            yield from _inside(step)
    yield chain


def _steps(layer: Layer) -> Iterator[Layer]:
    """Layers of a `Sequential` in order, nested ones too."""
    if isinstance(layer, Sequential):
        for _, child in layer.children():
            yield from _steps(child)
    else:
        yield layer


def _inside(layer: Layer) -> Iterator[list[_Conv]]:
    """Chains of each path through a layer that is no `Sequential`."""
    paths = [layer.branch, layer.shortcut] if isinstance(layer, Residual) else [c for _, c in layer.children()]
    return itertools.chain.from_iterable(_chains(path) for path in paths)


_BETWEEN = (norm._BatchNorm, basic.ReLU, basic.LeakyReLU, basic.Tanh, basic.Sigmoid, basic.Dropout, basic.Identity)


def _is_residual_bottleneck(convs: list[_Conv]) -> bool:
    return (len(convs) == 3 and _reduces(*convs[:2]) and math.prod(convs[2].kernel_size) == 1
            and convs[2].groups == 1 and convs[1].out_channels < convs[2].out_channels)


def _reduces(first: _Conv, second: _Conv) -> bool:
    return (math.prod(first.kernel_size) == 1 < math.prod(second.kernel_size)
            and first.groups == second.groups == 1 and math.prod(first.stride) == 1)


def _compare(convs: list[tuple[_Conv, Row]]) -> Bottleneck:
    first, (large, row), last = convs[0][0], convs[1], convs[-1][0]
    ways = [(first.in_channels, large)]
    if len(convs) == 3:
        ways.append((last.out_channels, large))
    weights = sum(channels * last.out_channels * math.prod(conv.kernel_size) for channels, conv in ways)
    biases = sum(last.out_channels for _, conv in ways if conv.bias is not None)
    return Bottleneck(
        name=row.name.removesuffix(".conv"), kernel=power(large.kernel_size),
        channels=(first.in_channels, *(conv.out_channels for conv, _ in convs)),
        macs=sum(r.macs for _, r in convs), direct_macs=weights * math.prod(row.shape[1:]),
        parameters=sum(r.parameters for _, r in convs), direct_parameters=weights + biases)


def _ratio(direct: int, reduced: int) -> str:
    ratio = direct / reduced
    return f"{ratio:.1f}x" if ratio >= 9.95 else f"{ratio:.2f}x"
