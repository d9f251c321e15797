"""How a job ends, whatever a library makes of an interrupt."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from helpers import tiny_context
from torchvision.io import decode_image

from cvdd.artifact import Store
from cvdd.artifact.files import StoreError, store_errors
from cvdd.support.config_base import ConfigError
from cvdd.support.outcome import INTERRUPTED, USER_ERROR, told
from cvdd.support.pictures import write_png
from cvdd.support.refusals import place_errors, require_writable


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


def test_wrong_arguments_are_no_interruption(caplog: pytest.LogCaptureFixture) -> None:
    """As argparse ends a process, having said what is wrong."""
    with pytest.raises(SystemExit) as stopped, told(sweeping=False):
        argparse.ArgumentParser().parse_args(["--nothing"])
    assert stopped.value.code == USER_ERROR
    assert not caplog.messages


def full(*arguments: object, **options: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_picture_that_a_full_disk_loses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    write_png(image, tmp_path / "a.png")
    assert torch.equal(decode_image(str(tmp_path / "a.png")), image)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stopped, told(sweeping=False):
        write_png(image, tmp_path / "a.png")
    assert stopped.value.code == USER_ERROR
    assert f"no space left for {tmp_path / 'a.png'}. Free some" in caplog.text
    assert not (tmp_path / "a.png").exists()


def test_a_picture_of_what_is_half_made_is_not_worth_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    context = tiny_context(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    context.save_picture("grid", torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert "a picture of the work so far is left out: [Errno 28] No space left" in caplog.text


@pytest.mark.parametrize("place", ["/proc/x/y", "file", "file/x"])
def test_a_place_that_cannot_be_made_or_written(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another place with x=DIR"):
        require_writable(tmp_path / place, "another place with x=DIR")
    store = Store(tmp_path / place)
    with pytest.raises(StoreError, match=r"cannot be written \(.*\)\. Choose another place: paths\.store=DIR"):
        store.make("things", "thing", {}, [], lambda work: {})


def test_a_place_is_made_where_it_is_missing_and_a_full_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_writable(tmp_path / "a" / "b", "another")
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a" / "b"]
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ConfigError, match=r"b; free some, or choose another place"):
        require_writable(tmp_path / "a" / "b", "another place")


def test_errors_of_other_places_remain_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), place_errors(tmp_path / "a", "another"):
        (tmp_path / "b").read_text()
    with pytest.raises(OSError, match="of a library"), place_errors(tmp_path, "another"):
        raise OSError("of a library")
    with pytest.raises(FileNotFoundError), store_errors(tmp_path):
        (tmp_path / "missing").read_text()
