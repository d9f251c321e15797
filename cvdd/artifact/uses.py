"""Which artefacts running processes read or make, so that nothing is removed under them."""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from pathlib import Path

from cvdd.artifact.claims import Claim, Claims, keep_to_kind
from cvdd.artifact.places import USERS


class Uses:
    """What this process uses: a list in a file of its own, beside a claim that says whether the process lives.

    Args:
        root: of the store.
        claims: of the store.
    """

    def __init__(self, root: Path, claims: Claims) -> None:
        self.root, self.claims = root, claims
        self._process: int | None = None
        self._noted: set[Path] = set()
        self._list = root

    @property
    def user(self) -> str:
        """Name of this process in the store, for :func:`used_by`."""
        self._enter_once()
        return self._list.stem

    def note(self, path: Path) -> None:
        """Say that this process reads or makes a directory of the store, until its end."""
        self._enter_once()
        if path in self._noted:
            return
        self._noted.add(path)
        # A store that cannot be written can be read all the same, and nobody can remove anything there.
        with contextlib.suppress(OSError), self._list.open("a") as stream:
            stream.write(f"{path.relative_to(self.root).as_posix()}\n")

    def _enter_once(self) -> None:
        if self._process != os.getpid():
            # Also a forked process: its parent may end before it does.
            self._process = os.getpid()
            self._noted = set()
            self._enter()

    def _enter(self) -> None:
        folder = self.root / USERS
        token = secrets.token_hex(8)
        self._list = folder / f"{token}.txt"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            keep_to_kind(self.root, self.claims)
            claim = self.claims.take(folder / f"{token}.lock")
            assert claim is not None
            # A list without entries says that the process lives.
            self._list.touch()
            weakref.finalize(self, _leave, os.getpid(), claim, self._list)


def _leave(process: int, claim: Claim, path: Path) -> None:
    if process == os.getpid():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            claim.release(forget=True)


def used_by_others(root: Path, claims: Claims) -> set[Path]:
    """Return the directories of a store that running processes use; forget processes that are gone.

    With leases a process counts as running until it has been silent for long enough while this one watched.
    """
    used: set[Path] = set()
    for path in sorted((root / USERS).glob("*.txt")):
        claim = claims.take(path.with_suffix(".lock"))
        if claim is not None:
            _leave(os.getpid(), claim, path)
            continue
        with contextlib.suppress(FileNotFoundError):
            used |= {root / line for line in path.read_text().splitlines()}
    return used


def used_by(root: Path, claims: Claims, user: str) -> list[Path] | None:
    """Return the directories of a store that one process uses, in the order in which it came to them.

    With leases a process counts as running until it has been silent for long enough while this one watched.

    Returns:
        None if the process has ended.
    """
    path = root / USERS / f"{user}.txt"
    try:
        used = [root / line for line in path.read_text().splitlines()]
    except FileNotFoundError:
        return None
    try:
        claim = claims.take(path.with_suffix(".lock"))
    except OSError:
        # Of a store that cannot be written here nothing better is known.
        return used
    if claim is None:
        return used
    claim.release()
    return None
