"""Compilers that run side by side before anything is measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import compile_ahead
from benchmarks.cases import Case
from benchmarks.speed import default_cache_dir, use_own_cache


def test_networks_are_compiled_before_cases_and_those_that_fail_leave_theirs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process for each network and size, however many cases need it; labels and students wait for none."""
    pairs = [("resnet18", "resnet50"), ("resnet18", "mobilenetv2"), ("resnet50", "mobilenetv2")]
    wanted = [Case("recover", "digits", pair, images=4, steps=1) for pair in pairs]
    others = [Case("student", "digits", ("resnet18",), images=4, steps=1)]
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(command[3:])
            assert int(env["TORCHINDUCTOR_COMPILE_THREADS"]) >= 2
            # One is refused, another never ends.
            self.returncode = {"resnet50": 1, "mobilenetv2": None}.get(command[6], 0)

        def poll(self) -> int | None:
            return self.returncode

        def kill(self) -> None:
            stopped.append(self)

        def wait(self) -> None:
            pass

    stopped: list[Process] = []
    monkeypatch.setattr(compile_ahead.subprocess, "Popen", Process)
    taken, left = compile_ahead.compile_all([*wanted, *others], 1.0)
    assert sorted(arguments[3] for arguments in started) == ["mobilenetv2", "resnet18", "resnet50"]
    assert list(taken) == ["digits_4_resnet18"]
    assert left == others
    assert len(stopped) == 1


def test_what_was_compiled_before_does_not_make_compilation_look_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch may have named its usual folder in the environment by itself; one that the caller chose is kept."""
    for before, after in [(None, tmp_path), (default_cache_dir(), tmp_path), ("/a/b", Path("/a/b"))]:
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        if before is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        use_own_cache(tmp_path)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(after)
        assert os.environ["TRITON_CACHE_DIR"] == f"{after}/triton"
