"""Commands that run at once make everything once; those whose parent or whose other rank dies lose nothing."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from commands import PATIENCE, SECONDS_BETWEEN_LOOKS, VERBS, Command, Reference, contents

pytest_plugins = ["faults_fixtures"]
pytestmark = pytest.mark.faults


def work_done(home: Path) -> Counter[str]:
    """How often each artefact was sealed, and each unit of images saved."""
    return Counter((home / "work.txt").read_text().splitlines())


def wait_for(path: Path, words: str, command: Command) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or words not in path.read_text():
        assert command.alive, command.log
        assert time.monotonic() < deadline, command.log
        time.sleep(SECONDS_BETWEEN_LOOKS)


def gone(pid: int, seconds: float = 60.0) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_two_identical_commands_at_once(reference: Reference, tmp_path: Path) -> None:
    home = reference.copy(tmp_path, "images", "labels", "students")
    commands = [Command("relabel", home) for _ in range(2)]
    for command in commands:
        command.finish()
    reference.require_same(home, ("images", "labels"))
    done = work_done(home)
    assert set(done.values()) == {1}
    # Two artefacts, and the two units of the images.
    assert len(done) == 4


@pytest.mark.slow
def test_four_points_of_a_sweep_share_a_committee(reference: Reference, tmp_path: Path) -> None:
    """Started at once on an empty store; the temperature of the vote changes the images alone."""
    temperatures = (1, 2, 5, 10)
    for command in [Command("distill", tmp_path, f"temperature.vote={value}") for value in temperatures]:
        command.finish()
    done = work_done(tmp_path)
    assert set(done.values()) == {1}
    made = contents(tmp_path)
    kinds = Counter(name.split("/")[0] for name in made)
    assert kinds == {"data": 2, "members": 3, "patches": 1, "images": 4}
    assert {name for name in made if not name.startswith("images/")} <= set(done)
    reference.require_same(tmp_path, ("data", "members", "patches"))


RANKS = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")


@pytest.mark.slow
def test_a_rank_dies(reference: Reference, tmp_path: Path) -> None:
    """The other makes what it can alone; the repeated command makes the rest."""
    home = reference.without_verb(tmp_path, "distill")
    command = Command("distill", home, *RANKS)
    wait_for(command.folder / "out" / "rank1.log", "making images", command)
    (rank,) = command.children()
    os.kill(rank, signal.SIGKILL)
    code = command.end()
    assert code in (0, 2), command.log
    assert "rank 1 ended with exit code -9" in command.log
    Command("distill", home, *RANKS).finish()
    reference.require_same(home, VERBS["distill"])
    assert set(work_done(home).values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "overrides"), [("distill", RANKS), ("evaluate", ("trainer.assistants=1",))])
def test_the_parent_dies(verb: str, overrides: tuple[str, ...], reference: Reference, tmp_path: Path) -> None:
    """Its ranks and assistants end with it and hold nothing that the repeated command would wait for."""
    home = reference.without_verb(tmp_path, verb)
    command = Command(verb, home, *overrides)
    command.work_for(0.2)
    while not command.children():
        assert command.alive, command.log
        time.sleep(SECONDS_BETWEEN_LOOKS)
    (child,) = command.children()
    os.kill(command.pid, signal.SIGKILL)
    assert command.end() == -signal.SIGKILL
    assert gone(child)
    Command(verb, home, *overrides).finish()
    reference.require_same(home, VERBS[verb])
