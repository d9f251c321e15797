"""Where a store keeps what is unfinished, and what its processes hold."""

from __future__ import annotations

from pathlib import Path

PARTIAL = ".partial"
LOCKS = ".locks"


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
