"""``python -m cvdd.artifact``: the store is shown, checked and cleaned; nothing in use is touched."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import in_process, wait_for

from cvdd.artifact import MANIFEST, Artifact, DamagedArtifact, Maker, Parts, Store, digest_of
from cvdd.artifact.__main__ import main
from cvdd.artifact.cleaning import sealed
from cvdd.support.readable import readable_bytes


def build(work: Path) -> Mapping[str, Any]:
    (work / "data.bin").write_bytes(bytes(1500))
    return {}


def stop(work: Path) -> Mapping[str, Any]:
    (work / "half.bin").write_bytes(bytes(700))
    raise InterruptedError


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def chain(root: Path) -> tuple[Artifact, Artifact, Artifact]:
    """Images, labels made from them, a student of the labels; no process uses them any more."""
    store = Store(root)
    images = store.make("images", "digits", {}, [], build)
    labels = store.make("labels", "digits-soft", {}, [images], build)
    return images, labels, store.make("students", "resnet", {}, [images, labels], build)


@pytest.fixture
def partial(root: Path, chain: Any) -> Path:
    with pytest.raises(InterruptedError):
        Store(root).make("images", "others", {"other": True}, [], stop)
    (path,) = root.glob("images/.partial/*")
    return path


def size_of(folder: Path) -> int:
    """Bytes of a directory: what a build wrote, and the notes of its session."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def row_of(output: str, what: str) -> str:
    # A cell of several lines continues further to the right.
    (line,) = (line for line in output.splitlines() if line.startswith((what, f" {what}")))
    return line


