"""How a job ends, whatever a library makes of an interrupt."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from cvdd.artifact.files import StoreError, store_errors
from cvdd.outcome import INTERRUPTED, told


@pytest.fixture(autouse=True)
def _a_terminal(monkeypatch: pytest.MonkeyPatch) -> object:
    # Where tests run in the background the shell has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_inside_a_library() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            pass
    except KeyboardInterrupt as interrupt:
        raise ValueError("could not determine the shape") from interrupt


def test_an_error_that_an_interrupt_became_is_an_interrupt() -> None:
    with pytest.raises(SystemExit) as stopped, told(sweeping=False):
        interrupted_inside_a_library()
    assert stopped.value.code == INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_errors_without_an_interrupt_stay_errors() -> None:
    with pytest.raises(ValueError, match="of its own"), told(sweeping=False):
        raise ValueError("of its own")


def test_a_copy_is_refused_where_it_goes(tmp_path: Path) -> None:
    """As shutil reports it: both names, and no space at the second."""
    full = OSError(errno.ENOSPC, "No space left on device", "elsewhere/a", None, str(tmp_path / "a"))
    with pytest.raises(StoreError, match="no space left for"), store_errors(tmp_path):
        raise full
    with pytest.raises(OSError, match="No space left"), store_errors(tmp_path / "other"):
        raise full
