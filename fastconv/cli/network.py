"""Options of the commands that take a network by its name: which network, and for which input."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fastconv.arrays import Array, to_channels_last, to_device
from fastconv.cli.arguments import UserError, add_device, add_options, integer
from fastconv.nn.layer import Layer

__all__ = ["Network", "Zeros", "add_batch", "add_network", "create_network", "random_batch"]


class Network:
    """The network and the input that the options ask for.

    Attributes
    ----------
    title : str
        Name, and the options that were given.
    input_shape : tuple of int
        (C, \\*spatial).
    model : Layer
    """

    def __init__(self, title: str, input_shape: tuple[int, ...], model: Layer) -> None:
        self.title = title
        self.input_shape = input_shape
        self.model = model


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the network's name and the options of its input."""
    from fastconv.models import MODELS

    add = parser.add_argument
    add("model", choices=MODELS, metavar="MODEL", help=f"one of {', '.join(MODELS)}")
    add("--input", type=_shape, metavar="C,H,W", help="channels and size, or C,D,H,W (what the network was made for)")
    add("--ndim", type=int, choices=(1, 2, 3), help="number of spatial axes, instead of --input (2)")
    add("--in-channels", type=integer(1), metavar="N", help="channels, instead of --input")
    add("--num-classes", type=integer(1), metavar="N", help="outputs (1000 for networks made for ImageNet, else 10)")
    add("--variant", metavar="NAME", help="such as paper or torchvision, where a network has several forms")
    add_options(parser)


def add_batch(parser: argparse.ArgumentParser) -> None:
    """Add the options of a batch of images, and where it is computed."""
    add = parser.add_argument
    add("--batch", type=integer(1), default=1, metavar="N", help="number of images (%(default)s)")
    add("--channels-last", action="store_true", help="give the images in channels-last order")
    add_device(parser)


def random_batch(args: argparse.Namespace, network: Network) -> Array:
    """Make random images for `network`, and move both to the GPU if `add_batch`'s options ask for it."""
    x = np.random.default_rng(0).standard_normal((args.batch, *network.input_shape), np.float32)
    if args.channels_last:
        x = to_channels_last(x)
    if args.device == "cuda":
        network.model.to("cuda")
        x = to_device(x)
    return x


def create_network(args: argparse.Namespace, rng: np.random.Generator | int | None = 0) -> Network:
    """Make the network that the options ask for.

    Parameters
    ----------
    args
        Of a parser that `add_network` has added to.
    rng
        Source of the weights.

    Raises
    ------
    UserError
        If options contradict each other, or the network does not exist in that form.
    """
    from fastconv.models import MODELS, create

    row = MODELS[args.model]
    if args.input is None:
        ndim = args.ndim or (2 if 2 in row.ndims else row.ndims[0])
        shape = (args.in_channels or row.in_channels, *(row.size,) * ndim)
    else:
        shape = args.input
    for option, given, meant in (("--ndim", args.ndim, len(shape) - 1), ("--in-channels", args.in_channels, shape[0])):
        if given not in (None, meant):
            raise UserError(f"{option} is {given}, but --input {','.join(map(str, shape))} says {meant}. "
                            f"Hint: leave {option} out")
    options = dict(args.options or ())
    if args.variant is not None:
        several = [name for name, model in MODELS.items() if "variant" in model.options]
        if args.model not in several:
            raise UserError(f"--variant is {args.variant}, but {args.model} has one form only; "
                            f"{', '.join(several)} have several. Hint: leave --variant out")
        options["variant"] = args.variant
    num_classes = args.num_classes or (1000 if row.size == 224 else 10)
    try:
        model = create(args.model, shape[0], num_classes, shape[1:], rng=rng, **options)
    except TypeError as error:
        raise UserError(f"{args.model} does not take the options {options}: {error}") from error
    except (ValueError, MemoryError) as error:
        raise UserError(error) from error
    words = [str(value) if name == "variant" else f"{name}={value}" for name, value in options.items()]
    return Network(args.model + (f" ({', '.join(words)})" if words else ""), shape, model)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given, but channels and 1 to 3 sizes of at least 1 are needed, "
                                         "such as 3,224,224")
    return shape


class Zeros(np.random.Generator):
    """Weights that nobody reads: drawing VGG's takes seconds and gigabytes."""

    def normal(self, *args: Any, **kwargs: Any) -> Any:
        return np.broadcast_to(np.float32(0), args[2])

    def uniform(self, *args: Any, **kwargs: Any) -> Any:
        return np.broadcast_to(np.float32(0), args[2])
