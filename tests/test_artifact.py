"""The store: complete or absent, refused when damaged, made once by any number of processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import cvdd.artifact.sealing
from cvdd.artifact import (
    MANIFEST,
    Artifact,
    DamagedArtifact,
    Parts,
    Store,
    StoreError,
    digest_of,
    file_checksum,
    write_atomically,
)
from cvdd.artifact.cleaning import sealed
from cvdd.artifact.files import fsync
from cvdd.artifact.manifest import manifest_checksum, read_manifest

IDENTITY = {"size": 3, "seed": 0}


def build(work: Path) -> Mapping[str, Any]:
    (work / "inner").mkdir(exist_ok=True)
    (work / "inner" / "numbers.bin").write_bytes(bytes(range(100)))
    (work / "words.txt").write_text("some words")
    (work / "rest.tmp").write_text("left over")
    return {"answer": 42}


def make(store: Store, build: Any = build, identity: Any = IDENTITY, parents: Any = ()) -> Artifact:
    return store.make("things", "thing", identity, parents, build)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a store")


@pytest.fixture
def artifact(store: Store) -> Artifact:
    return make(store)


def reopened(artifact: Artifact) -> Artifact:
    """As another process sees it: this one has verified it already."""
    return make(Store(artifact.path.parents[1]), build=lambda work: pytest.fail("built again"))


# --- what is sealed ---------------------------------------------------------------------------------------------------


def test_an_artefact_lists_its_files_with_checksums(artifact: Artifact) -> None:
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    assert sorted(manifest["files"]) == ["inner/numbers.bin", "words.txt"]
    entry = manifest["files"]["words.txt"]
    assert entry == {"bytes": 10, "sha256": file_checksum(artifact.path / "words.txt")}
    assert artifact.bytes == 110
    assert artifact.metrics["answer"] == 42
    assert (artifact.kind, artifact.name) == ("things", "thing")
    assert artifact.path.name == f"thing-{artifact.digest}"
    assert manifest["cost"]["sessions"] == 1
    assert manifest["code"]["torch"] == metadata.version("torch")


def test_nothing_is_left_beside_it(artifact: Artifact) -> None:
    assert [path.name for path in artifact.path.iterdir() if path.name.endswith(".tmp")] == []
    assert list((artifact.path.parent / ".partial").iterdir()) == []


def test_all_of_it_is_on_disk_before_it_has_its_place(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that loses its power keeps a file only if the names that lead to it were written too."""
    synced: list[Path] = []

    def watched(path: Path) -> None:
        synced.append(path)
        fsync(path)

    def nested(work: Path) -> Mapping[str, Any]:
        (work / "inner" / "most").mkdir(parents=True)
        (work / "inner" / "most" / "numbers.bin").write_bytes(bytes(100))
        return build(work)

    monkeypatch.setattr(cvdd.artifact.sealing, "fsync", watched)
    path = make(store, nested).path
    work = path.parent / ".partial" / path.name
    assert synced[-1] == path.parent
    assert {work, work / "inner", work / "inner" / "most"} <= set(synced[:-1])
    assert {work / name for name in read_manifest(path).manifest["files"]} <= set(synced[:-1])


def test_the_second_call_opens_it(artifact: Artifact) -> None:
    assert reopened(artifact).digest == artifact.digest


def test_another_name_opens_it_too(store: Store, artifact: Artifact) -> None:
    def never(work: Path) -> Mapping[str, Any]:
        raise AssertionError("it is there")

    assert store.make("things", "the same thing", IDENTITY, [], never).path == artifact.path
    parts = Parts(["one"], lambda work, index: False, lambda work: contextlib.nullcontext(never))
    assert store.make_parts("things", "in parts", IDENTITY, [], parts, never).path == artifact.path
    assert store.make("things", "thing", {**IDENTITY, "seed": 1}, [], build).path != artifact.path


def test_the_digest_covers_kind_identity_and_parents(artifact: Artifact) -> None:
    digests = {
        digest_of("things", IDENTITY, []),
        digest_of("others", IDENTITY, []),
        digest_of("things", {**IDENTITY, "seed": 1}, []),
        digest_of("things", IDENTITY, [artifact]),
        digest_of("things", IDENTITY, [artifact, artifact]),
    }
    assert len(digests) == 5
    assert digest_of("things", {"seed": 0, "size": 3}, []) == artifact.digest


