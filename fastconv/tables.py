"""Tables of layers as text: columns, numbers that can be read, and an outline by dotted names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

__all__ = ["Named", "Node", "columns", "count", "fitting_depth", "human", "outline", "power"]


class Named(Protocol):
    """Anything with the dotted name of a layer."""

    @property
    def name(self) -> str:
        """Such as ``"layer1.0.conv1"``."""


R = TypeVar("R", bound=Named)


@dataclass(frozen=True)
class Node(Generic[R]):
    """A line of an outline.

    Attributes
    ----------
    name : str
        Dotted name.
    level : int
        Number of parts before the last one.
    members : list
        The rows of this name and of those below it.
    hidden : bool
        Whether there are lines below it that the outline leaves out.
    """

    name: str
    level: int
    members: list[R]
    hidden: bool

    @property
    def label(self) -> str:
        """The last part of the name, indented by its level."""
        return "  " * self.level + self.name.rpartition(".")[2]


def outline(rows: Sequence[R], depth: int | None = None, level: int = 0) -> Iterator[Node[R]]:
    """Arrange rows by the parts of their names, each group of neighbours under a line of its own.

    Parameters
    ----------
    rows : sequence of Named
        In the order of the table.
    depth : int, optional
        Number of levels that get lines; all if left out.
    level : int
        Number of parts that all names share; for the recursion.
    """
    for name, group in itertools.groupby(rows, key=lambda row: ".".join(row.name.split(".")[:level + 1])):
        members = list(group)
        inner = [row for row in members if row.name != name]
        shown = depth is None or level + 1 < depth
        yield Node(name, level, members, bool(inner) and not shown)
        if inner and shown:
            yield from outline(inner, depth, level + 1)


def fitting_depth(rows: Sequence[R], lines: int = 60) -> int:
    """Return the largest depth whose outline has at most `lines` lines, but at least 1."""
    levels = [node.level for node in outline(rows)]
    fitting = [depth for depth in range(1, max(levels, default=0) + 2)
               if sum(level < depth for level in levels) <= lines]
    return max(fitting, default=1)


def columns(lines: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Lines of cells in columns, the first `left` of them aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]


def power(sizes: Sequence[int]) -> str:
    """Sizes along axes: "7x5", but "7²" where all are equal."""
    if len(sizes) in _POWERS and len(set(sizes)) == 1:
        return f"{sizes[0]}{_POWERS[len(sizes)]}"
    return "x".join(map(str, sizes))


_POWERS = {2: "²", 3: "³"}


def human(number: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: ``human(1849688064)`` is "1.85 G", ``human(61706, "B")`` "61.7 kB"."""
    prefixes = iter(("", "k", "M", "G", "T"))
    prefix = next(prefixes)
    while abs(number) >= 999.5 and prefix != "T":
        number, prefix = number / 1000, next(prefixes)
    whole = not prefix and number == int(number)
    digits = 0 if whole or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f} {prefix}{unit}".rstrip()


def count(number: int, noun: str) -> str:
    """Number and noun: "1 thread", "2 threads"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
