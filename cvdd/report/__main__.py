"""``python -m cvdd.report``: what can be told from the directories of runs alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import USER_ERROR, reader_may_go


def report_sweep(arguments: Sequence[str]) -> None:
    """Write the reports of sweeps, and say how far these are.

    Args:
        arguments: their directories.
    """
    from cvdd.report.sweeps import progress, read_directory, write_report

    for argument in arguments:
        page = write_report(Path(argument))
        print(f"{argument}: {progress(read_directory(Path(argument)))}\n{page}")


def report_experiments(arguments: Sequence[str]) -> None:
    """List the recipes of published numbers with what was measured here.

    Args:
        arguments: parts of their names.
    """
    from cvdd.report.experiments import list_experiments

    list_experiments(arguments)


def watch(arguments: Sequence[str]) -> None:
    """Show how far sweeps are, and which job works on what.

    Args:
        arguments: their directories and, for a view that is kept up to date, ``--every SECONDS``.
    """
    from cvdd.report.watch import watch_sweeps

    watch_sweeps(arguments)


COMMANDS: Mapping[str, Callable[[Sequence[str]], None]] = MappingProxyType(
    {"experiments": report_experiments, "watch": watch}
)
"""By the first argument; any other is the directory of a sweep."""

USAGE = """usage:
  python -m cvdd.report multirun/NAME [multirun/NAME ...]  the report of a sweep
  python -m cvdd.report watch multirun/NAME [...]          how far it is, and which job works on what; --every SECONDS
  python -m cvdd.report experiments [PART ...]             published numbers, and which were measured here"""


def main(arguments: Sequence[str]) -> int:
    """Run a command; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else USER_ERROR
    command = COMMANDS.get(arguments[0])
    try:
        with reader_may_go():
            if command is None:
                report_sweep(arguments)
            else:
                command(arguments[1:])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
