"""Every command that the README gives composes and passes the checks."""

from __future__ import annotations

import re
import shlex
from itertools import product
from pathlib import Path

import pytest
from helpers import PUBLISHED_LABELS

# Labels that are there in the place of those that a reader has, which are of more epochs.
THERE = {
    "label.given=store/labels/NAME-HASH": f"label.given={PUBLISHED_LABELS}",
    "protocol.epochs=120": "protocol.epochs=3",
}

README = Path(__file__).parent.parent / "README.md"


def readme_commands() -> list[tuple[str, list[str]]]:
    """Collect (verb, overrides) of all ``python VERB.py`` lines, comments and line continuations resolved."""
    text = README.read_text().replace("\\\n", " ")
    commands = []
    for line in re.findall(r"^\s+python (\w+\.py[^\n]*)$", text, flags=re.MULTILINE):
        script, *overrides = shlex.split(line, comments=True)
        commands.append((script.removesuffix(".py"), overrides))
    return commands


COMMANDS = readme_commands()


def points(overrides: list[str]) -> list[list[str]]:
    """Spell out a multirun: one list of overrides for each point of the sweep."""
    if not {"-m", "--multirun"} & set(overrides):
        return [overrides]
    axes = []
    for override in overrides:
        if override.startswith("-"):
            continue
        key, _, values = override.partition("=")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return [list(point) for point in product(*axes)]


def test_the_readme_has_commands_for_all_verbs():
    assert {verb for verb, _ in COMMANDS} == {"train", "distill", "relabel", "evaluate"}


@pytest.mark.parametrize(("verb", "overrides"), COMMANDS, ids=[" ".join([v, *o])[:60] for v, o in COMMANDS])
def test_a_command_of_the_readme_is_valid(verb, overrides, compose):
    if "--help" in overrides:
        pytest.skip("help is tested with the command line")
    if any(override.startswith("hydra/launcher=slurm") for override in overrides):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for point in points([THERE.get(override, override) for override in overrides]):
        assert compose(verb, *point).verb == verb
