"""`fastconv tune`."""

from __future__ import annotations

import argparse

import numpy as np

from fastconv.cli.arguments import UserError, add_threads, set_threads
from fastconv.cli.network import add_batch, add_network, create_network, random_batch
from fastconv.config import thread_reason

__all__ = ["HELP", "add_arguments", "run"]

HELP = "time the algorithms for each convolution of a network and keep the fastest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.description = (
        "Time every algorithm that can run each convolution of a network, and keep the choices in a file, which "
        "fastconv.config(tune=True) and FASTCONV_TUNE=1 read."
    )
    add_network(parser)
    add_batch(parser)
    parser.add_argument("--train", action="store_true",
                        help="forward and backward passes of training; otherwise inference")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    """Run the network once and print what was chosen."""
    import fastconv
    from fastconv import tune

    set_threads(args)
    network = create_network(args)
    size = "x".join(map(str, network.input_shape))
    print(f"{network.title}, batch of {args.batch} of {size}, {'training' if args.train else 'inference'}; "
          f"threads {thread_reason()}\n", flush=True)
    with fastconv.config(tune=True):
        try:
            x = random_batch(args, network)
            if args.train:
                y, backward = network.model.forward(x)
                backward(tuple(map(np.zeros_like, y)) if isinstance(y, tuple) else np.zeros_like(y))
            else:
                network.model(x)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise UserError(error) from error
    print(tune.table(tune.choices()))
    print(f"\nkept in {tune.cache_file()}; config(tune=True) or FASTCONV_TUNE=1 uses it")
    return 0
