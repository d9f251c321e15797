"""A rank of a command, in a process that :mod:`cvdd.commands.ranks` started."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cvdd.running.children import begin_child


def main(arguments: Sequence[str]) -> None:
    """Work as one of the ranks.

    Args:
        arguments: path of the configuration, as JSON; the rank, how many there are, and the port where they meet.
    """
    # First, so that it ends with its parent even while libraries are being imported, which takes seconds.
    begin_child()
    from cvdd.commands.ranks import joined
    from cvdd.commands.runtime import Invocation, work_as
    from cvdd.running.distributed import LOOPBACK, World
    from cvdd.schema import RunConfig
    from cvdd.support.outcome import told

    written, rank, size, port = Path(arguments[0]), *(int(argument) for argument in arguments[1:])
    config = RunConfig.model_validate_json(written.read_text())
    world = World(rank, size, rank, size, LOOPBACK, port)
    with told(sweeping=False), joined(world, None, config):
        work_as(world, config, Invocation(()))


if __name__ == "__main__":
    main(sys.argv[1:])
