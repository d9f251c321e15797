"""The operating system's refusals to write into a place that a user chose, in words that say what to type."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cvdd.support.config_base import ConfigError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_PROBE = bytes(2**16)
"""As much as Hydra writes before a job begins."""


def refused_by(error: OSError) -> Path | None:
    """Return the file or directory that an error is about; None if it names none, like a write into an open file."""
    # Where a file is copied, the second name is that of the copy, which is what is refused.
    refused = error.filename if error.filename2 is None else error.filename2
    return Path(refused) if isinstance(refused, str | os.PathLike) else None


def is_about(refused: Path, place: Path) -> bool:
    """Whether what was refused is in a place, or above it, where directories that lead to it are made."""
    return refused.is_relative_to(place) or place.is_relative_to(refused)


@contextlib.contextmanager
def place_errors(place: Path, instead: str) -> Iterator[None]:
    """Turn refusals to write into a place into errors for users; others remain what they are.

    Args:
        place: where the body writes, and nowhere else.
        instead: what to choose, such as ``another folder``.
    """
    try:
        yield
    except OSError as error:
        refused = refused_by(error)
        # Libraries have errors of this type without a number, which the system knows nothing of.
        if error.errno is None or (refused is not None and not is_about(refused, place)):
            raise
        if error.errno in NO_SPACE:
            raise ConfigError(f"no space left for {place}; free some, or choose {instead}") from error
        raise ConfigError(f"{place} cannot be written ({error.strerror}); choose {instead}") from error


def require_writable(place: Path, instead: str) -> None:
    """Make a directory, and see whether anything can be written there before there is work that may be lost.

    Args:
        place: the directory.
        instead: see :func:`place_errors`.

    Raises:
        ConfigError: it cannot be made or written.
    """
    with place_errors(place, instead):
        place.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=place) as stream:
                stream.write(_PROBE)
        except OSError as error:
            # It would name a file that nobody asked for.
            error.filename = str(place)
            raise
