"""Processes of this package that a command starts beside itself, and that end with it, whatever ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cvdd.schema import RunConfig

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_STOP = 10.0


@contextlib.contextmanager
def started(
    module: str, config: RunConfig, *arguments: object, journal: Path, own_session: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module of this package in a process of its own while the body runs.

    Args:
        module: its name; it is called with the path of the configuration, as JSON, and the arguments.
        config: what it is told to do.
        arguments: further ones.
        journal: file of what it says, written anew.
        own_session: whether Ctrl-C in the terminal is not meant for it.
    """
    with tempfile.TemporaryDirectory() as folder, journal.open("w") as said:
        written = Path(folder) / "config.json"
        written.write_text(config.model_dump_json())
        command = [sys.executable, "-m", module, str(written), *map(str, arguments)]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=own_session
        )
        try:
            yield process
        finally:
            _stop(process)


def begin_child() -> None:
    """What such a process does first: it logs, and ends with the one that started it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    end_with_parent()


def end_with_parent() -> None:
    """End this process when its parent is gone; what it was in the middle of is kept in the store."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name="parent").start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
