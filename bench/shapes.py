"""The rows of shapes.toml, checked; and rows drawn at random."""

from __future__ import annotations

import fnmatch
import math
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).with_name("shapes.toml")
CONVS = ("conv", "conv_transpose")
POOLS = ("max_pool", "avg_pool", "global_avg_pool")
MOST_RANDOM_MACS = 3_000_000_000  # larger draws are drawn again: they would take most of the time

_PER_AXIS = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}  # least value
_NUMBERS = {"batch": 1, "channels": 1, "out_channels": 1, "groups": 1}


@dataclass(frozen=True)
class Row:
    """One layer. Pools have out_channels = channels; global pools a kernel as large as their input."""

    name: str
    kind: str  # its class: "3x3s1", "pooling", ...
    op: str
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    networks: tuple[str, ...]

    @property
    def ndim(self) -> int:
        return len(self.size)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Of the weight; empty for pools."""
        if self.op == "conv":
            return (self.out_channels, self.channels // self.groups, *self.kernel)
        if self.op == "conv_transpose":
            return (self.channels, self.out_channels // self.groups, *self.kernel)
        return ()

    @property
    def y_shape(self) -> tuple[int, ...]:
        axes = zip(
            self.size, self.kernel, self.stride, self.padding, self.dilation, self.output_padding,
            strict=True,
        )
        if self.op == "conv_transpose":
            out = [(n - 1) * s - 2 * p + d * (k - 1) + 1 + extra for n, k, s, p, d, extra in axes]
        else:
            out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in axes]
        return (self.batch, self.out_channels, *out)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the direct algorithm, those with padded zeros included; 0 for pools."""
        if self.op in POOLS:
            return 0
        positions = self.size if self.op == "conv_transpose" else self.y_shape[2:]
        return self.batch * math.prod(self.w_shape) * math.prod(positions)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What follows (input, weight, bias), or a pool's input, in PyTorch's functions and fastconv's alike."""
        return {
            "conv": (self.stride, self.padding, self.dilation, self.groups),
            "conv_transpose": (
                self.stride, self.padding, self.output_padding, self.groups, self.dilation,
            ),
            "max_pool": (self.kernel, self.stride, self.padding, self.dilation),
            "avg_pool": (self.kernel, self.stride, self.padding),
            "global_avg_pool": (),
        }[self.op]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_row(name: str, kind: str, entry: Mapping[str, Any]) -> Row:
    """Check one entry of the table and fill in its defaults.

    Raises
    ------
    ValueError
        With the row's name and the key that is missing, unknown or out of range.
    """
    entry = dict(entry)
    where = f"shapes: row {name!r} of class {kind!r}"
    op = entry.pop("op", "conv")
    if op not in CONVS + POOLS:
        raise ValueError(f"{where}: op is {op!r}, but one of {', '.join(CONVS + POOLS)} is needed")
    needed = {"conv": {"out_channels", "kernel"}, "conv_transpose": {"out_channels", "kernel"}}
    for key in {"channels", "size", "networks"} | needed.get(op, set()):
        if key not in entry:
            raise ValueError(f"{where}: {key} is missing")
    size = tuple(entry.pop("size"))
    if not 1 <= len(size) <= 3 or not all(_at_least(n, 1) for n in size):
        raise ValueError(f"{where}: size is {size}, but 1 to 3 positive integers are needed")
    networks = tuple(entry.pop("networks"))
    if op == "global_avg_pool":
        entry.setdefault("kernel", list(size))
    values: dict[str, Any] = {}
    for key, least in _PER_AXIS.items():
        given = entry.pop(key, least)
        axes = tuple(given) if isinstance(given, Sequence) else (given,) * len(size)
        if len(axes) != len(size) or not all(_at_least(n, least) for n in axes):
            raise ValueError(
                f"{where}: {key} is {given}, but {len(size)} integers of at least {least} are needed"
            )
        values[key] = axes
    entry.setdefault("out_channels", entry["channels"])
    for key, least in _NUMBERS.items():
        values[key] = entry.pop(key, least)
        if not _at_least(values[key], least):
            raise ValueError(f"{where}: {key} is {values[key]!r}, but an integer of at least {least} is needed")
    if entry:
        raise ValueError(f"{where}: {', '.join(entry)} is not known")
    row = Row(name=name, kind=kind, op=op, size=size, networks=networks, **values)
    for key in ("channels", "out_channels"):
        if values[key] % row.groups:
            raise ValueError(f"{where}: {key} is {values[key]}, which groups={row.groups} does not divide")
    if op in POOLS and row.out_channels != row.channels:
        raise ValueError(f"{where}: a pool keeps its channels, so out_channels cannot be {row.out_channels}")
    if min(row.y_shape) < 1:
        raise ValueError(f"{where}: the output {row.y_shape} is empty")
    return row


def _at_least(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def load(path: Path = SHAPES) -> list[Row]:
    """Read and check the table; names are unique over all classes."""
    with path.open("rb") as file:
        table = tomllib.load(file)
    rows = [make_row(name, kind, entry) for kind, rows in table.items() for name, entry in rows.items()]
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"shapes: {name!r} names {names.count(name)} rows")
    return rows


def select(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """Rows whose name or class matches one of the patterns (``*`` and ``?`` as in a shell).

    Raises
    ------
    ValueError
        If a pattern matches nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {r.name for r in rows if r.kind == pattern or fnmatch.fnmatch(r.name, pattern)}
        if not found:
            kinds = dict.fromkeys(row.kind for row in rows)
            raise ValueError(f"--only: no row and no class is called {pattern!r}. Hint: classes are {', '.join(kinds)}")
        chosen |= found
    return [row for row in rows if row.name in chosen]


def draw(count: int, seed: int) -> list[Row]:
    """Convolutions that nobody tuned for: channels 3 to 512 (log-uniform), maps of 5 to 200, kernels 1 to 7."""
    rng = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < count:
        kernel = rng.choice((1, 3, 5, 7))
        channels, out_channels = (round(math.exp(rng.uniform(math.log(3), math.log(512)))) for _ in range(2))
        size = [rng.randint(5, 200) for _ in range(2)]
        stride = rng.choice((1, 1, 2))
        padding = rng.choice((0, kernel // 2))
        if min(size) + 2 * padding < kernel:
            continue
        name = f"{channels}-{out_channels}_{kernel}x{kernel}s{stride}p{padding}_{size[0]}x{size[1]}"
        row = make_row(
            name, "random",
            {"channels": channels, "out_channels": out_channels, "size": size, "kernel": kernel,
             "stride": stride, "padding": padding, "networks": []},
        )
        if row.macs <= MOST_RANDOM_MACS:
            rows.append(row)
    return rows
