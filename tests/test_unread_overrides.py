"""Overrides that were typed and change nothing: they are named, and those that do something are not."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from given_helpers import given
from helpers import PUBLISHED_IMAGES, TINY, configure, tiny_context
from test_cli import run_script

from cvdd.chain.given import given_start
from cvdd.commands.unread_overrides import unread_overrides, warn_of_unread
from cvdd.composition.arguments import says_what_is_made
from cvdd.cost.plan import Piece, other_metrics, plan_pieces, planning
from cvdd.schema import RunConfig
from cvdd.support.config_base import ConfigError

MEASURED = (
    "prior.source=measured",
    "prior.values=null",
    "prior.images_per_class=2",
    "prior.iterations=2",
    "prior.epochs=2",
    "committee.voter=prior",
)


def pieces(config: RunConfig) -> Sequence[Piece]:
    return plan_pieces(planning(config, torch.device("cpu"), unmeasured=other_metrics))


def unread(root: Path, *typed: str, base: Sequence[str] = TINY) -> list[str]:
    """Which of some overrides change nothing beside the others."""
    config = configure(root, *base, *typed)
    rest = []
    for one in typed:
        # As of a command: what cannot be without it is read.
        with contextlib.suppress(ConfigError):
            rest.append((one, configure(root, *base, *(other for other in typed if other != one))))
    return unread_overrides(config, rest, pieces)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["prior.observer=resnet50"], ["prior.observer=resnet50"]),
        (["ipc.label_batch=4"], ["ipc.label_batch=4"]),
        (["method.lr=0.1", "method.iterations=0"], ["method.lr=0.1"]),
        (["committee.size=1", "temperature.vote=2"], ["temperature.vote=2"]),
        (["method.voters=[resnet18,resnet50]", "committee.size=3"], ["committee.size=3"]),
        (["method=random_real", "method.iterations=0", "patches.difficulty=easy"], ["patches.difficulty=easy"]),
        (
            ["method=random_real", "method.iterations=0", "committee.voter=equal", "patches.crops=3"],
            ["committee.voter=equal", "patches.crops=3"],
        ),
    ],
    ids=str,
)
def test_what_changes_nothing_is_named(typed: list[str], expected: list[str], tmp_path: Path) -> None:
    assert unread(tmp_path, *typed) == expected


@pytest.mark.parametrize(
    "typed",
    [
        ["method.lr=0.1", "temperature.vote=2", "committee.size=3", "label.epochs=4", "protocol.seeds=[0,1]", "seed=1"],
        ["label.store=none", "protocol.full_data=true", "students.tiny_resnet18.arguments.width=5"],
    ],
    ids=str,
)
def test_what_changes_something_is_not_named(typed: list[str], tmp_path: Path) -> None:
    assert unread(tmp_path, *typed) == []


def test_the_default_may_be_typed(tmp_path: Path) -> None:
    config = configure(tmp_path, *TINY)
    assert unread(tmp_path, f"temperature.vote={config.temperature.vote}", "committee.size=1") == []


@pytest.mark.parametrize("typed", ["method.name=mine", "method.log_every=1", "protocol.eval_batch=7"])
def test_names_and_what_is_told_are_no_settings_of_what_is_made(typed: str, tmp_path: Path) -> None:
    assert unread(tmp_path, typed) == []


def test_priors_need_not_be_known(tmp_path: Path) -> None:
    """A temperature weighs priors that are still to be measured, for which other settings are read."""
    measured = [*TINY, *MEASURED]
    assert unread(tmp_path, "temperature.vote=2", "committee.draw=best", "prior.seeds=2", base=measured) == []
    assert unread(tmp_path, "ipc.label_batch=4", base=measured) == ["ipc.label_batch=4"]


@pytest.mark.parametrize("typed", ["method.lr=1", "temperature='5'", "label=tiny", "+prior.values.mine=4", "seed=1"])
def test_settings_of_what_is_made_are_looked_at(typed: str) -> None:
    assert says_what_is_made(typed)


@pytest.mark.parametrize(
    "typed",
    [
        "trainer=cpu",
        "paths.store=elsewhere",
        "hydra.launcher.timeout_min=3",
        "engine=compiled",
        "engine.precision=bf16",
        "dataset.root=elsewhere",
        "experiment=cifar10_subset",
        "debug=smoke",
        "+point=N1",
        "compare=none",
        "~compare.random_real",
        "students.tiny_resnet18.arguments.width=5",
        "+backbone@students.tiny_convnet3=tiny_convnet3",
        "protocol.full_data=true",
        "cost=true",
    ],
)
def test_surroundings_rows_and_whole_commands_are_not(typed: str) -> None:
    assert not says_what_is_made(typed)


def test_a_command_says_what_it_does_not_read(tmp_path: Path) -> None:
    typed = ("method=random_real", "prior=cifar10", "patches.crops=3", "method.seed=1", "trainer.accelerator=cpu")
    done = run_script("distill", *typed, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in (done.stdout + done.stderr).splitlines() if "nothing here reads" in line)
    assert "patches.crops=3: nothing here reads it" in line


def test_what_a_run_has_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = [*given(PUBLISHED_IMAGES), "ipc.label_batch=4", "prior.observer=resnet50"]
    context = tiny_context(tmp_path, *typed)
    read: list[object] = []

    def noting(source: object) -> str:
        read.append(source)
        return "0" * 64

    monkeypatch.setattr("cvdd.chain.given.checksum_of", noting)
    given_start(context)
    rest = [(one, tiny_context(tmp_path, *(word for word in typed if word != one)).config) for one in typed[-2:]]
    warn_of_unread(context, rest)
    assert len(read) == 1
