"""How long the processes worked that made an artefact, whatever became of them."""

from __future__ import annotations

import contextlib
import secrets
import time
from pathlib import Path

FOLDER = ".sessions"
SECONDS_BETWEEN_NOTES = 1.0


class Session:
    """The seconds that this process works on an artefact, in a file of its own.

    Args:
        work: directory in which the artefact is built.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / FOLDER / f"{secrets.token_hex(8)}.txt"
        self.started = time.monotonic()
        self._noted = 0.0

    def note(self, last: bool = False) -> None:
        """Write down the seconds so far, unless that was done just now and more will come."""
        seconds = time.monotonic() - self.started
        if not last and seconds - self._noted < SECONDS_BETWEEN_NOTES:
            return
        # Losing a figure for people must not lose work.
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(f"{seconds:.3f}")
            self._noted = seconds


def seconds_of_sessions(work: Path) -> list[float]:
    """Return the seconds of each process that worked on an artefact."""
    seconds = []
    for path in sorted((work / FOLDER).glob("*.txt")):
        # A process that was killed while it wrote leaves an empty file.
        with contextlib.suppress(OSError, ValueError):
            seconds.append(float(path.read_text()))
    return seconds
