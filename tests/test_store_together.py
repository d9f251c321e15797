"""An artefact is made once by any number of processes, whatever each of them calls it."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_artifact import IDENTITY, build, make, reopened

from cvdd.artifact import Artifact, Store, digest_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "a store")


def slow_build(work: Path) -> Mapping[str, Any]:
    with (work.parents[2] / "builds.log").open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    time.sleep(0.5)
    (work / "made.txt").write_text(str(os.getpid()))
    return {}


def make_in_process(root: Path, results: Any) -> None:
    artifact = make(Store(root), slow_build)
    results.put((os.getpid(), (artifact.path / "made.txt").read_text()))


def test_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=make_in_process, args=(tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert len((tmp_path / "builds.log").read_text().splitlines()) == 1
    assert len({process for process, _ in found}) == 3
    assert len({maker for _, maker in found}) == 1


def test_two_names_for_the_same_thing_are_made_once(tmp_path: Path) -> None:
    """An artefact is what its digest says, so whoever wants it under another name waits for it too."""
    found: list[Artifact] = []

    def wanted_as(name: str) -> None:
        found.append(Store(tmp_path).make("things", name, IDENTITY, [], slow_build))

    threads = [threading.Thread(target=wanted_as, args=(name,)) for name in ("cvdd", "mine", "a-third")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len((tmp_path / "builds.log").read_text().splitlines()) == 1
    assert len({artifact.path for artifact in found}) == 1
    assert len(found) == 3
    assert len(list((tmp_path / "things").glob("*-*"))) == 1


def test_an_interrupted_build_goes_on_under_another_name(store: Store) -> None:
    def stops(work: Path) -> Mapping[str, Any]:
        (work / "half.txt").write_text("first half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(store, stops)
    things = store.root / "things"
    assert [path.name.partition("-")[0] for path in (things / ".partial").iterdir()] == ["thing"]
    artifact = Store(store.root).make("things", "mine", IDENTITY, [], build)
    assert artifact.path.name == f"mine-{artifact.digest}"
    assert sorted(artifact.manifest["files"]) == ["half.txt", "inner/numbers.bin", "words.txt"]
    assert list((things / ".partial").iterdir()) == []
    assert reopened(artifact).path == artifact.path


@pytest.mark.parametrize("claims", ["locks", "leases"])
def test_locks_of_earlier_versions_stop_nobody(
    claims: str, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They had the artefact's name in front."""
    caplog.set_level("INFO")
    monkeypatch.setenv("CVDD_CLAIMS", claims)
    old = store.root / "things" / ".locks" / f"thing-{digest_of('things', IDENTITY, [])}.lock"
    old.parent.mkdir(parents=True)
    for file in (old, old.with_name(f"{old.name}.0")):
        file.write_text("another-host 4711\n")
    assert make(Store(store.root)).metrics["answer"] == 42
    assert "waiting" not in caplog.text


def die_in_process(root: Path) -> None:
    def dies(work: Path) -> Mapping[str, Any]:
        (work / "half.txt").write_text("first half")
        os._exit(1)

    make(Store(root), dies)


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("fork").Process(target=die_in_process, args=(tmp_path,))
    worker.start()
    worker.join(timeout=60)
    assert worker.exitcode == 1
    assert (make(Store(tmp_path)).path / "half.txt").read_text() == "first half"
