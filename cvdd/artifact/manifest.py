"""What is known of an artefact: its manifest, and whether its files are what the manifest says."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvdd.artifact.places import digest_in, is_named, worked_in
from cvdd.support.config_base import ConfigError

FORMAT = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"

DELETE = "Delete this directory and repeat the command; it will be made again."
"""What to do about damage in a store of one's own."""
COPY = "Copy it again, whole and under its own name."
"""Likewise about what somebody else made."""


class DamagedArtifact(ConfigError):
    """An artefact on disk does not match its manifest."""


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
        return self.bytes_without()

    def bytes_without(self, *names: str) -> int:
        """Size of its files but those of these names."""
        return sum(int(entry["bytes"]) for name, entry in self.manifest["files"].items() if name not in names)


def digest_of(kind: str, identity: Mapping[str, Any], parents: Sequence[Artifact]) -> str:
    """Hash what determines an artefact: its kind, its part of the configuration and its parents."""
    content = {
        "format": FORMAT,
        "kind": kind,
        "identity": identity,
        "parents": [f"{parent.kind}:{parent.digest}" for parent in parents],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest, without the checksum that it may carry."""
    content = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sealed_as(path: Path) -> Path | None:
    """Return the directory of a sealed artefact: this one, or another of its digest, whatever name it was given there.

    Args:
        path: ``kind/name-digest`` inside a store.

    Returns:
        None if it is not sealed.
    """
    if (path / MANIFEST).exists():
        return path
    same = sorted(path.parent.glob(f"*-{digest_in(path)}/{MANIFEST}"))
    return same[0].parent if same else None


def read_manifest(path: Path, remedy: str = DELETE) -> Artifact:
    """Read an artefact's manifest without looking at its files.

    Args:
        path: of the artefact.
        remedy: what to do if it is damaged, for the message.

    Raises:
        DamagedArtifact: it cannot be read, is that of another directory, or was changed after it was sealed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        artifact = Artifact(path, manifest)
        if path.name != f"{artifact.name}-{artifact.digest}":
            raise ValueError("it does not belong to this directory")
        for entry in manifest["files"].values():
            entry["bytes"], entry["sha256"]
        # Manifests of earlier versions carry none.
        if manifest.get(CHECKSUM) not in (None, manifest_checksum(manifest)):
            raise ValueError("it was changed after it was sealed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedArtifact(f"{path}: {MANIFEST} cannot be read ({error}). {remedy}") from error
    return artifact


def parents_of(artifact: Artifact, kind: str | None = None) -> list[Artifact]:
    """Read the manifests of what an artefact was made from, as far as its store holds them whole.

    Args:
        artifact: sealed.
        kind: of the parents that are wanted; None for all.
    """
    found, root = [], artifact.path.parent.parent
    for parent in artifact.manifest["parents"]:
        if kind not in (None, parent["kind"]):
            continue
        path = sealed_as(root / parent["kind"] / f"{parent['name']}-{parent['digest']}")
        if path is not None:
            with contextlib.suppress(DamagedArtifact):
                found.append(read_manifest(path))
    return found


def kinds(root: Path) -> list[Path]:
    """List the directories of a store's root in which artefacts are, or were made; nothing else there is the store's.

    Those of a store that was copied without its locks are known by what is sealed in them.
    """
    sealed = {path.parents[1] for path in root.glob(f"*/*/{MANIFEST}") if is_named(path.parent)}
    return sorted({kind for kind in sealed if kind.name[0] != "."} | {*worked_in(root)})


def read_manifests(root: Path) -> Iterator[Artifact | DamagedArtifact]:
    """Yield every sealed artefact of a store, or why its manifest cannot be used."""
    for kind in kinds(root):
        yield from read_manifests_of(kind)


def read_manifests_of(kind: Path) -> Iterator[Artifact | DamagedArtifact]:
    """Yield every sealed artefact of a directory of :func:`kinds`, or why its manifest cannot be used."""
    for manifest in sorted(kind.glob(f"*/{MANIFEST}")):
        try:
            yield read_manifest(manifest.parent)
        except DamagedArtifact as error:
            yield error


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


def read_whole(path: Path, remedy: str = DELETE) -> Artifact:
    """Read an artefact's manifest and the checksums of all its files.

    Args:
        path: of the artefact.
        remedy: what to do if it is damaged, for the message.

    Raises:
        DamagedArtifact: see :func:`read_manifest`; or a file is missing, changed, or of another size.
    """
    artifact = read_manifest(path, remedy)
    for problem in verify(artifact):
        raise DamagedArtifact(f"{path}: {problem}. {remedy}")
    return artifact
