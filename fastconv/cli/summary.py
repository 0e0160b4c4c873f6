"""`fastconv summary`."""

from __future__ import annotations

import argparse

import numpy as np

from fastconv.cli.arguments import UserError, integer
from fastconv.cli.network import Zeros, add_network, create_network

__all__ = ["HELP", "add_arguments", "run"]

HELP = "layers of a network: shapes, parameters, operations, memory, receptive fields"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Show what a network is made of; nothing is computed. Numbers are for one image; a multiply-accumulate (MAC) "
        "counts as two floating-point operations (FLOP)."
    )
    add_network(parser)
    add = parser.add_argument
    add("--depth", type=integer(1), metavar="N", help="levels of names to show (as many as fit 60 lines)")
    add("--memory", action="store_true", help="what a step of training takes at most (SGD with momentum)")
    add("--batch", type=integer(1), default=8, metavar="N", help="images of that step (8)")
    add("--bottlenecks", action="store_true", help="what 1x1 convolutions before larger ones save")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from fastconv.bottlenecks import find_bottlenecks
    from fastconv.summary import summarize
    from fastconv.tables import fitting_depth

    network = create_network(args, Zeros(np.random.PCG64(0)))
    try:
        summary = summarize(network.model, network.input_shape, network.title, memory=args.memory, batch=args.batch)
    except ValueError as error:
        raise UserError(error) from error
    if args.bottlenecks:
        size = "x".join(map(str, network.input_shape))
        print(f"{network.title}, input {size}: 1x1 convolutions before larger ones, against direct ones\n")
        print(find_bottlenecks(network.model, network.input_shape))
        return 0
    depth = args.depth or fitting_depth(summary.rows)
    print(summary.table(depth))
    return 0
