"""What can be removed from a store, and removing it without touching what a running process uses."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cvdd.artifact.claims import Claims
from cvdd.artifact.manifest import MANIFEST, Artifact, DamagedArtifact, kinds, read_manifests
from cvdd.artifact.places import PARTIAL, USERS, digest_in, is_named, kind_of, lock_file, part_locks, worked_in
from cvdd.artifact.uses import used_by_others


@dataclass(frozen=True)
class Removable:
    """A directory that could go.

    Attributes:
        path: the directory.
        why: what it is, for people.
        bytes: size of its files.
    """

    path: Path
    why: str
    bytes: int


def size_of(path: Path) -> int:
    """Return the bytes of all files of a directory; files that vanish meanwhile count nothing."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def children(artifacts: Sequence[Artifact]) -> dict[str, list[Artifact]]:
    """Return, by the digest of each artefact, the artefacts that are made from it."""
    by_parent: dict[str, list[Artifact]] = {artifact.digest: [] for artifact in artifacts}
    for artifact in artifacts:
        for parent in artifact.manifest["parents"]:
            by_parent.setdefault(parent["digest"], []).append(artifact)
    return by_parent


def unused(artifacts: Sequence[Artifact], unwanted: Collection[str]) -> list[Artifact]:
    """List the artefacts of some kinds that no artefact is made from, but for such as are listed themselves."""
    left, found = list(artifacts), list[Artifact]()
    while True:
        made_from = children(left)
        more = [artifact for artifact in left if artifact.kind in unwanted and not made_from[artifact.digest]]
        if not more:
            return found
        found += more
        left = [artifact for artifact in left if artifact not in more]


def unfinished(root: Path) -> list[Path]:
    """List the directories in which artefacts are being made, or were until they were interrupted."""
    return [path for kind in worked_in(root) for path in _directories(kind / PARTIAL)]


def half_deleted(root: Path) -> list[Path]:
    """List what is left of artefacts whose deletion was interrupted."""
    return [path for kind in worked_in(root) for path in _directories(kind) if not (path / MANIFEST).exists()]


def _directories(folder: Path) -> list[Path]:
    """List directories that are named as artefacts are; others are somebody's own, wherever they lie."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and is_named(path))


def is_store(root: Path) -> bool:
    """Whether a directory is a store: a process has used it as one, or artefacts are in it."""
    return (root / USERS).is_dir() or bool(kinds(root))


def removable(root: Path, unwanted: Collection[str]) -> list[Removable]:
    """List what could go: half-made and half-deleted directories, and unused artefacts of some kinds.

    Args:
        root: of the store.
        unwanted: kinds of artefacts that may go if nothing is made from them; none by default, because whether a result
            is still wanted is not written anywhere.

    Raises:
        DamagedArtifact: what a damaged manifest names as its parents cannot be known.
    """
    found = [Removable(path, "half made", size_of(path)) for path in unfinished(root)]
    found += [Removable(path, "half deleted", size_of(path)) for path in half_deleted(root)]
    if unwanted:
        found += [
            Removable(artifact.path, "unused", size_of(artifact.path)) for artifact in unused(sealed(root), unwanted)
        ]
    return found


def sealed(root: Path) -> list[Artifact]:
    """List the sealed artefacts.

    Raises:
        DamagedArtifact: the manifest of one of them cannot be used.
    """
    artifacts = list[Artifact]()
    for found in read_manifests(root):
        if isinstance(found, DamagedArtifact):
            raise found
        artifacts.append(found)
    return artifacts


def in_use(root: Path, claims: Claims, paths: Sequence[Path]) -> set[Path]:
    """Return those directories that a running process reads or makes."""
    others = _artefacts(used_by_others(root, claims))
    used = {path for path in paths if _artefact(path) in others}
    for path in paths:
        # Without the directory of the locks nobody holds one, and looking must not make it.
        if not lock_file(path).parent.is_dir():
            continue
        claim = claims.take(lock_file(path))
        if claim is None:
            used.add(path)
        else:
            claim.release()
    return used


def _artefact(path: Path) -> tuple[Path, str]:
    return kind_of(path), digest_in(path)


def _artefacts(paths: Collection[Path]) -> set[tuple[Path, str]]:
    """Return what directories belong to: those of one digest share their locks, whatever their names and places."""
    return {_artefact(path) for path in paths}


def remove(root: Path, claims: Claims, found: Sequence[Removable]) -> Iterator[tuple[Removable, bool]]:
    """Remove directories, and yield for each whether it went; what a running process uses stays.

    An artefact stops being one before its first file goes, so an interruption leaves what the next call removes.
    """
    for item in found:
        file = lock_file(item.path)
        # Missing only beside an artefact of a store that was copied without its locks.
        file.parent.mkdir(exist_ok=True)
        claim = claims.take(file)
        if claim is None:
            yield item, False
            continue
        try:
            # Asked again for each, under its lock: a process says what it uses before it looks for it.
            if _artefact(item.path) in _artefacts(used_by_others(root, claims)):
                yield item, False
                continue
            (item.path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(item.path)
            # Before anybody else can begin it again and hold some of them.
            shutil.rmtree(part_locks(item.path), ignore_errors=True)
        finally:
            claim.release()
        yield item, True
