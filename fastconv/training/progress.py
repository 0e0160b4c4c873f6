"""A progress report that suits where it goes: one rewritten line on a terminal, a line per epoch in a log."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

__all__ = ["Progress"]

_BAR_WIDTH = 24
_SECONDS_BETWEEN_REDRAWS = 0.1


class Progress:
    """Shows the steps of an epoch while they run and keeps one line of each finished epoch.

    On a terminal or in a notebook the line of the running epoch is rewritten in place, at most ten
    times a second; elsewhere (log file, pipe) only finished epochs are written, without carriage
    returns. Use it as a context manager, so that an interrupted line is ended before the next output.

    Parameters
    ----------
    epochs
        Number of the last epoch, for "epoch 3/10".
    stream
        Where to write; standard output by default.
    """

    def __init__(self, epochs: int, stream: TextIO | None = None) -> None:
        self._epochs = epochs
        self._stream = sys.stdout if stream is None else stream
        in_notebook = type(self._stream).__module__.startswith("ipykernel")
        self._rewrites = in_notebook or self._stream.isatty()
        self._drawn = 0  # characters of the unfinished line on the screen
        self._last_draw = 0.0
        self._started = (0, 0, 0.0)  # the running epoch, the first step of it that was seen, and when

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = 0

    def step(self, epoch: int, done: int, total: int, note: str = "") -> None:
        """Report that `done` of the `total` steps of `epoch` (counted from 1) have run."""
        now = time.monotonic()
        if self._started[0] != epoch:
            self._started = (epoch, done, now)
        if not self._rewrites or (done < total and now - self._last_draw < _SECONDS_BETWEEN_REDRAWS):
            return
        self._last_draw = now
        filled = _BAR_WIDTH * done // total
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        _, first, start = self._started
        left = f"  {(now - start) / (done - first) * (total - done):.0f} s left" if first < done < total else ""
        self._rewrite(f"{self._head(epoch)} [{bar}] {done}/{total}{left}  {note}")

    def epoch(self, epoch: int, summary: str) -> None:
        """Write the lasting line of a finished epoch."""
        line = f"{self._head(epoch)}  {summary}"
        if self._rewrites:
            line = "\r" + line.ljust(self._drawn)
        self._stream.write(line + "\n")
        self._stream.flush()
        self._drawn = 0

    def _head(self, epoch: int) -> str:
        return f"epoch {epoch:{len(str(self._epochs))}}/{self._epochs}"

    def _rewrite(self, line: str) -> None:
        # A line that wraps could not be rewritten: the carriage return only goes to its last row.
        line = line[: shutil.get_terminal_size().columns - 1]
        self._stream.write("\r" + line.ljust(self._drawn))
        self._stream.flush()
        self._drawn = len(line)
