"""The command line: `fastconv demo`, `fastconv info`, `fastconv train`.

Wrong arguments and unusable files end in one line on standard error and exit code 2, a run that diverges
in exit code 1, Ctrl-C in 130 (128 + SIGINT, as shells count).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import fastconv
from fastconv.config import thread_reason

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}. Hint: {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments
        What follows the program's name; by default those of this process.
    """
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except _UserError as error:
        print(f"fastconv {args.command}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"fastconv {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class _UserError(Exception):
    """Something that the user can put right; shown without a traceback."""


def _parser() -> _Parser:
    parser = _Parser(prog="fastconv", description="Convolutional networks on the CPU.")
    parser.add_argument("--version", action="version", version=f"fastconv {fastconv.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | info | train")
    _add_demo(commands.add_parser("demo", help="train LeNet-5 on real digits, measure it and draw pictures"))
    info = commands.add_parser("info", help="version, instruction set, kernels, threads and why, caches")
    info.set_defaults(run=_info)
    _add_train(commands.add_parser("train", help="train a network on an MNIST or MedMNIST .npz file"))
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train LeNet-5 on scikit-learn's digits, measure every layer, and draw pictures."
    parser.add_argument("--out", type=Path, default=Path("fastconv-demo"), help="folder for pictures (%(default)s)")
    parser.add_argument("--epochs", type=_integer(1), default=12, help="passes over the digits (%(default)s)")
    parser.add_argument("--seed", type=_integer(0), default=0, help="of weights and order (%(default)s)")
    _add_threads(parser)
    parser.set_defaults(run=_demo)


def _add_train(parser: argparse.ArgumentParser) -> None:
    from fastconv.models import MODELS
    from fastconv.training.data import AUGMENTATIONS
    from fastconv.training.run import OPTIMIZERS, SCHEDULES, Recipe

    default = {field.name: field.default for field in fields(Recipe)}
    rates = ", ".join(f"{name} {rate:g}" for name, (_, rate) in OPTIMIZERS.items())
    optimizers, schedules = ", ".join(OPTIMIZERS), ", ".join(SCHEDULES)
    parser.description = (
        "Train a network on an MNIST or MedMNIST .npz file, in 2D or 3D, grey or RGB. OUT/checkpoint.npz is "
        "written after every epoch; with --resume the run goes on from there bit for bit."
    )
    # No defaults here: with --resume what is not given comes from the checkpoint.
    add = parser.add_argument
    add("--model", choices=MODELS, metavar="NAME", help=f"one of {', '.join(MODELS)}")
    add("--data", type=Path, help="the .npz file")
    add("--epochs", type=_integer(1), help=f"({default['epochs']})")
    add("--batch-size", type=_integer(1), help=f"({default['batch_size']})")
    add("--optimizer", choices=OPTIMIZERS, metavar="NAME", help=f"one of {optimizers} ({default['optimizer']})")
    add("--lr", type=_positive, help=f"learning rate ({rates})")
    add("--schedule", choices=SCHEDULES, metavar="NAME", help=f"one of {schedules} ({default['schedule']})")
    add("--augment", choices=AUGMENTATIONS, metavar="NAME", nargs="+", help=f"any of {', '.join(AUGMENTATIONS)} (none)")
    add(
        "--val-fraction",
        type=_fraction,
        help=f"share held out where the file has no validation part ({default['val_fraction']})",
    )
    add("--seed", type=_integer(0), help=f"of weights, order and augmentation ({default['seed']})")
    add("--out", type=Path, help="folder for the checkpoint (fastconv-MODEL-DATA)")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.npz")
    _add_threads(parser)
    parser.set_defaults(run=_train)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_integer(1), help="at most so many (see fastconv info)")


def _integer(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is given, but an integer of at least {least} is needed")
        return value

    return parse


def _positive(text: str) -> float:
    value = _float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is given, but a number above 0 is needed")
    return value


def _fraction(text: str) -> float:
    value = _float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given, but 0 <= fraction < 1 is needed")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _set_threads(args: argparse.Namespace) -> None:
    if args.threads is not None:
        fastconv.set_num_threads(args.threads)


def _info(args: argparse.Namespace) -> int:
    fastconv.show_config()
    return 0


def _demo(args: argparse.Namespace) -> int:
    _set_threads(args)
    try:
        from fastconv import demo

        demo.run(args.out, epochs=args.epochs, seed=args.seed)
    except (ImportError, OSError) as error:
        raise _UserError(error) from error
    return 0


def _train(args: argparse.Namespace) -> int:
    from fastconv.training.checkpoint import load_checkpoint
    from fastconv.training.metrics import confusion_table
    from fastconv.training.run import Recipe, Run

    _set_threads(args)
    given = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    if "augment" in given:
        given["augment"] = tuple(given["augment"])
    if "data" in given:
        given["data"] = str(args.data.resolve())  # a resumed run may start in another folder
    missing = [f"--{name}" for name in ("model", "data") if name not in given]
    if missing and not (args.resume and args.out):
        raise _UserError(f"{' and '.join(missing)} needed, or --resume with --out. Hint: fastconv train --help")
    out = args.out or Path(f"fastconv-{args.model}-{args.data.stem}")
    checkpoint = out / "checkpoint.npz"
    try:
        if args.resume:
            run = Run.resume(checkpoint, given)
        elif checkpoint.exists():
            raise ValueError(f"{checkpoint} is there already. Hint: --resume goes on with it, or choose another --out")
        else:
            run = Run(Recipe(**given))
        out.mkdir(parents=True, exist_ok=True)
        run.save(checkpoint)
    except (OSError, ValueError) as error:
        raise _UserError(error) from error

    dataset, size = run.dataset, run.dataset.input_size
    shape = f"{dataset.in_channels} channel{'s' * (dataset.in_channels > 1)} of {'x'.join(map(str, size))}"
    print(
        f"data        {run.recipe.data}: {len(dataset.train):,} to train, {len(dataset.val or ()):,} to validate, "
        f"{len(dataset.test):,} to test; {shape}, {dataset.num_classes} classes\n"
        f"model       {run.recipe.model}, {run.model.num_parameters():,} parameters\n"
        f"training    {run.recipe}; threads {thread_reason()}\n"
        f"checkpoint  {checkpoint}" + (f", {len(run.history)} epochs done" if args.resume else "")
    )
    try:
        run.train(checkpoint)
    except KeyboardInterrupt:
        done = len(load_checkpoint(checkpoint)["history"])
        print(
            f"interrupted; {checkpoint} holds {done} of {run.recipe.epochs} epochs. "
            f"Go on with: fastconv train --resume --out {out}"
        )
        raise
    test = run.test()
    print(f"test        loss {test.loss:.4f}  acc {test.accuracy:.2%}  auc {test.auc:.4f}")
    if dataset.num_classes <= 20:
        print(confusion_table(test.confusion))
    return 0
