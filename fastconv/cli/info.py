"""`fastconv info`."""

from __future__ import annotations

import argparse

import fastconv

__all__ = ["HELP", "add_arguments", "run"]

HELP = "version, instruction set, kernels, threads and why, caches"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what this installation is and what it uses on this machine."


def run(args: argparse.Namespace) -> int:
    fastconv.show_config()
    return 0
