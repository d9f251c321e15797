"""Writing so that an interruption leaves nothing half, and the operating system's refusals in words for users."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from cvdd.support.config_base import ConfigError
from cvdd.support.refusals import NO_SPACE, is_about, refused_by


class StoreError(ConfigError):
    """The store cannot be written: no space, no permission, read-only."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after any interruption it is either absent (or the old one) or complete.

    Several processes may write the same file at once; what one of them wrote stays.
    """
    # Process ids are alike in containers that share a disk.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync(path: Path) -> None:
    """Wait until a file or a directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _safetensors_errors() -> Iterator[None]:
    """Turn a refusal that safetensors reports in its own words into the operating system's error."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def reserve(path: Path, size: int) -> None:
    """Make a file of this size whose place on the disk is its own, so that a full disk is known before any work.

    Args:
        path: of the file; what is in it within the size stays.
        size: in bytes.
    """
    with path.open("r+b" if path.exists() else "wb") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except AttributeError:
            # Not every system has the call.
            pass
        except OSError as error:
            # Nor every disk.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        os.truncate(stream.fileno(), size)


@contextlib.contextmanager
def store_errors(root: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to type; nothing sealed is touched by them."""
    try:
        with _safetensors_errors():
            yield
    except OSError as error:
        refused = refused_by(error)
        if refused is not None and not is_about(refused, root):
            raise
        # A write into an open file names none, and logs and pictures are written while an artefact is made.
        place, choice = (f"{root} or the run's output", "paths.output=DIR or ") if refused is None else (root, "")
        if error.errno in NO_SPACE:
            raise StoreError(
                f"no space left for {place}. Free some or choose another place with {choice}paths.store=DIR; "
                "finished units are kept and the same command goes on."
            ) from error
        # Where there is a store, anything else, such as a file that is missing, is no matter of its place.
        impossible = error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR) or not root.is_dir()
        # Permission is asked for by name; without one it is of something else, e.g. a device or a socket.
        if error.errno == errno.EROFS or (refused is not None and impossible):
            raise StoreError(
                f"{place} cannot be written ({error.strerror}). Choose another place: {choice}paths.store=DIR."
            ) from error
        raise
