"""Processes that tests start, and what they wait for."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")


def in_process(function: Callable[..., None], *arguments: Any) -> Any:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def ends(process: Any) -> int | None:
    process.join(timeout=60)
    return process.exitcode


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
