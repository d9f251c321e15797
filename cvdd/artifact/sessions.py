"""How long processes worked on an artefact, whatever became of them, on what, and what they held meanwhile."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cvdd.artifact.peak import forget_peak, peak_memory

FOLDER = ".sessions"
SECONDS_BETWEEN_NOTES = 1.0


@dataclass(frozen=True)
class Span:
    """When a process worked on an artefact.

    Attributes:
        began: in seconds since 1970, by the clock of its machine.
        seconds: that it worked.
        peak: most bytes that it held meanwhile; 0 if that is not known.
        machine: processor or GPU; empty if that is not known.
    """

    began: float
    seconds: float
    peak: int = 0
    machine: str = ""


class Session:
    """How long this process works on an artefact, and what it holds meanwhile, in a file of its own.

    Args:
        work: directory in which the artefact is built.
        machine: what computes.
    """

    def __init__(self, work: Path, machine: str = "") -> None:
        self.path = work / FOLDER / f"{secrets.token_hex(8)}.json"
        self.machine = machine
        forget_peak()
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
            span = Span(round(self.began, 3), round(seconds, 3), peak_memory(), self.machine)
            self.path.write_text(json.dumps(asdict(span)))
            self._noted = seconds


def read_sessions(work: Path) -> list[Span]:
    """Return when each process worked on an artefact."""
    spans = []
    for path in sorted((work / FOLDER).glob("*.*")):
        # A process that was killed while it wrote leaves an empty file.
        with contextlib.suppress(OSError, ValueError, TypeError, IndexError):
            spans.append(_read(path))
    return spans


def _read(path: Path) -> Span:
    text = path.read_text()
    if path.suffix == ".json":
        return Span(**json.loads(text))
    numbers = [float(word) for word in text.split()]
    # Earlier versions wrote how long it was and when it began, and before that only how long it was, at its end.
    return Span(numbers[1] if len(numbers) > 1 else path.stat().st_mtime - numbers[0], numbers[0])


def process_seconds(spans: Sequence[Span]) -> float:
    """Add up the seconds of all processes, also of those that worked side by side."""
    return sum(span.seconds for span in spans)


def machine_seconds(spans: Sequence[Span]) -> dict[str, float]:
    """Add up the seconds of all processes by the machine that they ran on, where that is known."""
    found: dict[str, float] = {}
    for span in spans:
        if span.machine:
            found[span.machine] = round(found.get(span.machine, 0.0) + span.seconds, 3)
    return found


def wall_seconds(spans: Sequence[Span]) -> float:
    """Return for how long at least one process worked; pauses between interrupted ones do not count."""
    total, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.began):
        until = span.began + span.seconds
        total += max(until - max(span.began, end), 0.0)
        end = max(end, until)
    return total