@pytest.mark.parametrize("name", ["a/b", "../../../escaped", "/escaped"])
def test_a_name_cannot_lead_out_of_its_directory(name: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the name of an artefact"):
        store.make("things", name, IDENTITY, [], build)
    assert not list(tmp_path.rglob("*.txt"))


def test_parents_are_recorded(store: Store, artifact: Artifact) -> None:
    child = make(store, parents=[artifact])
    assert child.manifest["parents"] == [{"kind": "things", "name": "thing", "digest": artifact.digest}]
    assert child.digest != artifact.digest
    assert {found.digest for found in sealed(store.root)} == {artifact.digest, child.digest}


def test_an_interrupted_build_goes_on_in_its_directory(store: Store) -> None:
    def stops(work: Path) -> Mapping[str, Any]:
        (work / "half.txt").write_text("first half")
        raise KeyboardInterrupt

    def goes_on(work: Path) -> Mapping[str, Any]:
        assert (work / "half.txt").read_text() == "first half"
        return {}

    with pytest.raises(KeyboardInterrupt):
        make(store, stops)
    assert sealed(store.root) == []
    artifact = make(store, goes_on)
    assert sorted(artifact.manifest["files"]) == ["half.txt"]
    assert artifact.manifest["cost"]["sessions"] == 2


def test_writing_atomically_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken disk"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_several_may_write_the_same_file_at_once(tmp_path: Path) -> None:
    contents = [bytes([value]) * 10_000 for value in range(8)]
    with ThreadPoolExecutor(len(contents)) as threads:
        for _ in range(20):
            list(threads.map(partial(write_atomically, tmp_path / "file"), contents))
            assert (tmp_path / "file").read_bytes() in contents


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": (flip, r"numbers\.bin does not match its checksum"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"numbers\.bin has 99 bytes instead of 100"),
    "missing": (lambda path: path.unlink(), r"numbers\.bin is missing"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), r"numbers\.bin is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_what_to_delete(damage: str, artifact: Artifact) -> None:
    change, message = DAMAGES[damage]
    change(artifact.path / "inner" / "numbers.bin")
    with pytest.raises(DamagedArtifact, match=rf"{re.escape(str(artifact.path))}: .*{message}\. Delete this directory"):
        reopened(artifact)


def test_after_deleting_it_is_made_again(artifact: Artifact) -> None:
    flip(artifact.path / "words.txt")
    shutil.rmtree(artifact.path)
    again = make(Store(artifact.path.parents[1]))
    assert (again.path / "words.txt").read_text() == "some words"


def test_a_half_deleted_directory_is_made_again(artifact: Artifact) -> None:
    (artifact.path / MANIFEST).unlink()
    (artifact.path / "words.txt").unlink()
    again = make(Store(artifact.path.parents[1]))
    assert (again.path / "words.txt").read_text() == "some words"
    assert again.digest == artifact.digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"[1, 2]",
        b"{}",
        b"\xff\xfe\x00",
        b'{"name": "thing", "digest": "000000000000", "files": {}}',
        b'{"name": "thing", "digest": "DIGEST", "files": [1]}',
        b'{"name": "thing", "digest": "DIGEST", "files": {"words.txt": 3}}',
        b'{"name": "thing", "digest": "DIGEST", "files": {"words.txt": {"bytes": 10}}}',
        b'{"name": "thing", "digest": "", "files": {}}',
    ],
)
def test_a_garbled_manifest(content: bytes, artifact: Artifact) -> None:
    (artifact.path / MANIFEST).write_bytes(content.replace(b"DIGEST", artifact.digest.encode()))
    with pytest.raises(DamagedArtifact, match=r"manifest\.json cannot be read .*Delete this directory"):
        reopened(artifact)


def change(artifact: Artifact, **changes: Any) -> None:
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    (artifact.path / MANIFEST).write_text(json.dumps(manifest | changes))


def test_a_manifest_that_was_changed_by_hand(artifact: Artifact) -> None:
    change(artifact, metrics={"answer": 43})
    with pytest.raises(DamagedArtifact, match="was changed after it was sealed.*Delete this directory"):
        reopened(artifact)


