"""The store: every result is a sealed directory that is complete, or it does not exist.

An artefact lives at ``<store>/<kind>/<name>-<digest>/``. The digest covers the part of the configuration that changes
the result and the digests of the parents. It is built in ``<store>/<kind>/.partial/``, where an interrupted build goes
on, and renamed into place with a ``manifest.json`` that lists every file with its checksum.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
from safetensors import SafetensorError

from cvdd.config_base import ConfigError
from cvdd.provenance import code_version

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
SESSIONS = ".sessions.json"


class DamagedArtifact(ConfigError):
    """An artefact on disk does not match its manifest."""


class StoreError(ConfigError):
    """The store cannot be written: no space, no permission, read-only."""


@dataclass(frozen=True)
class Artifact:
    """A sealed result.

    Attributes:
        path: its directory.
        manifest: kind, name, digest, identity, parents, files with checksums, metrics, code version and cost.
    """

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)

    @property
    def kind(self) -> str:
        """What it is, e.g. ``members`` or ``images``."""
        return str(self.manifest["kind"])

    @property
    def name(self) -> str:
        """Its readable name, without the digest."""
        return str(self.manifest["name"])

    @property
    def digest(self) -> str:
        """The hash of what determines it."""
        return str(self.manifest["digest"])

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What its build returned."""
        metrics: Mapping[str, Any] = self.manifest["metrics"]
        return metrics

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())


def digest_of(kind: str, identity: Mapping[str, Any], parents: Sequence[Artifact]) -> str:
    """Hash what determines an artefact: its kind, its part of the configuration and its parents."""
    content = {
        "format": FORMAT,
        "kind": kind,
        "identity": identity,
        "parents": [f"{parent.kind}:{parent.digest}" for parent in parents],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """A directory of artefacts, shared by any number of processes.

    Args:
        root: where it is; made on first use.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._verified: dict[Path, Artifact] = {}

    def make(
        self,
        kind: str,
        name: str,
        identity: Mapping[str, Any],
        parents: Sequence[Artifact],
        build: Callable[[Path], Mapping[str, Any]],
    ) -> Artifact:
        """Return the artefact with this identity; build it first if it is missing.

        Args:
            kind: sub-directory of the store.
            name: readable part of the directory's name.
            identity: JSON-able part of the configuration that changes the result.
            parents: artefacts that it is made from.
            build: writes files into the directory that it is given and returns JSON-able metrics. The directory
                survives an interruption, so a build that keeps its finished parts there goes on from them.

        Raises:
            DamagedArtifact: the artefact exists and does not match its checksums.
            StoreError: the store cannot be written.
        """
        digest = digest_of(kind, identity, parents)
        path = self.root / kind / f"{name}-{digest}"
        if (path / MANIFEST).exists():
            return self.open(path)
        with _store_errors(self.root), self._lock(kind, path.name):
            if (path / MANIFEST).exists():
                return self.open(path)
            work = self.root / kind / ".partial" / path.name
            work.mkdir(parents=True, exist_ok=True)
            log.info("making %s/%s", kind, path.name)
            started = time.monotonic()
            try:
                metrics = build(work)
            finally:
                sessions = _add_session(work, time.monotonic() - started)
            manifest = {
                "format": FORMAT,
                "kind": kind,
                "name": name,
                "digest": digest,
                "identity": identity,
                "parents": [{"kind": p.kind, "name": p.name, "digest": p.digest} for p in parents],
                "metrics": dict(metrics),
                "code": code_version(),
                "cost": {
                    "wall_seconds": round(sum(sessions), 3),
                    "sessions": len(sessions),
                    "peak_memory_bytes": _peak_memory(),
                },
            }
            _seal(work, path, manifest)
        return self.open(path)

    def open(self, path: Path) -> Artifact:
        """Open a sealed artefact and verify the checksum of each of its files (once per process).

        Raises:
            DamagedArtifact: a file is missing, changed, or of another size; the message says what to delete.
        """
        if path in self._verified:
            return self._verified[path]
        artifact = read_manifest(path)
        for problem in verify(artifact):
            raise DamagedArtifact(
                f"{path}: {problem}. Delete this directory and repeat the command; it will be made again."
            )
        self._verified[path] = artifact
        return artifact

    def artifacts(self) -> list[Artifact]:
        """List all sealed artefacts without verifying their files."""
        return [read_manifest(manifest.parent) for manifest in sorted(self.root.glob(f"*/*/{MANIFEST}"))]

    @contextlib.contextmanager
    def _lock(self, kind: str, name: str) -> Iterator[None]:
        folder = self.root / kind / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        # The operating system releases this lock when its owner dies, so a lock can never be stale.
        lock = filelock.FileLock(folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting: another process makes %s/%s", kind, name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def read_manifest(path: Path) -> Artifact:
    """Read an artefact's manifest without looking at its files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        artifact = Artifact(path, manifest)
        if path.name != f"{artifact.name}-{artifact.digest}":
            raise ValueError("it does not belong to this directory")
        for entry in manifest["files"].values():
            entry["bytes"], entry["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(
            f"{path}: {MANIFEST} cannot be read ({error}). Delete this directory and repeat the command."
        ) from error
    return artifact


def verify(artifact: Artifact) -> Iterator[str]:
    """Yield one sentence for every file of an artefact that is not what its manifest says."""
    root = artifact.path.resolve()
    for name, entry in artifact.manifest["files"].items():
        file = (artifact.path / name).resolve()
        if not file.is_relative_to(root):
            yield f"its manifest names a file outside the directory ({name})"
        elif not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        elif file_checksum(file) != entry["sha256"]:
            yield f"{name} does not match its checksum"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that after any interruption it is either absent (or the old one) or complete."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _seal(work: Path, path: Path, manifest: dict[str, Any]) -> None:
    (work / SESSIONS).unlink(missing_ok=True)
    for leftover in work.rglob("*.tmp"):
        leftover.unlink()
    files = {}
    for file in sorted(file for file in work.rglob("*") if file.is_file() and file.name != MANIFEST):
        _fsync(file)
        files[file.relative_to(work).as_posix()] = {"bytes": file.stat().st_size, "sha256": file_checksum(file)}
    manifest["files"] = files
    write_atomically(work / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    _fsync(work)
    if path.exists():
        # Only a directory without a manifest can be here: somebody deleted half of it.
        shutil.rmtree(path)
    work.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _add_session(work: Path, seconds: float) -> list[float]:
    file = work / SESSIONS
    with contextlib.suppress(OSError, ValueError):
        earlier = json.loads(file.read_text()) if file.exists() else []
        sessions = [*earlier, round(seconds, 3)]
        write_atomically(file, json.dumps(sessions).encode())
        return sessions
    return [seconds]


def _peak_memory() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


@contextlib.contextmanager
def _store_errors(root: Path) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to type; nothing sealed is touched by them."""
    try:
        with _safetensors_errors():
            yield
    except OSError as error:
        if isinstance(error.filename, str | os.PathLike) and not Path(error.filename).is_relative_to(root):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"no space left for {root}. Free some or choose another place with paths.store=DIR; "
                "finished units are kept and the same command goes on."
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise StoreError(
                f"{root} cannot be written ({error.strerror}). Choose another place: paths.store=DIR."
            ) from error
        raise
