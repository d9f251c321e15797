"""Where a store keeps what is unfinished, and what its processes hold."""

from __future__ import annotations

import re
from pathlib import Path

PARTIAL = ".partial"
LOCKS = ".locks"

_NAMED = re.compile(r".+-[0-9a-f]{12}", re.DOTALL)


def is_named(path: Path) -> bool:
    """Whether a directory has the name of an artefact, ``<name>-<digest>``."""
    return _NAMED.fullmatch(path.name) is not None


def worked_in(root: Path) -> list[Path]:
    """List the directories of a store's root in which a process has made artefacts."""
    # A pattern passes over what it may not look into, such as a disk's lost+found.
    return sorted(path.parent for path in root.glob(f"*/{LOCKS}") if path.is_dir() and path.parent.name[0] != ".")


def unfinished(path: Path) -> Path:
    """Return the directory in which an artefact is built.

    Args:
        path: where it will lie, ``<store>/<kind>/<name>-<digest>``.
    """
    return path.parent / PARTIAL / path.name


def lock_file(path: Path) -> Path:
    """Return the file whose holder alone may make, seal or remove an artefact.

    Args:
        path: of the artefact, or of the directory in which it is built.
    """
    return _locks(path) / f"{path.name}.lock"


def part_locks(path: Path) -> Path:
    """Return the directory of the files that are held by those who make a part of an artefact.

    Args:
        path: as for :func:`lock_file`.
    """
    return _locks(path) / f"{path.name}.parts"


def _locks(path: Path) -> Path:
    kind = path.parent.parent if path.parent.name == PARTIAL else path.parent
    return kind / LOCKS
