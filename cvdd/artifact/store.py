"""The store finds artefacts, and makes those that are missing exactly once."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from cvdd.artifact.files import store_errors
from cvdd.artifact.manifest import FORMAT, MANIFEST, Artifact, DamagedArtifact, digest_of, read_manifest, verify
from cvdd.artifact.sealing import add_session, peak_memory, seal
from cvdd.provenance import code_version

log = logging.getLogger(__name__)


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
        with store_errors(self.root), self._lock(kind, path.name):
            if (path / MANIFEST).exists():
                return self.open(path)
            work = self.root / kind / ".partial" / path.name
            work.mkdir(parents=True, exist_ok=True)
            log.info("making %s/%s", kind, path.name)
            started = time.monotonic()
            try:
                metrics = build(work)
            finally:
                sessions = add_session(work, time.monotonic() - started)
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
                    "peak_memory_bytes": peak_memory(),
                },
            }
            seal(work, path, manifest)
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
