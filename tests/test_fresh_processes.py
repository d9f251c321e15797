"""``hydra/launcher=local``: one fresh process for each point, and sweeps that go on or end with what fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import TINY
from hydra.core.utils import JobStatus

from cvdd.report.sweeps import read_directory
from cvdd.support.outcome import INTERRUPTED
from hydra_plugins.cvdd_local import FreshProcessLauncher

ROOT = Path(__file__).parents[1]


def fresh(monkeypatch: pytest.MonkeyPatch, point: Any) -> FreshProcessLauncher:
    made = FreshProcessLauncher()
    monkeypatch.setattr(made, "point", point)
    return made


def returning(overrides: list[str], index: int) -> SimpleNamespace:
    return SimpleNamespace(overrides=overrides, pid=os.getpid(), index=index)


def test_each_point_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fresh(monkeypatch, returning)
    one, two = made._run(["seed=0"], 0), made._run(["seed=1"], 1)
    assert (one.overrides, two.overrides, two.index) == (["seed=0"], ["seed=1"], 1)
    assert len({one.pid, two.pid, os.getpid()}) == 3


def test_a_killed_point_fails_and_the_sweep_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fresh(monkeypatch, lambda overrides, index: os.kill(os.getpid(), signal.SIGKILL))
    result = made._run(["seed=0"], 3)
    assert result.status is JobStatus.FAILED
    with pytest.raises(RuntimeError, match="point 3 was killed by SIGKILL"):
        _ = result.return_value


@pytest.mark.parametrize("code", [1, 2])
def test_a_point_that_ends_by_itself_fails_and_the_sweep_goes_on(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As :mod:`cvdd.commands.ranks` ends it, once another rank is lost and this one waits for it in vain."""
    made = fresh(monkeypatch, lambda overrides, index: os._exit(code) if index == 3 else returning(overrides, index))
    result = made._run(["seed=0"], 3)
    assert result.status is JobStatus.FAILED
    assert result.overrides == ["seed=0"]
    with pytest.raises(RuntimeError, match=f"point 3 ended with exit code {code}"):
        _ = result.return_value
    assert made._run(["seed=1"], 4).overrides == ["seed=1"]


def test_a_result_of_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fresh(monkeypatch, lambda overrides, index: os._exit(0))
    with pytest.raises(RuntimeError, match="point 0 ended with exit code 0"):
        _ = made._run(["seed=0"], 0).return_value


def test_an_interrupted_point_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fresh(monkeypatch, lambda overrides, index: sys.exit(INTERRUPTED))
    with pytest.raises(SystemExit) as stopped:
        made._run(["seed=0"], 0)
    assert stopped.value.code == INTERRUPTED


def test_a_result_that_cannot_be_sent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fresh(monkeypatch, lambda overrides, index: lambda: None)
    result = made._run(["seed=0"], 0)
    assert result.status is JobStatus.FAILED
    with pytest.raises(RuntimeError, match="pickle"):
        _ = result.return_value


def trained(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A sweep over the training of members, typed in a folder."""
    command = [sys.executable, str(ROOT / "train.py"), "--multirun", f"hydra.sweep.dir={folder / 'sweep'}", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_sweep_in_fresh_processes(tmp_path: Path) -> None:
    done = trained(tmp_path, "hydra/launcher=local", *TINY, "recipe.epochs=1,0")
    # The second point is refused, and the first is there.
    assert done.returncode == 1
    assert "recipe.epochs=0" in done.stderr + done.stdout
    assert len(list((tmp_path / "store").glob("members/*/manifest.json"))) == 3


@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_a_sweep_can_end_with_the_first_point_that_fails(tmp_path: Path, launcher: str) -> None:
    """As the README has it."""
    overrides = ("dataset=cifar10,cifar100", f"dataset.root={tmp_path}", "hydra.sweeper.max_batch_size=1")
    done = trained(tmp_path, f"hydra/launcher={launcher}", *overrides)
    assert done.returncode == 1
    assert "cifar10: no data" in done.stderr + done.stdout
    states = [point.status for point in read_directory(tmp_path / "sweep").points]
    assert states == ["failed", "missing"]
