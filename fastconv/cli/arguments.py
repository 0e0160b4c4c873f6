"""What the commands share: parsers of options, and the error that is shown in one line."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any, NoReturn

import fastconv

__all__ = ["Parser", "UserError", "add_options", "add_threads", "fraction", "integer", "positive", "set_threads"]


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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the option for what a network's function takes beside channels, classes and size."""
    parser.add_argument("--options", type=_option, nargs="+", metavar="NAME=VALUE",
                        help="of the network, such as width=0.5 stem=small")


def _option(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"{word!r} is given, but NAME=VALUE is needed")
    try:
        return name, json.loads(text)  # numbers, true, false, null, [lists]
    except ValueError:
        return name, text


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, which has no default: what is not given is "cpu", or what a checkpoint says."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (cpu); cuda needs CuPy and a GPU")


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
