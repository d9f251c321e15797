"""Further processes that make parts of a comparison meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny_context
from mtt_helpers import mtt_context

import cvdd.running.children
from cvdd.chain.assistants import assist, assisted, own_way
from cvdd.chain.compare import compare
from cvdd.support.config_base import ConfigError
from cvdd.verbs.train import train

pytest_plugins = ["chain_fixtures"]

ROWS = "+compare.real={method.name: real, method.init: real, method.iterations: 0}"


def test_workers_begin_at_different_places_and_every_second_goes_backward() -> None:
    items = list("abcdefg")
    assert ["".join(own_way(items, index, 3)) for index in range(3)] == ["abcdefg", "dcbagfe", "efgabcd"]
    assert ["".join(own_way(items, index, 2)) for index in range(2)] == ["abcdefg", "gfedcba"]
    for total in range(1, 9):
        assert all(sorted(own_way(items, index, total)) == items for index in range(total))


def test_two_workers_meet_once_and_wait_for_one_item_at_most() -> None:
    """Each makes what it finds open, in steps that take as long; nobody waits more than a step."""
    ways = [own_way(list(range(20)), index, 2) for index in range(2)]
    made: set[int] = set()
    steps = 0
    while len(made) < 20:
        steps += 1
        made |= {next(item for item in way if item not in made) for way in ways if len(made) < 20}
    assert steps == 10


@pytest.mark.parametrize("images", ["once", "per_seed"])
def test_an_assistant_makes_what_the_comparison_needs(images: str, tmp_path: Path, sealed: list[str]) -> None:
    context = tiny_context(tmp_path, ROWS, "protocol.seeds=[0,1]", f"protocol.images={images}")
    assist(context.config, 1, 2)
    made = list(sealed)
    assert made.count("students") == 4
    assert made.count("images") == (2 if images == "once" else 4)
    sealed.clear()
    _, results = compare(context)
    assert sealed == []
    assert [result.row for result in results] == ["cvdd", "real"]


def test_an_assistant_trains_members_from_the_other_end(tmp_path: Path, sealed: list[str]) -> None:
    context = tiny_context(tmp_path, "recipe.epochs=1", "trainer.assistants=1", verb="train")
    assist(context.config, 1, 2)
    assert sealed.count("members") == 3
    made = sorted((tmp_path / "store" / "members").glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    assert [path.parent.name.split("-")[1] for path in made] == ["shufflenetv2", "resnet50", "resnet18"]
    sealed.clear()
    assert train(context, []).metric is not None
    assert sealed == []


def test_an_assistant_trains_the_teachers_of_a_method_from_the_other_end(tmp_path: Path, sealed: list[str]) -> None:
    teachers = "method.apm.teachers"
    quick = (f"{teachers}.epochs=2", f"{teachers}.milestone=1", f"{teachers}.backbone.arguments.width=8")
    context = tiny_context(
        tmp_path, "method=apm_tiny", f"{teachers}.count=3", *quick, "trainer.assistants=1", verb="train"
    )
    assist(context.config, 1, 2)
    assert sealed.count("teachers") == 3
    sealed.clear()
    assert train(context, []).metric is not None
    assert sealed == []


def test_experts_of_trajectories_have_no_assistants(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.assistants=1 has nothing to do: .*set trainer\.assistants=0"):
        train(mtt_context(tmp_path, "trainer.assistants=1", verb="train"), [])
    assert not list((tmp_path / "store").glob("trajectories/*"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_assistants_end_with_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    original = subprocess.Popen

    def noting(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(original(*arguments, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(cvdd.running.children.subprocess, "Popen", noting)
    context = tiny_context(tmp_path, "trainer.assistants=2", "recipe.epochs=500")
    with assisted(context.config):
        assert len(started) == 2
        assert all(alive(process.pid) for process in started)
    assert not any(alive(process.pid) for process in started)
    assert (context.config.paths.output / "assistant2.log").exists()


def test_an_assistant_whose_parent_dies_ends_by_itself(tmp_path: Path) -> None:
    config = tiny_context(tmp_path, "recipe.epochs=500").config
    written = tmp_path / "config.json"
    written.write_text(config.model_dump_json())
    journal = tmp_path / "journal"
    program = (
        "import subprocess, sys, time\n"
        f"log = open({str(journal)!r}, 'w')\n"
        f"command = [sys.executable, '-m', 'cvdd.chain.assistants', {str(written)!r}, '1', '2']\n"
        "print(subprocess.Popen(command, stderr=log).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assistant = int(parent.stdout.readline())
    try:
        deadline = time.monotonic() + 120
        while "making members" not in journal.read_text():
            assert alive(assistant), journal.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        parent.kill()
        parent.wait()
        while alive(assistant):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        if alive(assistant):
            os.kill(assistant, signal.SIGKILL)
