"""Every command that the README and its pages give composes and passes the checks."""

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

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """Collect (verb, overrides) of all ``python VERB.py`` lines, comments and line continuations resolved."""
    text = page.read_text().replace("\\\n", " ")
    commands = []
    for line in re.findall(r"^\s+python (\w+\.py[^\n]*)$", text, flags=re.MULTILINE):
        script, *overrides = shlex.split(line, comments=True)
        commands.append((script.removesuffix(".py"), overrides))
    return commands


COMMANDS = [command for page in PAGES for command in commands_of(page)]


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
    assert {verb for verb, _ in commands_of(README)} == {"train", "distill", "relabel", "evaluate"}


@pytest.mark.parametrize(("verb", "overrides"), COMMANDS, ids=[" ".join([v, *o])[:60] for v, o in COMMANDS])
def test_a_command_of_a_page_is_valid(verb, overrides, compose):
    if "--help" in overrides:
        pytest.skip("help is tested with the command line")
    if any(override.startswith("hydra/launcher=slurm") for override in overrides):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for point in points([THERE.get(override, override) for override in overrides]):
        assert compose(verb, *point).verb == verb


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To a file beside the page, and to a heading in it where one is named."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}, target
