"""Sweeps with names: their points become choices of a group that Hydra's own sweeper walks through.

A file of ``conf/sweep`` sets ``hydra.mode=MULTIRUN`` and gives a callback (:mod:`cvdd.commands.sweep_callback`) its
points. A point is a piece of configuration, so a sweep need not be a full product, and a point's directory has its
name: the same command meets the same directory again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, ValidationError, model_validator

from cvdd.composition.arguments import FIELDS, ArgumentError, is_of_surroundings, own_directories
from cvdd.support.config_base import StrictConfig

log = logging.getLogger(__name__)

GROUP = "point"
STATE = "point.json"
"""In a point's directory: how far it is."""

_POINT = re.compile(rf"\+?{GROUP}=(.*)")
_COST = re.compile(r"\+*cost=.*")
_LISTING = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc")


class PointConfig(StrictConfig):
    """One point of a sweep."""

    at: list[str | int | float | None] = Field(description="its place on each axis; null: it lies on all of that axis")
    settings: dict[str, Any] = Field({}, description="the configuration in which it differs, with defaults if need be")
    row: dict[str, Any] = Field(
        {}, description="dotted keys in which a row of compare differs, which is shown instead and shares the priors"
    )


class SweepConfig(StrictConfig):
    """What a sweep varies and how it is shown."""

    title: str = Field(description="of the page")
    axes: list[str] = Field(min_length=1, max_length=2, description="what varies: along x and, if given, along y")
    plot: Literal["curve", "heat_map"] = Field("curve", description="curve: a line for each place on the second axis")
    points: dict[str, PointConfig] = Field(min_length=1, description="the points by the names of their directories")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.plot == "heat_map" and len(self.axes) == 1:
            raise ValueError("plot=heat_map needs two axes")
        for name, point in self.points.items():
            if not re.fullmatch(r"[\w+-][\w.+-]*", name):
                raise ValueError(
                    f"points.{name}: a point's name is that of a directory: letters, digits and _ + -, and after the "
                    "first of them also ."
                )
            if len(point.at) != len(self.axes):
                raise ValueError(f"points.{name}.at needs a place on each of {', '.join(self.axes)}")
        return self

    def node(self, name: str) -> dict[str, Any]:
        """Return what Hydra merges into the configuration at a point."""
        point = self.points[name]
        if not point.row:
            return dict(point.settings)
        return {**point.settings, "compare": {name: {"method.name": name, **point.row}}}

    def varied(self) -> list[str]:
        """List the dotted keys and groups that the points decide, so that nobody else can."""
        rows = [set(point.row) for point in self.points.values()]
        keys = [key for point in self.points.values() for key in _settings_keys(point.settings)]
        return list(dict.fromkeys([*keys, *sorted(set.intersection(*rows))]))


def read_sweep(config: DictConfig) -> SweepConfig | None:
    """Return the sweep that a composed or a single configuration describes; None if it describes none.

    Raises:
        ValueError: what it describes is no sweep.
    """
    node = OmegaConf.select(config, "hydra.callbacks.sweep")
    if node is None:
        return None
    tree = OmegaConf.to_container(node, resolve=True)
    assert isinstance(tree, dict)
    return SweepConfig.model_validate({str(key): value for key, value in tree.items() if key != "_target_"})