def test_list_shows_sizes_parents_and_users(
    root: Path, chain: tuple[Artifact, ...], partial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels, student = chain
    assert main(["list", "--store", str(root)]) == 0
    output = capsys.readouterr().out
    row = row_of(output, f"labels/{labels.path.name}")
    assert "1.5 kB" in row
    assert row.index(f"images/{images.path.name}") < row.index(f"students/{student.path.name}")
    held = readable_bytes(size_of(partial))
    assert f"half made: images/.partial/{partial.name}, {held} (interrupted; the same command goes on)" in output
    assert "4.5 kB in 3 artefacts, 1 half made" in output


def test_list_of_some_kinds(
    root: Path, chain: tuple[Artifact, ...], partial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels, student = chain
    assert main(["list", "labels", "students", "--store", str(root)]) == 0
    output = capsys.readouterr().out
    # What they are made from is named, but has no line of its own.
    assert f"images/{images.path.name}" in row_of(output, f"labels/{labels.path.name}")
    assert not [line for line in output.splitlines() if line.strip().startswith("images/")]
    assert row_of(output, f"students/{student.path.name}")
    assert "in 2 artefacts, 0 half made" in output
    assert main(["list", "images", "--store", str(root)]) == 0
    assert "in 1 artefacts, 1 half made" in capsys.readouterr().out
    assert main(["list", "label", "--store", str(root)]) == 2
    assert "list label: " in (said := capsys.readouterr().err)
    assert "has no such kind; choose from images, labels, students" in said


def test_the_store_is_that_of_the_commands(
    root: Path, chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CVDD_STORE", str(root))
    assert main(["verify"]) == 0
    monkeypatch.delenv("CVDD_STORE")
    monkeypatch.chdir(tmp_path)
    assert main(["verify"]) == 0
    assert capsys.readouterr().out.splitlines() == ["3 artefacts: all files match their checksums"] * 2


def test_a_store_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--store", str(tmp_path / "nowhere")]) == 2
    assert f"there is no store at {tmp_path / 'nowhere'}; say where it is with --store DIR" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def everything(folder: Path) -> dict[str, bytes | None]:
    """All that lies in a directory, with its content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def work_of_somebody(folder: Path) -> None:
    """What people have beside a store, or take for one."""
    for name in ("src/pkg", "docs/img", "app/.partial/upload", "web", "builds/nightly-0123456789ab", ".git/objects"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file.txt").write_text("precious")
    (folder / "docs/img" / MANIFEST).write_text('{"name": "a page"}')


@pytest.mark.parametrize("arguments", [["list"], ["verify"], ["gc"], ["gc", "--delete"]])
def test_a_directory_that_is_no_store_is_refused_and_left_alone(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work_of_somebody(tmp_path)
    before = everything(tmp_path)
    assert main([*arguments, "--store", str(tmp_path)]) == 2
    message = f"{tmp_path} is no store, for nothing in it was made by cvdd; say where it is with --store DIR"
    assert message in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_the_directories_around_and_in_a_store_are_none(
    root: Path, chain: tuple[Artifact, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(root)
    for place in (root.parent, root / "images", chain[0].path):
        assert main(["gc", "--delete", "--store", str(place)]) == 2
        assert f"{place} is no store" in capsys.readouterr().err
    assert everything(root) == before


@pytest.mark.parametrize("inside", ["", "images"])
def test_what_is_not_of_the_store_stays_in_it(
    inside: str, root: Path, chain: tuple[Artifact, ...], partial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside its kinds, and in one of them."""
    work_of_somebody(root / "more")
    (chain[2].path / MANIFEST).unlink()
    for path in sorted((root / "more").iterdir()):
        path.rename(root / inside / path.name)
    (root / "more").rmdir()
    # Earlier versions left it wherever they looked.
    (root / inside / "src" / ".locks").mkdir()
    mine = [path for path in sorted((root / inside).iterdir()) if path.name in ("src", "docs", "app", "web", "builds")]
    before = [everything(path) for path in mine]
    assert main(["list", "--store", str(root)]) == 0
    assert "in 2 artefacts, 1 half made" in capsys.readouterr().out
    assert main(["verify", "--store", str(root)]) == 0
    assert main(["gc", "--unused", "labels", "--delete", "--store", str(root)]) == 0
    assert not partial.exists()
    assert not chain[2].path.exists()
    assert not chain[1].path.exists()
    assert [everything(path) for path in mine] == before


def test_a_store_that_was_copied_without_its_locks(
    root: Path, chain: tuple[Artifact, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".*"))
    before = everything(copy)
    assert main(["verify", "--store", str(copy)]) == 0
    assert main(["gc", "--unused", "labels", "--store", str(copy)]) == 0
    capsys.readouterr()
    assert main(["gc", "--unused", "students", "--store", str(copy)]) == 0
    assert row_of(capsys.readouterr().out, f"students/{chain[2].path.name}").split()[-1] == "yes"
    assert everything(copy) == before
    assert main(["gc", "--unused", "students", "--delete", "--store", str(copy)]) == 0
    assert not (copy / "students" / chain[2].path.name).exists()


def test_verify_names_what_is_damaged(
    root: Path, chain: tuple[Artifact, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels, _ = chain
    (images.path / "data.bin").write_bytes(bytes(1499) + b"1")
    (labels.path / MANIFEST).write_text("{")
    assert main(["verify", "--store", str(root)]) == 1
    output = capsys.readouterr().out
    assert f"{images.path}: data.bin does not match its checksum. Delete this directory" in output
    assert f"{labels.path}: manifest.json cannot be read" in output
    assert "3 artefacts: 2 problems" in output
    assert main(["list", "--store", str(root)]) == 1


def test_gc_only_shows_unless_told_otherwise(root: Path, partial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", "--store", str(root)]) == 0
    output = capsys.readouterr().out
    assert row_of(output, f"images/.partial/{partial.name}").split()[-1] == "yes"
    held = readable_bytes(size_of(partial))
    assert f"{held} would be freed; nothing was removed. Add --delete to do it." in output
    assert (partial / "half.bin").exists()


def test_gc_removes_what_is_half(
    root: Path, chain: tuple[Artifact, ...], partial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chain[2].path / MANIFEST).unlink()
    held = readable_bytes(size_of(partial) + size_of(chain[2].path))
    assert main(["gc", "--store", str(root), "--delete"]) == 0
    assert f"{held} freed" in capsys.readouterr().out
    assert not partial.exists()
    assert not chain[2].path.exists()
    assert {artifact.digest for artifact in sealed(root)} == {chain[0].digest, chain[1].digest}
    assert main(["gc", "--store", str(root), "--delete"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kinds", "left"),
    [
        (["images", "labels"], {"images", "labels", "students"}),
        (["students"], {"images", "labels"}),
        (["students", "labels"], {"images"}),
        (["students", "images"], {"images", "labels"}),
    ],
)
def test_gc_removes_unused_artefacts_of_the_kinds_that_are_named(
    kinds: list[str], left: set[str], root: Path, chain: Any
) -> None:
    """What another artefact is made from stays, unless that one goes too."""
    assert main(["gc", "--store", str(root), "--unused", *kinds, "--delete"]) == 0
    assert {artifact.kind for artifact in sealed(root)} == left


def test_gc_refuses_a_kind_that_is_not_there(root: Path, chain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", "--store", str(root), "--unused", "label"]) == 2
    assert "--unused label:" in (error := capsys.readouterr().err)
    assert "choose from images, labels, students" in error


def test_gc_refuses_to_guess_what_a_damaged_manifest_was_made_from(
    root: Path, chain: tuple[Artifact, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (chain[2].path / MANIFEST).write_text("{")
    assert main(["gc", "--store", str(root), "--unused", "labels", "--delete"]) == 2
    assert "manifest.json cannot be read" in capsys.readouterr().err
    assert chain[1].path.exists()


def use(root: Path, ready: Path) -> None:
    """A process that reads the labels and makes a student of them, and takes its time."""

    def slow(work: Path) -> Mapping[str, Any]:
        (work / "half.bin").touch()
        ready.touch()
        time.sleep(60)
        return {}

    store = Store(root)
    images = store.make("images", "digits", {}, [], build)
    labels = store.make("labels", "digits-soft", {}, [images], build)
    store.make("students", "another", {}, [images, labels], slow)


def test_gc_leaves_what_a_running_process_uses(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = in_process(use, root, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    command = ["gc", "--store", str(root), "--unused", "images", "labels"]
    for arguments in (command, [*command, "--delete"]):
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert output.count("no: a running process uses it") == 3
        assert "0 B" in output
    main(["list", "--store", str(root)])
    assert "(being made)" in capsys.readouterr().out
    process.kill()
    process.join()
    assert main([*command, "--delete"]) == 0
    assert sealed(root) == []
    assert list(root.glob("*/.partial/*")) == []
    assert list((root / ".users").iterdir()) == []


def share(root: Path, ready: Path) -> None:
    """A process that makes a part of labels, and takes its time."""

    @contextlib.contextmanager
    def maker(work: Path) -> Iterator[Maker]:
        def slow(index: int) -> None:
            ready.touch()
            time.sleep(60)

        yield Maker(slow)

    parts = Parts(["one"], lambda work, index: False, maker)
    Store(root).make_parts("labels", "mine", {}, [], parts, build)


def test_gc_leaves_the_locks_of_parts_that_are_being_made(root: Path, tmp_path: Path) -> None:
    """What is left of the same artefact under another name has the same locks."""
    digest = digest_of("labels", {}, [])
    rest = root / "labels" / f"theirs-{digest}"
    rest.mkdir(parents=True)
    process = in_process(share, root, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    (lock,) = (root / "labels" / ".locks").glob("*.parts/*")
    assert main(["gc", "--store", str(root), "--delete"]) == 0
    assert lock.exists()
    assert rest.exists()
    process.kill()
    process.join()
    assert main(["gc", "--store", str(root), "--delete"]) == 0
    assert not lock.exists()
    assert list((root / "labels").glob("*-*")) == list((root / "labels" / ".partial").iterdir()) == []


def test_an_artefact_is_no_longer_one_before_its_files_go(
    root: Path, chain: tuple[Artifact, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cvdd.artifact.cleaning.shutil.rmtree", interrupted)
    assert main(["gc", "--store", str(root), "--unused", "students", "--delete"]) == 130
    assert {artifact.kind for artifact in sealed(root)} == {"images", "labels"}
    with pytest.raises(DamagedArtifact):
        Store(root).open(chain[2].path)


LONG = "cifar100-" + "resnet18-" * 6 + "end"


@pytest.fixture
def long_names(root: Path) -> list[Artifact]:
    images = Store(root).make("images", LONG, {}, [], build)
    return [images, Store(root).make("labels", LONG, {}, [images], build)]


def test_in_a_pipe_no_name_is_folded(
    root: Path, long_names: list[Artifact], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS")
    assert main(["list", "--store", str(root)]) == 0
    images, labels = (f"{artifact.kind}/{artifact.path.name}" for artifact in long_names)
    output = capsys.readouterr().out
    assert all(part in row_of(output, images) for part in (images, "1.5 kB", labels))
    assert images in row_of(output, labels)
    assert f"{root}: 2 artefacts\n" in output
    assert main(["gc", "--unused", "labels", "--store", str(root)]) == 0
    row = row_of(capsys.readouterr().out, labels)
    assert row.rstrip().endswith(("yes", "no: a running process uses it"))


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_in_a_terminal_other_columns_are_folded(
    columns: str,
    root: Path,
    long_names: list[Artifact],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert main(["list", "--store", str(root)]) == 0
    output = capsys.readouterr().out
    images, labels = (f"{artifact.kind}/{artifact.path.name}" for artifact in long_names)
    assert "1.5 kB" in row_of(output, images)
    assert labels not in row_of(output, images)
