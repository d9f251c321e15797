"""Parts of an artefact are shared by processes: each is made once, and what a dead process dropped is taken over."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import ends, in_process, wait_for

from benchmarks.claims import Simulation, simulate
from cvdd.artifact import MANIFEST, Artifact, Maker, Parts, Store, StoreError
from cvdd.artifact.claims import Locks
from cvdd.artifact.parts import FINISHED, OPEN, TAKEN, Table
from cvdd.artifact.sessions import Session
from cvdd.labels.store import SAMPLES_OF_A_BLOCK, LabelLayout

IDENTITY = {"parts": 4}


def parts_of(make: Callable[[Path, int], None], count: int = 4, passed: Any = lambda indices: None) -> Parts:
    """Part i is the file ``part<i>``."""

    @contextlib.contextmanager
    def maker(work: Path) -> Iterator[Maker]:
        yield Maker(lambda index: make(work, index), passed)

    return Parts([f"part{i}" for i in range(count)], lambda work, index: (work / f"part{index}").exists(), maker)


def write(work: Path, index: int) -> None:
    (work / f"part{index}").write_text(f"content {index}")


def finish(work: Path) -> Mapping[str, Any]:
    return {"found": len(list(work.glob("part*")))}


def make(store: Store, parts: Parts, finish: Any = finish) -> Artifact:
    return store.make_parts("things", "thing", {"parts": len(parts.names)}, [], parts, finish)


def half_made(store: Store) -> Path:
    (work,) = store.root.glob("things/.partial/*")
    return work


class Stopped(Exception):
    pass


def stopping_at(stop: int, made: list[int]) -> Callable[[Path, int], None]:
    def work_on(work: Path, index: int) -> None:
        if index == stop:
            (work / "checkpoint.tmp").write_text("half")
            raise Stopped
        made.append(index)
        write(work, index)

    return work_on


def test_one_process_makes_parts_in_order_and_seals(tmp_path: Path) -> None:
    made: list[int] = []
    artifact = make(Store(tmp_path), parts_of(stopping_at(-1, made)))
    assert made == [0, 1, 2, 3]
    assert artifact.metrics == {"found": 4}
    assert sorted(artifact.manifest["files"]) == ["part0", "part1", "part2", "part3"]
    assert artifact.manifest["cost"]["sessions"] == 1
    assert list((tmp_path / "things" / ".locks").glob("*.parts")) == []
    assert make(Store(tmp_path), parts_of(stopping_at(0, []))).digest == artifact.digest


def test_an_interrupted_part_goes_on_where_it_was(tmp_path: Path) -> None:
    made: list[int] = []
    with pytest.raises(Stopped):
        make(Store(tmp_path), parts_of(stopping_at(2, made)))
    store = Store(tmp_path)
    assert list(Table(half_made(store)).read()) == [FINISHED, FINISHED, OPEN, OPEN]
    passed: list[int] = []

    def goes_on(work: Path, index: int) -> None:
        assert index != 2 or (work / "checkpoint.tmp").read_text() == "half"
        made.append(index)
        write(work, index)

    artifact = make(store, parts_of(goes_on, passed=passed.extend))
    assert made == [0, 1, 2, 3]
    assert passed == [0, 1]
    assert artifact.manifest["cost"]["sessions"] == 2
    assert "checkpoint.tmp" not in artifact.manifest["files"]


class Watched(Locks):
    """Locks that know what they hold."""

    def __init__(self) -> None:
        self.held: list[Path] = []

    def take(self, path: Path) -> Any:
        claim = super().take(path)
        if claim is None:
            return None
        self.held.append(path)
        release = claim.release

        def forget(forget: bool = False) -> None:
            self.held.remove(path)
            release(forget)

        claim.release = forget  # type: ignore[method-assign]
        return claim


@pytest.mark.parametrize("stop", [-1, 0, 2])
def test_seconds_are_noted_only_while_nobody_can_seal(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that seals removes the notes, and must not meet a new one while it does."""
    store, claims = Store(tmp_path), Watched()
    store.claims = claims
    noted: list[bool] = []
    note = Session.note

    def watched(session: Session, last: bool = False) -> None:
        noted.append(bool(claims.held))
        note(session, last)

    monkeypatch.setattr(Session, "note", watched)
    with contextlib.suppress(Stopped):
        make(store, parts_of(stopping_at(stop, [])))
    artifact = make(store, parts_of(stopping_at(-1, [])))
    assert noted
    assert all(noted)
    assert artifact.manifest["cost"]["sessions"] == (1 if stop == -1 else 2)
    assert not claims.held


