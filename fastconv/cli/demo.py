"""`fastconv demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastconv.cli.arguments import UserError, add_threads, integer, set_threads

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train LeNet-5 on real digits, measure it and draw pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train LeNet-5 on scikit-learn's digits, measure every layer, and draw pictures."
    parser.add_argument("--out", type=Path, default=Path("fastconv-demo"), help="folder for pictures (%(default)s)")
    parser.add_argument("--epochs", type=integer(1), default=12, help="passes over the digits (%(default)s)")
    parser.add_argument("--seed", type=integer(0), default=0, help="of weights and order (%(default)s)")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    set_threads(args)
    try:
        from fastconv import demo

        demo.run(args.out, epochs=args.epochs, seed=args.seed)
    except (ImportError, OSError) as error:
        raise UserError(error) from error
    return 0
