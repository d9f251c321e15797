"""Disks that fill or cannot be written, damaged files, stale locks and clocks: named, nothing complete lost, mended."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import Reference
from helpers import PRIORS, tiny_context
from small_disk import Disk
from test_interruption import PulledPlug, stop_at

import cvdd.artifact.claims
import cvdd.chain.recover
import cvdd.labels.sources
from cvdd.artifact import MANIFEST, Artifact, DamagedArtifact, Maker, Parts, Store, StoreError, write_atomically
from cvdd.artifact.__main__ import verify_artifacts
from cvdd.chain.compare import compare, distil
from cvdd.chain.context import Context
from cvdd.chain.images import make_images

pytest_plugins = ["faults_fixtures", "small_disk"]
pytestmark = pytest.mark.faults


def context_of(home: Path) -> Context:
    return tiny_context(home, store=home / "store")


# --- a disk that fills ------------------------------------------------------------------------------------------------


def until_it_fits(work: Callable[[], Any], make_room: Callable[[int], None], store: Path) -> tuple[Any, int]:
    """Work with more and more room until it is enough; return the result and how often it was not."""
    for room in itertools.count():
        make_room(room)
        try:
            return work(), room
        except StoreError as error:
            message = str(error)
        assert re.search(r"no space left for .*paths\.store=DIR.*the same command goes on", message)
        assert verify_artifacts(store) == 0
    raise AssertionError


PAGES = 3


def three_parts(made: list[int]) -> Parts:
    @contextmanager
    def maker(work: Path) -> Iterator[Maker]:
        def make(index: int) -> None:
            write_atomically(work / f"part{index}", os.urandom(1) * PAGES * os.sysconf("SC_PAGE_SIZE"))
            made.append(index)

        yield Maker(make)

    return Parts([f"part{i}" for i in range(3)], lambda work, index: (work / f"part{index}").exists(), maker)


def finish(work: Path) -> Mapping[str, Any]:
    write_atomically(work / "summary", b"all")
    return {"parts": len(list(work.glob("part?")))}


@pytest.mark.parametrize("what", ["pages", "files"])
def test_a_disk_that_is_full_at_every_write(what: str, disk: Disk) -> None:
    """In each attempt there is room for a little more; what was finished before is not made again.

    Of two pages, or files, one is for the attempt's note of its duration, which is the first to be left out.
    """
    before = Store(disk.place).make("things", "before", {}, [], lambda work: finish(work))
    disk.fill()
    made: list[int] = []

    def work() -> Artifact:
        return Store(disk.place).make_parts("things", "thing", {"parts": 3}, [before], three_parts(made), finish)

    artifact, refusals = until_it_fits(work, lambda room: disk.leave(**{what: 2 * room}), disk.place)
    assert made == [0, 1, 2]
    assert artifact.metrics == {"parts": 3}
    assert refusals > 5
    assert Store(disk.place).open(before.path).metrics == before.metrics


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pages", "files"])
def test_a_disk_that_is_full_throughout_the_chain(
    what: str, disk: Disk, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    home = reference.copy(disk.place, "images", "labels", "students")
    disk.fill()
    step = {"pages": 60, "files": 3}[what]

    def work() -> Any:
        return compare(tiny_context(tmp_path, store=home / "store"))

    _, refusals = until_it_fits(work, lambda room: disk.leave(**{what: step * room}), home / "store")
    assert refusals > 2
    disk.leave()
    reference.require_same(home)


def test_a_store_that_can_only_be_read(disk: Disk, reference: Reference, tmp_path: Path) -> None:
    """What is there is used; what is missing is refused, and the other place that is named serves."""
    store = reference.copy(disk.place) / "store"
    labels = next(store.glob("labels/*/manifest.json")).parent
    disk.read_only()
    compare(tiny_context(tmp_path, store=store))
    missing = tiny_context(tmp_path, "label.epochs=4", store=store)
    with pytest.raises(StoreError, match=r"cannot be written .*paths\.store=DIR"):
        distil(missing, "cvdd")
    assert labels.is_dir()
    assert verify_artifacts(store) == 0


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_everything_damaged_is_named_and_made_again(reference: Reference, tmp_path: Path) -> None:
    """One artefact of each kind is damaged; a command is repeated and does each time what the message says."""
    home = reference.copy(tmp_path)
    damages = {"data": flip, "members": truncate, "patches": flip, "images": truncate, "students": flip}
    damaged = set()
    for kind, damage in damages.items():
        files = [file for file in (home / "store").glob(f"{kind}/*/**/*") if file.is_file() and file.name != MANIFEST]
        file = max(files, key=lambda file: file.stat().st_size)
        damage(file)
        damaged.add(home / "store" / Path(*file.relative_to(home / "store").parts[:2]))
    # A directory of which half was deleted is none: it is made again without a word.
    (half,) = (home / "store").glob("labels/*")
    (half / MANIFEST).unlink()
    assert verify_artifacts(home / "store") == 1
    named = set()
    while True:
        try:
            compare(context_of(home))
            break
        except DamagedArtifact as error:
            message = str(error)
        found = re.match(r"(.*?): .*Delete this directory", message)
        assert found, message
        path = Path(found[1])
        assert path in damaged - named
        named.add(path)
        shutil.rmtree(path)
    assert named == damaged
    reference.require_same(home)


def test_what_is_half_made_may_be_damaged_too(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a crash of the machine: a unit, a checkpoint and the table of what is finished are cut short."""
    home = reference.copy(tmp_path, "images", "labels", "students")
    with monkeypatch.context() as patched:
        stop_at(patched, cvdd.chain.recover, "_log_row", 5, PulledPlug)
        with pytest.raises(PulledPlug):
            make_images(context_of(home), PRIORS)
    (work,) = (home / "store").glob("images/.partial/*")
    (unit,) = work.glob("units/*.safetensors")
    (checkpoint,) = work.glob("*.ckpt.tmp")
    truncate(unit)
    truncate(checkpoint)
    (work / ".parts").write_bytes(b"")
    make_images(context_of(home), PRIORS)
    reference.require_same(home, ("images",))