def dies_at(root: Path, index: int) -> None:
    def dies(work: Path, part: int) -> None:
        if part == index:
            (work / "checkpoint.tmp").write_text("half")
            os._exit(9)
        write(work, part)

    make(Store(root), parts_of(dies))


def test_what_a_killed_process_dropped_is_taken_over(tmp_path: Path) -> None:
    assert ends(in_process(dies_at, tmp_path, 1)) == 9
    store, made = Store(tmp_path), []
    assert list(Table(half_made(store)).read()) == [FINISHED, TAKEN, OPEN, OPEN]
    make(store, parts_of(stopping_at(-1, made)))
    # Work that nobody began comes first: the owner of the other might have lived.
    assert made == [2, 3, 1]


def waiting(root: Path) -> Callable[[Path, int], None]:
    """Makes a part once others have made the rest."""

    def make_part(work: Path, index: int) -> None:
        (root / "begun").touch()
        wait_for(root / "go on")
        write(work, index)

    return make_part


def hurrying(root: Path, made: list[int]) -> Callable[[Path, int], None]:
    """Makes three parts, and then lets the one that waits go on."""

    def make_part(work: Path, index: int) -> None:
        made.append(index)
        write(work, index)
        if len(made) == 3:
            (root / "go on").touch()

    return make_part


def test_parts_are_shared_under_two_names(tmp_path: Path) -> None:
    """One goes on with what the other has begun, and neither makes a part that the other holds or has made."""

    def mine(root: Path) -> None:
        Store(root).make_parts("things", "mine", {"parts": 4}, [], parts_of(waiting(root)), finish)

    made: list[int] = []
    other = in_process(mine, tmp_path)
    wait_for(tmp_path / "begun")
    (work,) = (tmp_path / "things" / ".partial").iterdir()
    assert work.name.startswith("mine-")
    artifact = make(Store(tmp_path), parts_of(hurrying(tmp_path, made)))
    assert made == [1, 2, 3]
    assert ends(other) == 0
    assert artifact.metrics == {"found": 4}
    assert [path.parent for path in tmp_path.glob(f"things/*/{MANIFEST}")] == [artifact.path]
    assert list((tmp_path / "things" / ".partial").iterdir()) == []


def test_a_slow_process_delays_only_its_own_part(tmp_path: Path) -> None:
    def slow(root: Path) -> None:
        make(Store(root), parts_of(waiting(root)))

    made: list[int] = []
    other = in_process(slow, tmp_path)
    wait_for(tmp_path / "begun")
    artifact = make(Store(tmp_path), parts_of(hurrying(tmp_path, made)))
    assert made == [1, 2, 3]
    assert ends(other) == 0
    assert artifact.metrics == {"found": 4}


def test_a_table_that_is_wrong_is_only_a_hint(tmp_path: Path) -> None:
    """Finished parts that are not there are made; parts that are there are not made again."""
    with pytest.raises(Stopped):
        make(Store(tmp_path), parts_of(stopping_at(2, [])))
    work = half_made(Store(tmp_path))
    (work / "part0").unlink()
    Table(work).mark(1, OPEN)
    made: list[int] = []
    artifact = make(Store(tmp_path), parts_of(stopping_at(-1, made)))
    assert sorted(made) == [0, 2, 3]
    assert artifact.metrics == {"found": 4}