def test_the_layout_of_a_manifest_is_not_part_of_its_checksum(artifact: Artifact) -> None:
    change(artifact)
    assert reopened(artifact).metrics["answer"] == 42


def test_a_manifest_of_an_earlier_version_has_no_checksum(artifact: Artifact) -> None:
    change(artifact, checksum=None)
    assert reopened(artifact).metrics["answer"] == 42


@pytest.mark.parametrize("name", ["../../outside.txt", "/etc/hostname", "inner/../../x"])
def test_a_manifest_cannot_point_outside(name: str, artifact: Artifact) -> None:
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["words.txt"]
    manifest["checksum"] = manifest_checksum(manifest)
    (artifact.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DamagedArtifact, match="names a file outside the directory"):
        reopened(artifact)


def test_a_link_cannot_point_outside(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_text("some words")
    (artifact.path / "words.txt").unlink()
    (artifact.path / "words.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(DamagedArtifact, match="names a file outside the directory"):
        reopened(artifact)


# --- a store that cannot be written -----------------------------------------------------------------------------------

FULL = "no space left for .*paths.store=DIR; finished units are kept and the same command goes on"
READ_ONLY = "cannot be written .*Choose another place: paths.store=DIR"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, FULL),
        (errno.EDQUOT, FULL),
        (errno.EROFS, READ_ONLY),
        (errno.EACCES, READ_ONLY),
        (errno.EPERM, READ_ONLY),
    ],
)
def test_refusals_of_the_system_say_what_to_type(number: int, message: str, store: Store) -> None:
    def refused(work: Path) -> Mapping[str, Any]:
        (work / "half.txt").write_text("kept")
        raise OSError(number, os.strerror(number), str(work / "rest.txt"))

    def finish(work: Path) -> Mapping[str, Any]:
        return {"found": (work / "half.txt").read_text()}

    with pytest.raises(StoreError, match=message):
        make(store, refused)
    assert make(store, finish).metrics["found"] == "kept"


def test_a_directory_that_cannot_be_made(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(StoreError, match=READ_ONLY):
        make(store)


def test_a_full_disk_while_sealing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(cvdd.artifact.sealing, "write_atomically", full)
        with pytest.raises(StoreError, match=FULL):
            make(store)
    assert make(store).metrics["answer"] == 42


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file here that is always full")
def test_a_full_disk_without_a_name_may_be_that_of_the_output(store: Store) -> None:
    """As the system refuses a write into an open file, of the artefact's or of a log beside it."""

    def full(work: Path) -> Mapping[str, Any]:
        Path("/dev/full").write_text("a row")
        return {}

    with pytest.raises(StoreError, match=r"the run's output\. Free some .*paths\.output=DIR or paths\.store=DIR"):
        make(store, full)


def test_a_disk_that_became_read_only_without_a_name_may_be_that_of_the_output(store: Store) -> None:
    """As the system refuses a write into a file that was opened before."""

    def refused(work: Path) -> Mapping[str, Any]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(StoreError, match=r"the run's output cannot be written .*paths\.output=DIR or paths\.store=DIR"):
        make(store, refused)


def test_a_full_disk_in_the_words_of_safetensors(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports the system's error in an exception of its own."""

    def full(work: Path) -> Mapping[str, Any]:
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(StoreError, match=FULL):
        make(store, full)


def test_safetensors_reports_errors_in_these_words(store: Store) -> None:
    """The text that the test above imitates, from a real refusal."""

    def missing(work: Path) -> Mapping[str, Any]:
        save_file({"a": torch.zeros(2)}, work / "no such directory" / "file.safetensors")
        return {}

    with pytest.raises(FileNotFoundError):
        make(store, missing)


def test_an_error_elsewhere_is_not_blamed_on_the_store(store: Store, tmp_path: Path) -> None:
    def unreadable(work: Path) -> Mapping[str, Any]:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data" / "image.png"))

    with pytest.raises(PermissionError, match=r"image\.png"):
        make(store, unreadable)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_permission_for_nothing_that_has_a_name_is_not_blamed_on_the_store(number: int, store: Store) -> None:
    """As a device, a socket or a signal to another process is refused."""

    def refused(work: Path) -> Mapping[str, Any]:
        raise PermissionError(number, os.strerror(number))

    with pytest.raises(PermissionError, match=os.strerror(number)):
        make(store, refused)
