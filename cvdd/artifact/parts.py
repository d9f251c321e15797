"""Artefacts whose parts are made by any number of processes, each part by one of them.

A process claims a part, makes it and marks it in a table with one byte a part that all of them read. So finding work
is looking for a zero in a few kilobytes, whatever the number of parts, and only processes that begin at the same moment
ever want the same part. The table is a hint: whether a part is finished is decided by its files, under its claim.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cvdd.artifact.claims import Claims, pauses
from cvdd.artifact.sessions import Session

TABLE = ".parts"
OPEN, FINISHED, TAKEN = 0, 1, 2

LOOKS = 2
"""Parts of others that a process without work of its own looks at before it pauses: one of them may be dropped."""


@dataclass(frozen=True)
class Maker:
    """What a process needs while it makes parts.

    Attributes:
        make: makes the part with this index; goes on from the checkpoint that another process may have left.
        passed: is told the indices of parts that turn out to be finished without this process, for its progress.
    """

    make: Callable[[int], None]
    passed: Callable[[Sequence[int]], None] = lambda indices: None


def _nothing(work: Path) -> None:
    pass


@dataclass(frozen=True)
class Parts:
    """How an artefact is made part by part. All functions but ``maker`` are given the directory of the artefact.

    The parts, their order and what is in them must follow from the artefact's identity alone.

    Attributes:
        names: of the parts, for the names of their claims.
        done: whether the files of the part with this index are complete.
        maker: opened by each process when it has claimed its first part: loads what all parts need.
        prepare: called once before the first part, by one process.
    """

    names: Sequence[str]
    done: Callable[[Path, int], bool]
    maker: Callable[[Path], AbstractContextManager[Maker]]
    prepare: Callable[[Path], None] = _nothing


class Table:
    """State of every part, one byte each.

    Args:
        work: directory of the artefact.
    """

    def __init__(self, work: Path) -> None:
        self.path = work / TABLE

    def fits(self, count: int) -> bool:
        """Whether it is there and is about so many parts."""
        return self.path.exists() and self.path.stat().st_size == count

    def create(self, count: int) -> None:
        """Write it with all parts open."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_bytes(bytes(count))
        temporary.replace(self.path)

    def read(self) -> bytes:
        """Return the states.

        Raises:
            FileNotFoundError: the artefact was sealed meanwhile, or removed.
        """
        return self.path.read_bytes()

    def mark(self, index: int, state: int) -> None:
        """Change the state of one part."""
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, bytes([state]), index)
        finally:
            os.close(descriptor)


def make_open_parts(parts: Parts, work: Path, claims: Claims, folder: Path, session: Session) -> None:
    """Make parts that nobody else makes until all are finished, by whomever.

    Args:
        parts: what to make.
        work: directory of the artefact; its table is there.
        claims: of the store.
        folder: of the files that stand for the parts.
        session: of this process.

    Raises:
        FileNotFoundError: the artefact was sealed meanwhile by others, or removed.
    """
    table = Table(work)
    folder.mkdir(parents=True, exist_ok=True)
    known = np.zeros(len(parts.names), dtype=bool)
    # Chance decides who makes what, never what is made.
    chance = random.Random()
    cursor, looks, pause = 0, 0, pauses()
    with contextlib.ExitStack() as opened:
        maker: Maker | None = None
        while True:
            states = np.frombuffer(table.read(), dtype=np.uint8)
            passed = np.flatnonzero((states == FINISHED) & ~known)
            if maker is not None and len(passed):
                known[passed] = True
                maker.passed(passed.tolist())
            if bool((states == FINISHED).all()):
                return
            index = _choose(states, cursor, chance)
            claim = claims.take(folder / f"{parts.names[index]}.lock")
            if claim is None:
                cursor, looks = chance.randrange(len(states)), looks + 1
                if looks % LOOKS == 0:
                    next(pause)
                continue
            finished = False
            try:
                finished = table.read()[index] == FINISHED
                if not finished and not parts.done(work, index):
                    table.mark(index, TAKEN)
                    if maker is None:
                        maker = opened.enter_context(parts.maker(work))
                    maker.make(index)
                    assert parts.done(work, index), f"part {parts.names[index]} was made and is not there"
                    known[index] = True
                    session.note()
                if not finished:
                    table.mark(index, FINISHED)
                    finished = True
            finally:
                if not finished:
                    # While the part is open and held, nobody seals what this writes to.
                    session.note(last=True)
                    with contextlib.suppress(OSError):
                        table.mark(index, OPEN)
                claim.release(forget=finished)
            cursor, looks, pause = (index + 1) % len(states), 0, pauses()


def _choose(states: np.ndarray[tuple[int], np.dtype[np.uint8]], cursor: int, chance: random.Random) -> int:
    """Return the next part that nobody took; if there is none, one whose owner may have died."""
    raw = states.tobytes()
    for start in (cursor, 0):
        index = raw.find(OPEN, start)
        if index >= 0:
            return index
    return int(chance.choice(np.flatnonzero(states == TAKEN)))


def reopen_missing(parts: Parts, work: Path) -> bool:
    """Open again what the table calls finished and is not there; return whether there was anything."""
    missing = [index for index in range(len(parts.names)) if not parts.done(work, index)]
    for index in missing:
        Table(work).mark(index, OPEN)
    return bool(missing)