def with_points(arguments: Sequence[str], directory: Path) -> list[str]:
    """Make the points of the chosen sweep known to Hydra and add them to the arguments.

    Args:
        arguments: of the command line, after :func:`cvdd.composition.arguments.prepare`.
        directory: of the configuration; a directory of one's own (``--config-dir``) is looked into first.

    Raises:
        ArgumentError: there is no such point, or the sweep would overwrite or be overwritten by what was typed.
    """
    name = next((argument[len("sweep=") :] for argument in arguments if argument.startswith("sweep=")), None)
    chosen = chosen_points(arguments)
    if name is None:
        if chosen:
            raise ArgumentError(f"{GROUP}={','.join(chosen)}: points are of a sweep; choose one with sweep=NAME")
        return list(arguments)
    if "," in name:
        raise ArgumentError(f"sweep={name}: choose one; each has a directory and a table of its own")
    files = [folder / "sweep" / f"{name}.yaml" for folder in (*own_directories(arguments), directory)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        # Hydra lists the choices.
        return list(arguments)
    try:
        sweep = read_sweep(OmegaConf.create(OmegaConf.load(file)))  # type: ignore[arg-type]
    except (ValidationError, ValueError) as error:
        raise ArgumentError(f"{file}: {error}") from error
    if sweep is None:
        raise ArgumentError(f"{file}: hydra.callbacks.sweep is missing; it holds the points")
    _register(sweep)
    others = [argument for argument in arguments if not _POINT.fullmatch(argument)]
    _refuse_conflicts(name, sweep, others)
    unknown = [point for point in chosen if point not in sweep.points]
    if unknown:
        raise ArgumentError(f"{GROUP}={','.join(unknown)}: sweep={name} has the points {', '.join(sweep.points)}")
    if not chosen and any(argument.partition("=")[0] in _LISTING for argument in arguments):
        # Only one configuration can be shown: that in which the points differ.
        return others
    # Beside the sweep: Hydra's parser takes no override after an option that follows others.
    quoted = [f"'{point}'" for point in chosen or sweep.points]
    place = others.index(f"sweep={name}") + 1
    return [*others[:place], f"+{GROUP}={','.join(quoted)}", *others[place:]]


def chosen_points(overrides: Sequence[str]) -> list[str]:
    """List the points that a command names; a sweep of none that is named is of all."""
    typed = [match[1] for override in overrides if (match := _POINT.fullmatch(override))]
    return [point for points in typed for point in points.replace("'", "").split(",")]


def _register(sweep: SweepConfig) -> None:
    store = ConfigStore.instance()
    for name in sweep.points:
        store.store(group=GROUP, name=name, node=sweep.node(name), package="_global_", provider="cvdd")


def _refuse_conflicts(name: str, sweep: SweepConfig, arguments: Sequence[str]) -> None:
    for argument in arguments:
        key, sign, _ = argument.lstrip("+~").partition("=")
        key = key.partition("@")[0]
        if not sign or key.startswith("-"):
            continue
        if not key.startswith("hydra.") and _is_of_many(argument):
            raise ArgumentError(
                f"{argument}: sweep={name} has its points already; give one value, or start the sweep once for each "
                "with its own hydra.sweep.dir"
            )
        key = FIELDS.get(key, key)
        for other in sweep.varied():
            if key == other or ("." in key and (key.startswith(f"{other}.") or other.startswith(f"{key}."))):
                raise ArgumentError(f"{argument}: sweep={name} varies {other} itself; leave out one of the two")


def _is_of_many(argument: str) -> bool:
    """Whether an override stands for several values: a list without brackets, a range, a pattern."""
    try:
        return OverridesParser.create().parse_override(argument).is_sweep_override()
    except HydraException:
        # Hydra says what is wrong with it.
        return False


def _settings_keys(settings: Mapping[str, Any]) -> Iterator[str]:
    for entry in settings.get("defaults", []):
        for key in entry if isinstance(entry, dict) else ():
            group = key.removeprefix("override ").lstrip("/")
            yield FIELDS.get(group, group)
    yield from (key for key, _ in leaves({key: value for key, value in settings.items() if key != "defaults"}))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of what is no dictionary, or an empty one."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def same_command(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of overrides ask for the same, wherever it runs and whichever of a sweep's points it is."""
    return asked(one) == asked(other)


def is_of_command(state: Mapping[str, Any], verb: str, overrides: Sequence[str]) -> bool:
    """Whether what a point's directory says of itself comes from a command, or from the same one at another time.

    Args:
        state: with the verb and the overrides of the command that left it. Earlier versions noted no verb.
        verb: of the command.
        overrides: of the command.
    """
    return state.get("verb", verb) == verb and same_command(state["overrides"], overrides)


def asked(overrides: Sequence[str]) -> list[str]:
    """Return what :func:`same_command` compares, in order."""
    return sorted(
        item for item in without_cost(overrides) if not is_of_surroundings(item) and not _POINT.fullmatch(item)
    )


def without_cost(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of the command whose cost is asked for, which are its own where it is not."""
    return [item for item in overrides if not _COST.fullmatch(item)]


def only_asks(config: DictConfig) -> bool:
    """Whether a command only asks what it would cost, and makes nothing."""
    return str(OmegaConf.select(config, "cost", default=False)).lower() == "true"
