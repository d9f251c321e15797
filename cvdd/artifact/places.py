"""Where a store keeps what is unfinished, and what its processes hold.

Directories have readable names, but an artefact is known by its digest, and so are its locks: whoever wants it under
another name must meet those who make it. Earlier versions had names in their locks too, which nobody looks at any more.
"""

from __future__ import annotations

import re
from pathlib import Path

PARTIAL = ".partial"
LOCKS = ".locks"
USERS = ".users"

_NAMED = re.compile(r".+-[0-9a-f]{12}", re.DOTALL)


def is_named(path: Path) -> bool:
    """Whether a directory has the name of an artefact, ``<name>-<digest>``."""
    return _NAMED.fullmatch(path.name) is not None


def worked_in(root: Path) -> list[Path]:
    """List the directories of a store's root in which a process has made artefacts."""
    # A pattern passes over what it may not look into, such as a disk's lost+found.
    return sorted(path.parent for path in root.glob(f"*/{LOCKS}") if path.is_dir() and path.parent.name[0] != ".")


def digest_in(path: Path) -> str:
    """Return the digest in the name of a directory of an artefact: what the artefact is, whatever it is called."""
    return path.name.rpartition("-")[2]


def kind_of(path: Path) -> Path:
    """Return the directory of all artefacts of a kind.

    Args:
        path: of an artefact, or of the directory in which it is built.
    """
    return path.parent.parent if path.parent.name == PARTIAL else path.parent


def built_in(path: Path) -> Path:
    """Return the directory in which an artefact is built, which may have been begun under another name.

    Args:
        path: where it will lie, ``<store>/<kind>/<name>-<digest>``; its lock is held.
    """
    folder = path.parent / PARTIAL
    # The first of several, which earlier versions could leave: all who share the work must choose the same.
    begun = sorted(other for other in folder.glob(f"*-{digest_in(path)}") if other.is_dir())
    return begun[0] if begun else folder / path.name


def lock_file(path: Path) -> Path:
    """Return the file whose holder alone may make, seal or remove an artefact.

    Args:
        path: as for :func:`kind_of`.
    """
    return kind_of(path) / LOCKS / f"{digest_in(path)}.lock"


def part_locks(path: Path) -> Path:
    """Return the directory of the files that are held by those who make a part of an artefact.

    Args:
        path: as for :func:`kind_of`.
    """
    return kind_of(path) / LOCKS / f"{digest_in(path)}.parts"
