"""`fastconv profile`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fastconv.cli.arguments import UserError, add_device, add_threads, integer, set_threads
from fastconv.cli.network import add_network, create_network
from fastconv.config import thread_reason

__all__ = ["HELP", "add_arguments", "run"]

HELP = "time each layer of a network; which algorithms run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = "Time each layer of a network with random weights on a random batch, the fastest of some runs."
    add_network(parser)
    add = parser.add_argument
    add("--batch", type=integer(1), default=1, metavar="N", help="number of images (%(default)s)")
    add("--train", action="store_true", help="time forward and backward passes of training; otherwise inference")
    add("--channels-last", action="store_true", help="give the images in channels-last order")
    add("--repeats", type=integer(1), default=5, metavar="N", help="number of runs (%(default)s)")
    add("--depth", type=integer(1), metavar="N", help="levels of names to show (as many as fit 60 lines)")
    add("--trace", type=Path, metavar="FILE", help="write a timeline for chrome://tracing or ui.perfetto.dev (JSON)")
    add_device(parser)
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    from fastconv import to_channels_last
    from fastconv.arrays import to_device
    from fastconv.profiling import profile
    from fastconv.tables import count, fitting_depth

    set_threads(args)
    network = create_network(args)
    x = np.random.default_rng(0).standard_normal((args.batch, *network.input_shape), np.float32)
    if args.channels_last:
        x = to_channels_last(x)
    try:
        if args.device == "cuda":
            network.model.to("cuda")
            x = to_device(x)
        result = profile(network.model, x, train=args.train, repeats=args.repeats)
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
