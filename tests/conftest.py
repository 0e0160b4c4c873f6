"""What ran: the tests of kernels count it, and the end of the session prints it."""

import os
from collections import Counter
from pathlib import Path

import pytest

import fastconv

_COUNTS = pytest.StashKey[dict[str, Counter]]()


def pytest_configure(config):
    # Programs that tests start with -P take the fastconv that is tested, not the folder that they are started in.
    os.environ["PYTHONPATH"] = str(Path(fastconv.__file__).parents[1])
    config.stash[_COUNTS] = {}


@pytest.fixture(scope="session")
def ran(request):
    """Return a function that counts: ran(heading, what)."""
    counts = request.config.stash[_COUNTS]

    def count(heading, what):
        counts.setdefault(heading, Counter())[what] += 1

    return count


def pytest_terminal_summary(terminalreporter, config):
    for heading, counter in config.stash[_COUNTS].items():
        terminalreporter.section(f"{heading}: {counter.total()}")
        for what, count in sorted(counter.items()):
            terminalreporter.line(f"{count:8}  {what}")
