"""How a job ends: messages for people, and an exit code that tells the truth."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from hydra.errors import CompactHydraException

from cvdd.support.config_base import ConfigError
from cvdd.support.memory import is_out_of_memory
from cvdd.support.refusals import NO_SPACE, refused_by

log = logging.getLogger(__name__)

USER_ERROR = 2
INTERRUPTED = 130

_KEPT = "What is finished in the store is kept, and the same command goes on from it."


OUTCOME = "outcome.json"
"""Beside the log of a point: of which command it is, and how that ended."""

RESULTS = ("metrics.json", "results.csv", "report.html")
"""What a command that measures students leaves."""


class PointFailed(CompactHydraException):
    """One point of a multirun could not run; its message was printed when it failed.

    Hydra prints an error of its own kind without a stack trace and goes on with the next point.
    """


@contextlib.contextmanager
def outcome_kept(folder: Path, verb: str, overrides: Sequence[str], begins: bool = True) -> Iterator[None]:
    """Write down how a point of a multirun ends, so that reports can tell it from one that is being made.

    Hydra's own files do not tell it: a command that only asks what a point costs writes them, too.

    Args:
        folder: of the point.
        verb: of the command.
        overrides: of the point.
        begins: whether this is the first of the jobs that share the point, any of which may end it.
    """
    if begins:
        forget_results(folder)
        _note(folder, "running", verb, overrides, began=time.time())
    try:
        yield
    except Exception as error:
        _note(folder, "failed", verb, overrides, str(error) or type(error).__name__)
        raise
    _note(folder, "done", verb, overrides)


def forget_results(folder: Path) -> None:
    """Remove what an earlier command has left where a point begins, lest it be shown as this one's.

    Args:
        folder: of the point.
    """
    for name in (*RESULTS, OUTCOME):
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def _note(
    folder: Path, status: str, verb: str, overrides: Sequence[str], error: str = "", began: float | None = None
) -> None:
    outcome: dict[str, Any] = {"status": status, "error": error, "verb": verb, "overrides": list(overrides)}
    if began is None:
        with contextlib.suppress(OSError, ValueError):
            began = json.loads((folder / OUTCOME).read_text()).get("began")
    if began is not None:
        outcome["began"] = began
    # A full disk may be why it failed, which must not be hidden by another error.
    with contextlib.suppress(OSError):
        (folder / OUTCOME).write_text(json.dumps(outcome, indent=1) + "\n")


def is_for_users(error: BaseException) -> bool:
    """Whether an error was written by this project for its users, rather than by a defect."""
    return isinstance(error, ConfigError) or type(error).__module__.startswith("cvdd.")


def advice_on(error: BaseException) -> str | None:
    """Say what to do about an error that the machine reports in its own words; None if nothing is known of it."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        name = refused_by(error)
        place = f" for {name}" if name else ""
        return f"no space left{place}. Free some, or choose other places: paths.output=DIR, paths.store=DIR. {_KEPT}"
    if is_out_of_memory(error):
        first = (str(error).splitlines() or ["no more memory"])[0]
        return (
            f"out of memory ({first}). Lower what is worked on at once: recipe.batch_size, method.units_per_stack, "
            f"label.stack, label.batch_size or protocol.eval_batch. {_KEPT}"
        )
    return None


@contextlib.contextmanager
def reader_may_go() -> Iterator[None]:
    """Stop without a word once nobody reads what is printed any more, as behind ``| head``."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def told(sweeping: bool) -> Iterator[None]:
    """Turn the errors of a job into messages and exit codes.

    Hydra reports the failures of a multirun only at its end, and only the first; so they are told here at once.

    Args:
        sweeping: whether the job is one point of a multirun.
    """
    interrupt = _Interrupt()
    try:
        with interrupt.noted():
            yield
    except Exception as error:
        if interrupt.came:
            _say_interrupted()
        message = str(error) if is_for_users(error) else advice_on(error)
        if message is not None:
            # The message says what to type; a stack trace would only hide it.
            log.error("%s", message)
            if sweeping:
                raise PointFailed(message) from None
            sys.exit(USER_ERROR)
        if sweeping:
            log.exception("this point of the sweep failed")
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        # Whoever leaves because of what was typed, like argparse, has said so.
        if isinstance(stop, SystemExit) and stop.code in (0, None, USER_ERROR):
            raise
        _say_interrupted()


class _Interrupt:
    """Whether SIGINT has come: a library in the middle of foreign code may turn it into an error of its own."""

    def __init__(self) -> None:
        self.came = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if not heard or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.default_int_handler(number, frame)


def _say_interrupted() -> NoReturn:
    log.warning("interrupted; finished units and checkpoints are kept, and the same command goes on from them")
    sys.exit(INTERRUPTED)
