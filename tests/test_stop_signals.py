"""A signal to stop: saved at the end of the epoch, obeyed afterwards, and gone on from with the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from helpers import PRIORS, same_files
from test_interruption import epochs_begun, rows_logged

import cvdd.chain.recover
from cvdd.chain.compare import Distilled, Result
from cvdd.chain.context import Context
from cvdd.chain.images import make_images
from cvdd.chain.students import make_student
from cvdd.running.interruption import SIGNALS, StopRequest
from cvdd.training.classifier import Classifier

pytest_plugins = ["chain_fixtures"]


class Requeued(BaseException):
    pass


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Handlers as submitit installs them: one that leaves, one that passes over the signal; restored afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    calls: list[int] = []

    def requeue(number: int, frame: object) -> None:
        calls.append(number)
        raise Requeued

    signal.signal(signal.SIGUSR2, requeue)
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    yield calls
    for number, handler in before.items():
        signal.signal(number, handler)


def send_at(patched: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int) -> None:
    original, calls = getattr(owner, name), []

    def sending(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    patched.setattr(owner, name, sending)


def student(context: Context, made: tuple[Distilled, Result]) -> Any:
    return make_student(context, made[0].labels, "tiny_resnet18", context.config.students["tiny_resnet18"], 0)


@pytest.mark.parametrize(("epoch", "left"), [(1, [1, 2]), (2, [2]), (3, [])])
def test_a_student_is_saved_at_the_end_of_the_epoch_of_the_signal(
    epoch: int,
    left: list[int],
    handled: list[int],
    made: tuple[Distilled, Result],
    again: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Three epochs, no checkpoint by the clock; even the last one is saved, as its result is not in the store yet."""
    context = again("students")
    with monkeypatch.context() as patched:
        send_at(patched, Classifier, "on_train_epoch_start", epoch, signal.SIGUSR2)
        begun = epochs_begun(patched)
        with pytest.raises(Requeued):
            student(context, made)
    assert f"SIGUSR2: saved after epoch {epoch}" in caplog.messages
    assert begun == list(range(epoch))
    assert handled == [signal.SIGUSR2]
    begun = epochs_begun(monkeypatch)
    assert same_files(student(context, made), made[1].students[0])
    assert begun == left


def test_images_are_saved_at_the_end_of_the_epoch_of_the_signal(
    handled: list[int],
    made: tuple[Distilled, Result],
    again: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lightning's epochs are no one's: what is said is the iteration."""
    context = again("images", "labels", "students")
    with monkeypatch.context() as patched:
        send_at(patched, cvdd.chain.recover, "_log_row", 4, signal.SIGUSR2)
        with pytest.raises(Requeued):
            make_images(context, PRIORS)
    assert "SIGUSR2: saved after iteration 2" in caplog.messages
    rows = rows_logged(monkeypatch)
    assert same_files(make_images(context, PRIORS), made[0].images)
    assert rows == [(1, 4), (1, 6)]


def test_a_signal_that_is_passed_over_still_saves(
    handled: list[int], made: tuple[Distilled, Result], again: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM ends a job with SIGTERM, which submitit passes over; Lightning alone would stop at the next batch."""
    context = again("students")
    with monkeypatch.context() as patched:
        send_at(patched, Classifier, "on_train_epoch_start", 2, signal.SIGTERM)
        assert same_files(student(context, made), made[1].students[0])
    assert handled == [signal.SIGTERM]


def test_without_a_handler_the_process_ends_after_the_save(
    made: tuple[Distilled, Result], again: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = again("students")
    with monkeypatch.context() as patched:
        send_at(patched, Classifier, "on_train_epoch_start", 2, signal.SIGUSR1)
        with pytest.raises(SystemExit) as stopped:
            student(context, made)
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    begun = epochs_begun(monkeypatch)
    assert same_files(student(context, made), made[1].students[0])
    assert begun == [2]


def test_a_long_epoch_does_not_hold_up_the_end_of_a_job(
    handled: list[int], made: tuple[Distilled, Result], again: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put back into the queue without a save is better than killed without being put back."""
    context = again("students")
    monkeypatch.setattr(StopRequest, "overdue", property(lambda stop: bool(stop.number)))
    with monkeypatch.context() as patched:
        send_at(patched, Classifier, "on_train_epoch_start", 2, signal.SIGUSR2)
        with pytest.raises(Requeued):
            student(context, made)
    begun = epochs_begun(monkeypatch)
    assert same_files(student(context, made), made[1].students[0])
    assert begun == [0, 1, 2]


def test_a_second_signal_is_obeyed_at_once(handled: list[int]) -> None:
    stop = StopRequest()
    stop.hold()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert (stop.number, handled) == (signal.SIGUSR2, [])
    with pytest.raises(Requeued):
        os.kill(os.getpid(), signal.SIGUSR2)
    assert (stop.number, handled) == (0, [signal.SIGUSR2])


@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)])
def test_of_two_signals_the_announcement_counts(order: tuple[int, int], handled: list[int]) -> None:
    stop = StopRequest()
    stop.hold()
    for number in order:
        os.kill(os.getpid(), number)
    assert stop.number == signal.SIGUSR2
    stop.release()
    with pytest.raises(Requeued):
        os.kill(os.getpid(), signal.SIGUSR2)


def test_a_signal_waits_only_so_long(handled: list[int]) -> None:
    stop = StopRequest(seconds=-1.0)
    assert not stop.overdue
    stop.hold()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.overdue