def test_a_table_of_another_length_is_replaced(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        make(Store(tmp_path), parts_of(stopping_at(2, [])))
    Table(half_made(Store(tmp_path))).create(7)
    made: list[int] = []
    make(Store(tmp_path), parts_of(stopping_at(-1, made)))
    assert made == [2, 3]


def test_a_failure_of_the_last_step_is_repeated_alone(tmp_path: Path) -> None:
    def fails(work: Path) -> Mapping[str, Any]:
        raise Stopped

    with pytest.raises(Stopped):
        make(Store(tmp_path), parts_of(write), fails)
    artifact = make(Store(tmp_path), parts_of(lambda work, index: pytest.fail("made again")))
    assert artifact.metrics == {"found": 4}


def test_a_missing_file_of_the_user_is_no_sign_of_sealing(tmp_path: Path) -> None:
    def missing(work: Path, index: int) -> None:
        (tmp_path / "data" / "image.png").read_bytes()

    with pytest.raises(FileNotFoundError, match=r"image\.png"):
        make(Store(tmp_path / "store"), parts_of(missing))


def test_a_full_disk_while_sealing_costs_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def noted(work: Path, index: int) -> None:
        (work / f"part{index}.tmp").touch()

    parts = parts_of(noted)
    parts = Parts(parts.names, lambda work, index: (work / f"part{index}.tmp").exists(), parts.maker)
    with monkeypatch.context() as patched:
        patched.setattr("cvdd.artifact.sealing.write_atomically", full)
        with pytest.raises(StoreError, match="no space left"):
            make(Store(tmp_path), parts)
    again = Parts(parts.names, parts.done, parts_of(lambda work, index: pytest.fail("made again")).maker)
    assert make(Store(tmp_path), again).manifest["files"] == {}


def test_preparation_happens_once_and_before_all_parts(tmp_path: Path) -> None:
    def take_part(root: Path) -> None:
        def prepare(work: Path) -> None:
            with (work / "prepared").open("a") as stream:
                stream.write("once\n")
            time.sleep(0.2)

        def needs(work: Path, index: int) -> None:
            assert (work / "prepared").exists()
            time.sleep(0.02)
            write(work, index)

        parts = parts_of(needs, count=12)
        make(Store(root), Parts(parts.names, parts.done, parts.maker, prepare))

    workers = [in_process(take_part, tmp_path) for _ in range(3)]
    assert [ends(worker) for worker in workers] == [0, 0, 0]
    (path,) = tmp_path.glob(f"things/*/{MANIFEST}")
    assert (path.parent / "prepared").read_text() == "once\n"
    assert len(list(path.parent.glob("part*"))) == 12


@pytest.mark.parametrize("claims", ["locks", "leases"])
def test_processes_that_die_lose_nothing(claims: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation of benchmarks/claims.py in a small form."""
    monkeypatch.setenv("CVDD_CLAIMS", claims)
    monkeypatch.setattr("cvdd.artifact.claims.SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr("cvdd.artifact.claims.SECONDS_OF_SILENCE", 1.5)
    simulation = Simulation(units=60, processes=4, seconds=0.04, deaths=2)
    outcome = simulate(simulation, tmp_path)
    assert (outcome.finished, outcome.twice, outcome.seals) == (60, 0, 1)
    assert outcome.deaths == 2
    assert 60 <= outcome.begun <= 60 + outcome.deaths


# --- blocks of epochs -------------------------------------------------------------------------------------------------


def test_blocks_cover_the_labelled_epochs() -> None:
    from helpers import label_config

    def blocks(count: int, epochs: int) -> list[range]:
        return LabelLayout.of(label_config(epochs=epochs), count, 10).blocks

    assert SAMPLES_OF_A_BLOCK == 4096
    # Two epochs of twelve batches share the forward passes, of 32 batches at most, and are in one block.
    assert blocks(100, 100) == [range(42), range(42, 84), range(84, 100)]
    assert blocks(50_000, 3) == [range(1), range(1, 2), range(2, 3)]
    assert blocks(8, 300) == [range(300)]
