"""`fastconv train`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from fastconv.cli.arguments import (
    UserError,
    add_device,
    add_options,
    add_threads,
    fraction,
    integer,
    positive,
    set_threads,
)
from fastconv.config import thread_reason

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train a network on an MNIST or MedMNIST .npz file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastconv.models import MODELS
    from fastconv.training.augment import AUGMENTATIONS
    from fastconv.training.run import OPTIMIZERS, SAMPLINGS, SCHEDULES, Recipe
    from fastconv.training.stopping import MONITORS

    default = {field.name: field.default for field in fields(Recipe)}
    rates = ", ".join(f"{name} {rate:g}" for name, (_, rate) in OPTIMIZERS.items())
    optimizers, schedules = ", ".join(OPTIMIZERS), ", ".join(SCHEDULES)
    parser.description = (
        "Train a network on an MNIST or MedMNIST .npz file, in 2D or 3D, grey or RGB, with a table of covariates if "
        "the file has train_table and so on. OUT/checkpoint.npz is written after every epoch; with --resume the run "
        "goes on from there bit for bit."
    )
    # No defaults here: with --resume what is not given comes from the checkpoint.
    add = parser.add_argument
    add("--model", choices=MODELS, metavar="NAME", help=f"one of {', '.join(MODELS)}")
    add_options(parser)
    add("--data", type=Path, help="the .npz file")
    add("--no-table", dest="table", action="store_false", default=None, help="leave out the file's covariates")
    add("--size", type=integer(1), metavar="PIXELS", help="crop, or pad by the border, every axis to this (as it is)")
    add("--epochs", type=integer(1), help=f"({default['epochs']})")
    add("--batch-size", type=integer(1), help=f"({default['batch_size']})")
    add("--optimizer", choices=OPTIMIZERS, metavar="NAME", help=f"one of {optimizers} ({default['optimizer']})")
    add("--lr", type=positive, help=f"learning rate ({rates})")
    add("--schedule", choices=SCHEDULES, metavar="NAME", help=f"one of {schedules} ({default['schedule']})")
    words = ", ".join(name if row.strength is None else f"{name}={row.strength:.2g}"
                      for name, row in AUGMENTATIONS.items())
    add("--augment", type=_augmentation, metavar="NAME[=STRENGTH]", nargs="+",
        help=f"any of {words}, in the order given (none)")
    add("--sampling", choices=SAMPLINGS, metavar="NAME",
        help=f"one of {', '.join(SAMPLINGS)}: classes equally often ({default['sampling']})")
    add("--select", choices=MONITORS, metavar="NAME",
        help=f"end with the weights of the epoch whose validation {' or '.join(MONITORS)} is best (those of the last)")
    add("--patience", type=integer(1), metavar="EPOCHS",
        help="stop after so many without a better one (never); selects by loss if --select is not given")
    add(
        "--val-fraction",
        type=fraction,
        help=f"share held out where the file has no validation part ({default['val_fraction']})",
    )
    add("--seed", type=integer(0), help=f"of weights, order and augmentation ({default['seed']})")
    add("--out", type=Path, help="folder for the checkpoint (fastconv-MODEL-DATA)")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.npz")
    add_device(parser)
    add_threads(parser)


def _augmentation(word: str) -> str:
    from fastconv.training.augment import parse

    try:
        parse([word])
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return word


def run(args: argparse.Namespace) -> int:
    from fastconv.training.checkpoint import load_checkpoint
    from fastconv.training.metrics import confusion_table
    from fastconv.training.run import Recipe, Run

    set_threads(args)
    given = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    given = {name: value for name, value in given.items() if value is not None}
    if "augment" in given:
        given["augment"] = tuple(given["augment"])
    if "options" in given:
        given["options"] = dict(given["options"])
    if "data" in given:
        given["data"] = str(args.data.resolve())  # a resumed run may start in another folder
    missing = [f"--{name}" for name in ("model", "data") if name not in given]
    if missing and not (args.resume and args.out):
        raise UserError(f"{' and '.join(missing)} needed, or --resume with --out. Hint: fastconv train --help")
    out = args.out or Path(f"fastconv-{args.model}-{args.data.stem}")
    checkpoint = out / "checkpoint.npz"
    try:
        if args.resume:
            training = Run.resume(checkpoint, given)
        elif checkpoint.exists():
            raise ValueError(f"{checkpoint} is there already. Hint: --resume goes on with it, or choose another --out")
        else:
            training = Run(Recipe(**given))
        out.mkdir(parents=True, exist_ok=True)
        training.save(checkpoint)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(error) from error

    dataset, size = training.dataset, training.dataset.input_size
    shape = f"{dataset.in_channels} channel{'s' * (dataset.in_channels > 1)} of {'x'.join(map(str, size))}"
    columns = "" if dataset.train.table is None else f", a table of {dataset.train.table.shape[1]} columns"
    print(
        f"data        {training.recipe.data}: {len(dataset.train):,} to train, {len(dataset.val or ()):,} to validate, "
        f"{len(dataset.test):,} to test; {shape}, {dataset.num_classes} classes{columns}\n"
        f"model       {training.recipe.model}, {training.model.num_parameters():,} parameters\n"
        f"training    {training.recipe}; threads {thread_reason()}\n"
        f"checkpoint  {checkpoint}" + (f", {len(training.history)} epochs done" if args.resume else "")
    )
    try:
        training.train(checkpoint)
    except KeyboardInterrupt:
        done = len(load_checkpoint(checkpoint)["history"])
        print(
            f"interrupted; {checkpoint} holds {done} of {training.recipe.epochs} epochs. "
            f"Go on with: fastconv train --resume --out {out}"
        )
        raise
    if training.stopping is not None:
        best = training.stopping
        print(f"best        epoch {best.best_epoch} of {len(training.history)}: val {best.monitor} {best.best:.4f}")
    test = training.test()
    print(f"test        loss {test.loss:.4f}  acc {test.accuracy:.2%}  auc {test.auc:.4f}")
    if dataset.num_classes <= 20:
        print(confusion_table(test.confusion))
    return 0
