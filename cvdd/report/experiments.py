"""The recipes of published numbers, and which of them were measured here."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from cvdd.composition.config_directory import config_directory
from cvdd.composition.surroundings import FULL_DATA, is_presentation
from cvdd.composition.validation import check
from cvdd.report.verdict import published
from cvdd.schema import ExpectedConfig
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

RUNS = ("outputs", "multirun")
"""Where the commands leave their runs, under the folder in which they are typed."""

FREE = (
    "verb",
    "seed",
    "method.seed",
    "protocol.seeds",
    FULL_DATA,
    "dataset.root",
    "dataset.download",
    "compare",
    "trainer",
    "logger",
    "paths",
)
"""Fields, and sections, in which a run may differ from a recipe and still measure the same cell, beside what it is
called and how often it tells of itself."""


@dataclass(frozen=True)
class Recipe:
    """A published number with the configuration that should give it.

    Attributes:
        name: of its file: ``experiment=NAME``.
        expected: the number.
    """

    name: str
    expected: ExpectedConfig


@dataclass(frozen=True)
class Measurement:
    """What a run of a recipe found.

    Attributes:
        run: its directory.
        verdict: of :func:`cvdd.report.verdict.hold_against`.
        changed: fields in which it is not the recipe.
    """

    run: Path
    verdict: Mapping[str, Any]
    changed: tuple[str, ...]


def read_recipes(conf: Path) -> list[Recipe]:
    """Read the published numbers of a configuration folder, without composing anything."""
    recipes = []
    for path in sorted((conf / "experiment").glob("*.yaml")):
        expected = yaml.safe_load(path.read_text()).get("expected")
        if expected is not None:
            recipes.append(Recipe(path.stem, ExpectedConfig.model_validate(expected)))
    return recipes


def find_runs(directories: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield directory and metrics.json of the runs that were held against a published number, the latest first."""
    files = {path for directory in directories for path in directory.rglob("metrics.json")}
    for path in sorted(files, key=lambda path: (path.stat().st_mtime, path), reverse=True):
        try:
            summary = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            log.warning("%s: cannot be read: %s", path, error)
            continue
        if isinstance(summary, dict) and summary.get("verdict"):
            yield path.parent, summary


def measurements(recipes: Sequence[Recipe], directories: Sequence[Path]) -> dict[str, Measurement]:
    """Find the measurement of each recipe: the latest run of just the recipe, or else the latest that changed it.

    Args:
        recipes: to look for.
        directories: in which runs lie, at any depth.
    """
    names = _names_by_cell(recipes)
    found: dict[str, Measurement] = {}
    for run, summary in find_runs(directories):
        name = names.get(_cell(summary["verdict"]["expected"]))
        if name is None or (name in found and not found[name].changed):
            continue
        changed = tuple(differences(summary["config"], composed(name)))
        if name not in found or not changed:
            found[name] = Measurement(run, summary["verdict"], changed)
    return found


def composed(name: str) -> dict[str, Any]:
    """Return the checked configuration of ``evaluate.py experiment=NAME`` as JSON; a running command keeps its own."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_directory()), version_base="1.3"):
            # Hydra knows the directory of a run only inside one.
            places = (f"paths.{key}=." for key in ("data", "store", "output"))
            config = compose("evaluate", [f"experiment={name}", *places])
    finally:
        GlobalHydra.instance().hydra = running
    return check(config).model_dump(mode="json")


def changed_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields in which a run is not the recipe of the number that it expects.

    Args:
        config: of the run, as JSON, with a published number.

    Returns:
        Dotted keys; none if it is the recipe, or if the number is not one of the project's recipes.
    """
    name = _names_by_cell(read_recipes(config_directory())).get(_cell(config["expected"]))
    return () if name is None else tuple(differences(config, composed(name)))


def differences(one: Any, other: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys in which two configurations differ, those of :data:`FREE` left out."""
    if prefix in FREE or is_presentation(prefix):
        return
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys((*one, *other)):
            absent = object()
            yield from differences(one.get(key, absent), other.get(key, absent), f"{prefix}.{key}".lstrip("."))
    elif one != other:
        yield prefix


def list_experiments(arguments: Sequence[str]) -> None:
    """Print every recipe of a published number with what was measured here.

    Args:
        arguments: parts of names; only recipes whose name has all of them are listed.

    Raises:
        ConfigError: no recipe has such a name.
    """
    recipes = read_recipes(config_directory())
    chosen = [recipe for recipe in recipes if all(part in recipe.name for part in arguments)]
    if not chosen:
        raise ConfigError(
            f"no recipe of a published number has {' and '.join(arguments)} in its name; names are like "
            f"{recipes[0].name}, and without an argument all are listed"
        )
    found = measurements(chosen, [Path(name) for name in RUNS])
    width = max(len(recipe.name) for recipe in chosen)
    for recipe in chosen:
        expected = published(recipe.expected.model_dump())
        print(f"{recipe.name:{width}}  {expected:>11}  {status(found.get(recipe.name))}")
    complete = sum(not measurement.changed for measurement in found.values())
    print(f"{len(chosen)} recipes, {complete} measured here; python evaluate.py experiment=NAME measures one")


def status(measurement: Measurement | None) -> str:
    """Say in a few words what is known of a recipe here."""
    if measurement is None:
        return "not measured here"
    verdict = measurement.verdict
    error = verdict["standard_error"]
    spread = "" if error is None else f" +- {error:.1f}"
    words = f"{verdict['measured']:.1f}{spread}, n = {verdict['n']}"
    if measurement.changed:
        more = ", ..." if len(measurement.changed) > 3 else ""
        return f"not measured here; with other {', '.join(measurement.changed[:3])}{more}: {words}"
    side = {True: ", within tolerance", False: ", outside tolerance", None: ""}[verdict["within"]]
    return f"measured {words}{side} ({measurement.run})"


def _names_by_cell(recipes: Sequence[Recipe]) -> dict[tuple[str, ...], str]:
    return {_cell(recipe.expected.model_dump()): recipe.name for recipe in recipes}


def _cell(expected: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(expected[key]) for key in ("source", "table", "cell", "student"))