def test_labels_that_were_cut_while_they_were_half_made(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written on, they would have a hole that nobody sees."""
    home = reference.copy(tmp_path, "labels", "students")
    with monkeypatch.context() as patched:
        stop_at(patched, cvdd.labels.sources.ComputedLabels, "epoch", 3, PulledPlug)
        with pytest.raises(PulledPlug):
            distil(context_of(home), "cvdd")
    (work,) = (home / "store").glob("labels/.partial/*")
    assert list(work.glob("epochs*.tmp"))
    truncate(work / "logits.bin")
    with pytest.raises(DamagedArtifact, match=rf"{work}: logits\.bin has .* bytes instead of .*Delete this directory"):
        distil(context_of(home), "cvdd")
    shutil.rmtree(work)
    distil(context_of(home), "cvdd")
    reference.require_same(home, ("images", "labels"))


# --- locks and clocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("claims", "stale"), [("locks", ""), ("leases", ".0")])
def test_claims_of_the_dead_and_of_other_machines(
    claims: str,
    stale: str,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file that is left behind, of a process that is gone here or of another host whose clock is an hour ahead."""
    caplog.set_level("INFO")
    monkeypatch.setenv("CVDD_CLAIMS", claims)
    monkeypatch.setattr(cvdd.artifact.claims, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(cvdd.artifact.claims, "SECONDS_OF_SILENCE", 1.0)
    home = reference.copy(tmp_path, "labels", "students")
    (name,) = (name for name in reference.made if name.startswith("labels/"))
    locks = home / "store" / "labels" / ".locks"
    place = locks / name.rpartition("-")[2]
    part = Path(f"{place}.parts") / f"epochs00000.lock{stale}"
    part.parent.mkdir(parents=True)
    for file in (Path(f"{place}.lock{stale}"), part):
        file.write_text("another-host 4711\n")
        os.utime(file, (time.time() + 3600,) * 2)
    distil(context_of(home), "cvdd")
    reference.require_same(home, ("images", "labels"))
    assert (f"waiting: another process makes {name}" in caplog.text) == (claims == "leases")
    assert not part.exists()


def test_a_clock_that_goes_back_an_hour(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the labels; all files before them are from the future then."""
    home = reference.copy(tmp_path, "labels", "students")
    now, epoch = time.time, cvdd.labels.sources.ComputedLabels.epoch

    def back(self: Any, number: int) -> Any:
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
        return epoch(self, number)

    for file in (home / "store").rglob("*"):
        os.utime(file, (now() + 3600,) * 2)
    monkeypatch.setattr(cvdd.labels.sources.ComputedLabels, "epoch", back)
    compare(context_of(home))
    assert time.time() < now() - 3000
    reference.require_same(home)
