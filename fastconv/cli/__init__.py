"""The command line: a module for each command, with HELP, `add_arguments` and `run`.

Wrong arguments and unusable files end in one line on standard error and exit code 2, a run that diverges
in exit code 1, Ctrl-C in 130 (128 + SIGINT, as shells count).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import fastconv
from fastconv.cli import compare, demo, info, profile, summary, train, tune
from fastconv.cli.arguments import Parser, UserError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "compare": compare, "demo": demo, "info": info, "profile": profile, "summary": summary, "train": train,
    "tune": tune,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments
        What follows the program's name; by default those of this process.
    """
    args = _parser().parse_args(arguments)
    try:
        code = int(COMMANDS[args.command].run(args))
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"fastconv {args.command}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"fastconv {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `fastconv … | head` has read enough; what is buffered must go somewhere at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> Parser:
    parser = Parser(prog="fastconv", description="Convolutional networks on the CPU.")
    parser.add_argument("--version", action="version", version=f"fastconv {fastconv.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP))
    return parser
