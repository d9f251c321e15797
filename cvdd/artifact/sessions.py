"""How long processes worked on an artefact, whatever became of them: each by itself, and all on one clock."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = ".sessions"
SECONDS_BETWEEN_NOTES = 1.0


@dataclass(frozen=True)
class Span:
    """When a process worked on an artefact.

    Attributes:
        began: in seconds since 1970, by the clock of its machine.
        seconds: that it worked.
    """

    began: float
    seconds: float


class Session:
    """The seconds that this process works on an artefact, and when it began, in a file of its own.

    Args:
        work: directory in which the artefact is built.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / FOLDER / f"{secrets.token_hex(8)}.txt"
        self.began = time.time()
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
            self.path.write_text(f"{seconds:.3f} {self.began:.3f}")
            self._noted = seconds


def read_sessions(work: Path) -> list[Span]:
    """Return when each process worked on an artefact."""
    spans = []
    for path in sorted((work / FOLDER).glob("*.txt")):
        # A process that was killed while it wrote leaves an empty file.
        with contextlib.suppress(OSError, ValueError, IndexError):
            numbers = [float(word) for word in path.read_text().split()]
            # Earlier versions wrote only how long it was, at its end.
            began = numbers[1] if len(numbers) > 1 else path.stat().st_mtime - numbers[0]
            spans.append(Span(began, numbers[0]))
    return spans


def process_seconds(spans: Sequence[Span]) -> float:
    """Add up the seconds of all processes, also of those that worked side by side."""
    return sum(span.seconds for span in spans)


def wall_seconds(spans: Sequence[Span]) -> float:
    """Return for how long at least one process worked; pauses between interrupted ones do not count."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.began):
        until = span.began + span.seconds
        total += max(until - max(span.began, end), 0.0)
        end = max(end, until)
    return total
