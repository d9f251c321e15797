"""The points that a multirun was typed for, also before they begin, and the directories in which they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cvdd.composition.sweep import asked, without_cost
from cvdd.support.outcome import OUTCOME

_TYPED = ".hydra/overrides.yaml"
"""In the directory of a point that has begun."""
_BASIC = f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"


@dataclass(frozen=True)
class Numbered:
    """A point of a multirun without names.

    Attributes:
        folder: its directory, or the one that it will have.
        overrides: of the point alone.
        begun: whether a command has made that directory for this point.
    """

    folder: Path
    overrides: tuple[str, ...]
    begun: bool


def numbered_points(directory: Path, config: DictConfig) -> list[Numbered]:
    """List the points of a multirun in the order in which it makes them.

    Args:
        directory: of the multirun.
        config: its multirun.yaml.
    """
    folders = sorted(
        (path.parents[1] for path in directory.glob(f"*/{_TYPED}")), key=lambda path: (len(path.name), path.name)
    )
    points = _expanded(config)
    if points is None:
        return [Numbered(folder, tuple(without_cost(_typed(folder))), True) for folder in folders]
    free: dict[tuple[str, ...], list[Path]] = {}
    for folder in folders:
        free.setdefault(tuple(asked(_made(folder))), []).append(folder)
    found = []
    for index, overrides in enumerate(points):
        # hydra.sweep.subdir may call them anything; of points that are equal each has its own number.
        equal, own = free.get(tuple(asked(overrides)), []), directory / str(index)
        begun = bool(equal)
        folder = own if own in equal or not begun else equal[0]
        if begun:
            equal.remove(folder)
        found.append(Numbered(folder, tuple(without_cost(overrides)), begun))
    return found


def _expanded(config: DictConfig) -> list[list[str]] | None:
    """List the overrides of each point; None where only its sweeper or the files of the configuration tell them."""
    sweeper = OmegaConf.select(config, "hydra.sweeper") or {}
    if sweeper.get("_target_", _BASIC) != _BASIC:
        return None
    fixed = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    try:
        overrides = OverridesParser.create().parse_overrides([*fixed, *map(str, config.hydra.overrides.task)])
        (points,) = BasicSweeper.split_arguments(overrides, None)
    except HydraException:
        return None
    return points


def _typed(folder: Path) -> list[str]:
    return [str(item) for item in OmegaConf.load(folder / _TYPED)]


def _made(folder: Path) -> list[str]:
    """Overrides of what was made last: Hydra's own file is also of a command that only asked for the cost."""
    try:
        return [str(item) for item in json.loads((folder / OUTCOME).read_text())["overrides"]]
    except (OSError, ValueError):
        return _typed(folder)
