"""The store finds artefacts, and makes those that are missing exactly once."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvdd.artifact.claims import claims_for, held
from cvdd.artifact.files import store_errors
from cvdd.artifact.manifest import (
    DELETE,
    FORMAT,
    Artifact,
    digest_of,
    read_manifest,
    read_whole,
    sealed_as,
)
from cvdd.artifact.parts import Parts, Table, make_open_parts, reopen_missing
from cvdd.artifact.peak import peak_memory
from cvdd.artifact.places import built_in, lock_file, part_locks
from cvdd.artifact.sealing import seal
from cvdd.artifact.sessions import Session, machine_seconds, process_seconds, read_sessions, wall_seconds
from cvdd.artifact.uses import Uses
from cvdd.support.provenance import code_version

log = logging.getLogger(__name__)

Finish = Callable[[Path], Mapping[str, Any]]


class Store:
    """A directory of artefacts, shared by any number of processes.

    Args:
        root: where it is; made on first use.
        machine: what computes, as manifests will name it.
    """

    def __init__(self, root: Path, machine: str = "") -> None:
        self.root, self.machine = Path(root), machine
        self.claims = claims_for(self.root)
        self._uses = Uses(self.root, self.claims)
        self._verified: dict[Path, Artifact] = {}

    @property
    def opened(self) -> list[Artifact]:
        """Artefacts that this process found or made so far."""
        return list(self._verified.values())

    @property
    def user(self) -> str:
        """Name of this process in the store."""
        return self._uses.user

    def make(
        self,
        kind: str,
        name: str,
        identity: Mapping[str, Any],
        parents: Sequence[Artifact],
        build: Finish,
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
        making = _Making(kind, name, digest_of(kind, identity, parents), identity, parents)
        path = making.path(self.root)
        if (sealed := sealed_as(path)) is not None:
            return self.open(sealed)
        with store_errors(self.root), self._lock(path):
            # Others may have made it meanwhile, under this name or another.
            if (sealed := sealed_as(path)) is not None:
                return self.open(sealed)
            work = self._begin(path)
            session = Session(work, self.machine)
            try:
                metrics = build(work)
            finally:
                session.note(last=True)
            seal(work, path, making.manifest(work, metrics))
        return self.open(path)

    def make_parts(
        self,
        kind: str,
        name: str,
        identity: Mapping[str, Any],
        parents: Sequence[Artifact],
        parts: Parts,
        finish: Finish,
    ) -> Artifact:
        """Return the artefact with this identity; if it is missing, make it together with whoever else wants it.

        Every process makes parts that nobody else holds, waits for those of others, and takes over what a dead one
        dropped. One of them seals the artefact. A slow or lost process delays nothing but its own part.

        Args:
            kind: sub-directory of the store.
            name: readable part of the directory's name.
            identity: JSON-able part of the configuration that changes the result.
            parents: artefacts that it is made from.
            parts: how its parts are made; they follow from the identity.
            finish: called by one process when all parts are there; returns JSON-able metrics.

        Raises:
            DamagedArtifact: the artefact exists and does not match its checksums.
            StoreError: the store cannot be written.
        """
        making = _Making(kind, name, digest_of(kind, identity, parents), identity, parents)
        path = making.path(self.root)
        if (sealed := sealed_as(path)) is not None:
            return self.open(sealed)
        folder = part_locks(path)
        with store_errors(self.root):
            watched = False
            while (sealed := sealed_as(path)) is None:
                with self._lock(path):
                    if sealed_as(path) is not None:
                        continue
                    work = self._begin(path)
                    if not Table(work).fits(len(parts.names)):
                        parts.prepare(work)
                        Table(work).create(len(parts.names))
                session, watched = Session(work, self.machine), True
                try:
                    make_open_parts(parts, work, self.claims, folder, session)
                except FileNotFoundError:
                    if Table(work).fits(len(parts.names)):
                        raise
                    # Others finished it between two looks of this process, and seal it.
                    continue
                with self._lock(path):
                    if sealed_as(path) is not None:
                        continue
                    # Not without the lock: another process may be sealing the directory that it is written to.
                    session.note(last=True)
                    if reopen_missing(parts, work):
                        continue
                    seal(work, path, making.manifest(work, finish(work)))
                    shutil.rmtree(folder, ignore_errors=True)
            if watched:
                # It was sealed just now: reading all of it again in every process would find nothing new.
                self._uses.note(sealed)
                self._verified[sealed] = read_manifest(sealed)
        return self.open(sealed)

    def sealed(self, kind: str, identity: Mapping[str, Any], parents: Sequence[Artifact]) -> Path | None:
        """Return where the artefact with this identity is; None if it is not made.

        Args:
            kind: see :meth:`make`.
            identity: likewise.
            parents: likewise.
        """
        # Whatever its name is there.
        return sealed_as(self.root / kind / f"any-{digest_of(kind, identity, parents)}")

    def open(self, path: Path, remedy: str = DELETE) -> Artifact:
        """Open a sealed artefact and verify the checksum of each of its files (once per process).

        Args:
            path: of the artefact.
            remedy: what to do if it is damaged, for the message.

        Raises:
            DamagedArtifact: a file is missing, changed, or of another size; the message says what to delete.
        """
        if path in self._verified:
            return self._verified[path]
        self._uses.note(path)
        artifact = read_whole(path, remedy)
        self._verified[path] = artifact
        return artifact

    def _begin(self, path: Path) -> Path:
        """Return the directory in which an artefact is built; its lock is held."""
        work = built_in(path)
        self._uses.note(work)
        work.mkdir(parents=True, exist_ok=True)
        log.info("making %s/%s", path.parent.name, path.name)
        return work

    def _lock(self, path: Path) -> AbstractContextManager[None]:
        """Hold an artefact, so that only one process makes or seals it."""
        return held(self.claims, lock_file(path), f"{path.parent.name}/{path.name}")


@dataclass(frozen=True)
class _Making:
    """What is known of an artefact before it is made."""

    kind: str
    name: str
    digest: str
    identity: Mapping[str, Any]
    parents: Sequence[Artifact]

    def path(self, root: Path) -> Path:
        directory = f"{self.name}-{self.digest}"
        if Path(directory).name != directory:
            # Names are checked with the configuration; none may lead out of the store all the same.
            raise ValueError(f"{self.name!r} cannot be the name of an artefact: it is part of one directory's name")
        return root / self.kind / directory

    def manifest(self, work: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
        sessions = read_sessions(work)
        return {
            "format": FORMAT,
            "kind": self.kind,
            "name": self.name,
            "digest": self.digest,
            "identity": self.identity,
            "parents": [{"kind": p.kind, "name": p.name, "digest": p.digest} for p in self.parents],
            "metrics": dict(metrics),
            "code": code_version(),
            "cost": {
                "wall_seconds": round(wall_seconds(sessions), 3),
                "process_seconds": round(process_seconds(sessions), 3),
                "sessions": len(sessions),
                # Of the process that needed most.
                "peak_memory_bytes": max((span.peak for span in sessions), default=0) or peak_memory(),
                "machines": machine_seconds(sessions),
            },
        }
