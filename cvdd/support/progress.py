"""Progress with an estimate of the time that is left: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cvdd.support.readable import readable_seconds

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0

Advance = Callable[[int], None]

Item = TypeVar("Item")


def counted(items: Iterable[Item], advance: Advance) -> Iterator[Item]:
    """Yield items, and count each when the next is asked for."""
    for item in items:
        yield item
        advance(1)


@contextlib.contextmanager
def progress(kind: str, what: str, total: int) -> Iterator[Advance]:
    """Show progress of one piece of work.

    Args:
        kind: ``auto`` (a bar if the output is a terminal, lines otherwise), ``bar``, ``lines`` or ``none``.
        what: the work, for the reader.
        total: number of steps.

    Yields:
        a function that takes the number of steps done since its last call.
    """
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "lines"
    if kind == "bar":
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn()) as bar:
            task = bar.add_task(what, total=total)
            yield lambda steps: bar.advance(task, steps)
    elif kind == "lines":
        yield _Lines(what, total)
    else:
        yield lambda steps: None


class _Lines:
    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.done = 0
        self.skipped: int | None = None
        self.started = self.printed = time.monotonic()

    def __call__(self, steps: int) -> None:
        now = time.monotonic()
        self.done += steps
        if self.skipped is None:
            # Work that an earlier run did arrives as one first step and says nothing about the rate of this one.
            self.skipped = self.done if now - self.started < 1 and self.done > 1 else 0
        if now - self.printed < SECONDS_BETWEEN_LINES and self.done < self.total:
            return
        self.printed = now
        rate = (self.done - self.skipped) / max(now - self.started, 1e-9)
        left = ""
        if rate > 0 and self.done < self.total:
            left = f", about {readable_seconds((self.total - self.done) / rate)} left"
        spent = readable_seconds(now - self.started)
        log.info("%s: %d of %d in %s%s", self.what, self.done, self.total, spent, left)
