"""Every stage goes on where it was interrupted and ends with the same bits."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import PRIORS, same_files, tiny_context

import cvdd.chain.recover
import cvdd.labels.sources
import cvdd.labels.store
import cvdd.training.fit
from cvdd.chain.compare import Distilled, Result
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.labels import make_labels
from cvdd.chain.members import make_member
from cvdd.chain.students import make_student
from cvdd.training.classifier import Classifier

pytest_plugins = ["chain_fixtures"]


class PulledPlug(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: type[BaseException]) -> None:
    """Raise at the given call of a function; checkpoints are taken as often as possible."""
    monkeypatch.setattr(cvdd.training.fit, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(cvdd.labels.store, "SECONDS_BETWEEN_SAVES", -1.0)
    original, calls = getattr(owner, name), []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, stopping)


def rows_logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(stack, iteration) of the log rows from here on."""
    rows: list[tuple[int, int]] = []
    original = cvdd.chain.recover._log_row

    def noting(context: Context, stack: Any, row: Any, *rest: Any) -> None:
        rows.append((stack.index, row.iteration))
        original(context, stack, row, *rest)

    monkeypatch.setattr(cvdd.chain.recover, "_log_row", noting)
    return rows


@pytest.mark.parametrize("error", [PulledPlug, KeyboardInterrupt])
@pytest.mark.parametrize(("call", "left"), [(3, [(0, 6), (1, 2), (1, 4), (1, 6)]), (5, [(1, 4), (1, 6)])])
def test_distil_goes_on_inside_a_stack(
    call: int,
    left: list[tuple[int, int]],
    error: type[BaseException],
    made: tuple[Distilled, Result],
    again: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three rows to a stack, a checkpoint after each; Lightning turns Ctrl-C into the end of the process."""
    context = again("images", "labels", "students")
    with monkeypatch.context() as patched:
        stop_at(patched, cvdd.chain.recover, "_log_row", call, error)
        with pytest.raises((error, SystemExit)):
            make_images(context, PRIORS)
    rows = rows_logged(monkeypatch)
    images = make_images(context, PRIORS)
    assert rows == left
    assert same_files(images, made[0].images)
    assert images.manifest["cost"]["sessions"] == 2


def distil_and_die(root: Path, store: Path) -> None:
    """End without a word in the middle of the second stack."""
    log_row = cvdd.chain.recover._log_row

    def killing(context: Context, stack: Any, row: Any, *rest: Any) -> None:
        if (stack.index, row.iteration) == (1, 4):
            os._exit(9)
        log_row(context, stack, row, *rest)

    cvdd.training.fit.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    cvdd.chain.recover._log_row = killing
    make_images(tiny_context(root, store=store), PRIORS)


def test_distil_goes_on_after_being_killed(
    made: tuple[Distilled, Result], again: Callable[..., Context], chain_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = again("images", "labels", "students")
    # A fork could not compute gradients where another test's fake GPU has started their threads.
    process = multiprocessing.get_context("spawn").Process(target=distil_and_die, args=(chain_home, context.store.root))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 9
    rows = rows_logged(monkeypatch)
    assert same_files(make_images(context, PRIORS), made[0].images)
    assert rows == [(1, 4), (1, 6)]


def test_a_damaged_checkpoint_only_costs_its_stack(
    made: tuple[Distilled, Result], again: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = again("images", "labels", "students")
    with monkeypatch.context() as patched:
        stop_at(patched, cvdd.chain.recover, "_log_row", 5, PulledPlug)
        with pytest.raises(PulledPlug):
            make_images(context, PRIORS)
    (checkpoint,) = context.store.root.glob("images/.partial/*/*.ckpt.tmp")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    rows = rows_logged(monkeypatch)
    assert same_files(make_images(context, PRIORS), made[0].images)
    assert rows == [(1, 2), (1, 4), (1, 6)]


def test_relabel_goes_on_between_epochs(
    made: tuple[Distilled, Result], again: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = again("labels", "students")
    with monkeypatch.context() as patched:
        stop_at(patched, cvdd.labels.sources.ComputedLabels, "epoch", 3, PulledPlug)
        with pytest.raises(PulledPlug):
            make_labels(context, made[0].images, PRIORS)
    scored: list[int] = []
    original = cvdd.labels.sources.ComputedLabels.epoch
    monkeypatch.setattr(
        cvdd.labels.sources.ComputedLabels,
        "epoch",
        lambda self, epoch: (scored.append(epoch), original(self, epoch))[1],
    )
    labels = make_labels(context, made[0].images, PRIORS)
    assert scored == [2]
    assert same_files(labels.artifact, made[0].labels.artifact)


def epochs_begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    begun: list[int] = []
    original = Classifier.on_train_epoch_start

    def noting(self: Classifier) -> None:
        begun.append(self.current_epoch)
        original(self)

    monkeypatch.setattr(Classifier, "on_train_epoch_start", noting)
    return begun


@pytest.mark.parametrize("error", [PulledPlug, KeyboardInterrupt])
def test_a_student_goes_on_after_an_epoch(
    error: type[BaseException],
    made: tuple[Distilled, Result],
    again: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = again("students")
    arguments = (made[0].labels, "tiny_resnet18", context.config.students["tiny_resnet18"], 0)
    with monkeypatch.context() as patched:
        stop_at(patched, Classifier, "on_train_epoch_start", 3, error)
        with pytest.raises((error, SystemExit)):
            make_student(context, *arguments)
    begun = epochs_begun(monkeypatch)
    student = make_student(context, *arguments)
    assert begun == [2]
    assert same_files(student, made[1].students[0])
    assert student.metrics == made[1].students[0].metrics


def test_a_student_of_muon_goes_on_after_an_epoch(
    made: tuple[Distilled, Result], again: Callable[..., Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = again("students").store.root, tmp_path / "other"
    shutil.copytree(*stores)
    contexts = [tiny_context(tmp_path, "protocol.optimizer=muon", store=store) for store in stores]
    arguments = (made[0].labels, "tiny_resnet18", contexts[0].config.students["tiny_resnet18"], 0)
    whole = make_student(contexts[0], *arguments)
    with monkeypatch.context() as patched:
        stop_at(patched, Classifier, "on_train_epoch_start", 3, PulledPlug)
        with pytest.raises(PulledPlug):
            make_student(contexts[1], *arguments)
    begun = epochs_begun(monkeypatch)
    assert same_files(make_student(contexts[1], *arguments), whole)
    assert begun == [2]


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_a_member_goes_on_after_an_epoch(schedule: str, chain_home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    options = ("recipe.epochs=4", f"recipe.schedule={schedule}")
    whole = make_member(tiny_context(chain_home, *options), "resnet50")
    shutil.copytree(chain_home / "store" / "data", tmp_path / "store" / "data")
    context = tiny_context(chain_home, *options, store=tmp_path / "store")
    with monkeypatch.context() as patched:
        stop_at(patched, Classifier, "on_train_epoch_start", 3, PulledPlug)
        with pytest.raises(PulledPlug):
            make_member(context, "resnet50")
    begun = epochs_begun(monkeypatch)
    member = make_member(context, "resnet50")
    assert begun == [2, 3]
    assert same_files(member, whole)
    assert member.metrics == whole.metrics
