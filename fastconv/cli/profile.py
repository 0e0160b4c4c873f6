"""`fastconv profile`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastconv.cli.arguments import UserError, add_threads, integer, set_threads
from fastconv.cli.network import add_batch, add_network, create_network, random_batch
from fastconv.config import thread_reason

__all__ = ["HELP", "add_arguments", "run"]

HELP = "time each layer of a network; which algorithms run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = "Time each layer of a network with random weights on a random batch, the fastest of some runs."
    add_network(parser)
    add_batch(parser)
    add = parser.add_argument
    add("--train", action="store_true", help="time forward and backward passes of training; otherwise inference")
    add("--repeats", type=integer(1), default=5, metavar="N", help="number of runs (%(default)s)")
    add("--depth", type=integer(1), metavar="N", help="levels of names to show (as many as fit 60 lines)")
    add("--trace", type=Path, metavar="FILE", help="write a timeline for chrome://tracing or ui.perfetto.dev (JSON)")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    from fastconv.profiling import profile
    from fastconv.tables import count, fitting_depth

    set_threads(args)
    network = create_network(args)
    try:
        result = profile(network.model, random_batch(args, network), train=args.train, repeats=args.repeats)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise UserError(error) from error
    size = "x".join(map(str, network.input_shape))
    what = "training" if args.train else "inference"
    print(f"{network.title}, batch of {args.batch} of {size}, {what}, fastest of {count(args.repeats, 'run')}; "
          f"threads {thread_reason()}\n")
    print(result.table(args.depth or fitting_depth(result.rows)))
    if args.trace is not None:
        try:
            result.save_trace(args.trace)
        except OSError as error:
            raise UserError(error) from error
        print(f"timeline of the fastest run in {args.trace}; open it in chrome://tracing or ui.perfetto.dev")
    return 0
