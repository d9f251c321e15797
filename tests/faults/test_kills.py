"""Commands that are killed or stopped at random moments and repeated end with the bits of those that were not."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from commands import VERBS, Command, Reference

from cvdd.support.outcome import INTERRUPTED

pytest_plugins = ["faults_fixtures"]
pytestmark = pytest.mark.faults

SEED = 0


def stopped_and_repeated(reference: Reference, home: Path, verb: str, signals: list[int]) -> list[Command]:
    """Stop a verb by each signal in turn at a random moment of its work, then let it finish; return what was stopped.

    A command that finishes before its moment has come does not count, and all its work is taken away.
    """
    chance = random.Random(f"{SEED}/{verb}/{signals}")
    reference.without_verb(home, verb)
    stopped: list[Command] = []
    while len(stopped) < len(signals):
        command = Command(verb, home)
        if command.send_after(chance.uniform(0, reference.seconds[verb] / 2), signals[len(stopped)]):
            stopped.append(command)
            continue
        command.finish()
        reference.require_same(home, VERBS[verb])
        reference.without_verb(fresh(home), verb)
    Command(verb, home).finish()
    reference.require_same(home, VERBS[verb])
    return stopped


def fresh(home: Path) -> Path:
    shutil.rmtree(home / "store")
    return home


@pytest.mark.parametrize("verb", ["train", "distill", "evaluate"])
def test_killed_once(verb: str, reference: Reference, tmp_path: Path) -> None:
    (command,) = stopped_and_repeated(reference, tmp_path, verb, [signal.SIGKILL])
    assert command.end() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_five_times(verb: str, reference: Reference, tmp_path: Path) -> None:
    commands = stopped_and_repeated(reference, tmp_path, verb, 5 * [signal.SIGKILL])
    assert [command.end() for command in commands] == 5 * [-signal.SIGKILL]


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_stopped_by_every_signal(verb: str, reference: Reference, tmp_path: Path) -> None:
    """While a network or images are trained the signal waits for a checkpoint; at other moments it ends the process."""
    commands = stopped_and_repeated(reference, tmp_path, verb, [int(number) for number in SIGNALS])
    for number, command in zip(SIGNALS, commands, strict=True):
        assert command.end() in (INTERRUPTED, -number), command.log
        assert "Traceback" not in command.log
        if command.end() == INTERRUPTED:
            assert "the same command goes on" in command.log
