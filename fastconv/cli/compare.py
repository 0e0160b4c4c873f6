"""`fastconv compare`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastconv.cli.arguments import UserError, add_threads, integer, positive, set_threads
from fastconv.config import thread_reason

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train the networks of the course on one data set and write a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastconv.compare.networks import NETWORKS
    from fastconv.compare.study import Plan

    default = {field.name: field.default for field in fields(Plan)}
    parser.description = (
        "Train the networks of the course on one data set, measure them, and write OUT/report.html with all pictures "
        "and tables. Each finished part is saved; --resume goes on after an interrupt."
    )
    # No defaults here: with --resume what is not given comes from the saved plan.
    add = parser.add_argument
    add("--data", help=f'"digits" or an MNIST or MedMNIST .npz file ({default["data"]})')
    add("--models", choices=NETWORKS, metavar="NAME", nargs="+", help=f"any of {', '.join(NETWORKS)} (all)")
    add("--epochs", type=integer(1), help=f"at most so many for each training ({default['epochs']})")
    add("--minutes", type=positive, help=f"for all; fewer images and epochs if need be ({default['minutes']:g})")
    add("--seed", type=integer(0), help=f"of weights, order and choice of images ({default['seed']})")
    add("--out", type=Path, default=Path("fastconv-compare"), help="folder for the report (%(default)s)")
    add("--resume", action="store_true", help="go on with the comparison in OUT, or draw its report anew")
    add_threads(parser)


def run(args: argparse.Namespace) -> int:
    set_threads(args)
    try:
        from fastconv import plots
        from fastconv.compare.data import DIGITS
        from fastconv.compare.report import overview, write_report
        from fastconv.compare.study import Plan, Study

        plots.check_matplotlib()
        options = {field.name: getattr(args, field.name, None) for field in fields(Plan)}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if "models" in given:
            given["models"] = tuple(given["models"])
        if given.get("data", DIGITS) != DIGITS:
            given["data"] = str(Path(args.data).resolve())  # a resumed comparison may start in another folder
        study = Study.resume(args.out, given) if args.resume else Study.create(Plan(**given), args.out)
        dataset = study.dataset
        done, parts = study.progress()
        print(
            f"data     {study.plan.data}: {len(dataset.train):,} to train, {len(dataset.val or ()):,} to validate, "
            f"{len(dataset.test):,} to test; {'x'.join(map(str, dataset.input_size))}, {dataset.num_classes} classes\n"
            f"models   {', '.join(study.plan.models)}\n"
            f"parts    {parts}, {done} done; about {study.plan.minutes:g} minutes for all\n"
            f"threads  {thread_reason()}"
        )
        try:
            results = study.run()
        except KeyboardInterrupt:
            print(f"interrupted; {study.progress()[0]} of {parts} parts are done. "
                  f"Go on with: fastconv compare --resume --out {args.out}")
            raise
        path = write_report(results, args.out)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(error) from error
    print(f"\n{overview(results)}\n\nreport in {path.resolve()}")
    return 0
