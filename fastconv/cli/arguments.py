"""What the commands share: parsers of options, and the error that is shown in one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

import fastconv

__all__ = ["Parser", "UserError", "add_threads", "fraction", "integer", "positive", "set_threads"]


class UserError(Exception):
    """Something that the user can put right; shown without a traceback."""


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}. Hint: {self.prog} --help\n")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=integer(1), help="at most so many (see fastconv info)")


def set_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        fastconv.set_num_threads(args.threads)


def integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is given, but an integer of at least {least} is needed")
        return value

    return parse


def positive(text: str) -> float:
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is given, but a number above 0 is needed")
    return value


def fraction(text: str) -> float:
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given, but 0 <= fraction < 1 is needed")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
