"""Rows of a comparison that are written as one would type them, as fields in which they differ."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cvdd.composition.arguments import ArgumentError, key_of
from cvdd.composition.fields import fields, is_known, model_at
from cvdd.composition.surroundings import FULL_DATA, is_shared_by_rows
from cvdd.composition.validation import said_by_resolver, shared_by_rows
from cvdd.schema import RunConfig, with_overrides
from cvdd.support.closest import closest
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

NOT_COMPOSED = (HydraException, OmegaConfBaseException, ArgumentError)
"""What is raised where a command cannot be composed."""

_TRAINED, _LABELLED = "protocol.epochs", "label.epochs"
_ITERATIONS = "method.iterations"

Composer = Callable[[Sequence[str]], DictConfig]
"""Composes the same command with more overrides."""


def expand_rows(
    composed: DictConfig, compose: Composer, limits: Mapping[str, float], compose_alone: Composer
) -> DictConfig:
    """Replace the rows of ``compare`` that are lists of overrides by the fields in which they differ.

    A row such as ``[method=sre2l, label=sre2l]`` is composed like the command itself with these overrides at its end,
    so that it may choose other files of a group; what comes out differently is the row.

    Args:
        composed: the configuration.
        compose: composes it again with more overrides.
        limits: by field, what no row is to exceed: ``debug=smoke`` is for a moment, whatever rows say.
        compose_alone: composes a command of these overrides alone. It tells what a row would be without what was typed
            beside it, so that a method which optimises nothing for that reason is said.

    Raises:
        ConfigError: a row cannot be composed.
    """
    rows = composed.get("compare") or {}
    for name, row in rows.items():
        if isinstance(row, str):
            raise ConfigError(f"compare.{name}={row}: a row is a list of overrides; write [{row}]")
    written = {name: row for name, row in rows.items() if isinstance(row, ListConfig)}
    if not rows or not (written or limits):
        return composed
    try:
        base = _tree(composed)
    except OmegaConfBaseException as error:
        # Of the command itself and of no row.
        raise ConfigError(reason(error)) from error
    # Labels are made for as many epochs as students train unless a row asks for more.
    if _TRAINED in limits:
        limits = {**limits, _LABELLED: limits[_TRAINED]}
    # What was typed beside debug=smoke holds for all rows.
    limits = {key: max(limit, _number(base, key) or limit) for key, limit in limits.items()}
    if _TRAINED in limits:
        # A row of hard labels has as many epochs of them as it trains, however few are labelled elsewhere.
        limits[_LABELLED] = max(limits[_LABELLED], limits[_TRAINED])
    cut: dict[str, list[str]] = {}
    expanded = composed.copy()
    with open_dict(expanded):
        for name, row in expanded.compare.items():
            if isinstance(row, DictConfig):
                beyond = [key for key, limit in limits.items() if (_number(row, key, whole=True) or 0) > limit]
                for key in beyond:
                    cut.setdefault(f"{key}={row[key]} becomes {limits[key]}", []).append(f"compare.{name}")
                row.update({key: limits[key] for key in beyond})
        for name, row in written.items():
            overrides = [str(override) for override in row]
            where = f"compare.{name}=[{','.join(overrides)}]"
            named = [key_of(override) for override in overrides]
            for key in named:
                if is_shared_by_rows(key):
                    raise ConfigError(f"{where}: {shared_by_rows(key)}")
            try:
                tree = _tree(compose(overrides))
                # Labels that are given have the epochs they have.
                beyond = [
                    key
                    for key, limit in limits.items()
                    if (_number(tree, key) or 0) > limit and (key != _LABELLED or key in named)
                ]
                # A group that was chosen has numbers for a real run, which nobody expects of a moment.
                for key in (key for key in beyond if key in named):
                    cut.setdefault(f"{key}={_number(tree, key)} becomes {limits[key]}", []).append(f"compare.{name}")
                if beyond:
                    tree = _tree(compose([*overrides, *(f"{key}={limits[key]}" for key in beyond)]))
            except NOT_COMPOSED as error:
                raise ConfigError(f"{where}: {reason(error)}") from error
            unknown = tree.keys() - base.keys()
            if unknown:
                raise ConfigError(f"{where}: {min(unknown)}: there is no such field{_nearest(min(unknown))}")
            expanded.compare[name] = {key: value for key, value in differences(base, tree).items() if key != FULL_DATA}
            # Typed for baselines, it holds for whatever method stands beside them.
            idle = not (_number(base, _ITERATIONS) or _number(tree, _ITERATIONS)) and _ITERATIONS not in named
            if idle and "method" in named and (own := _own_iterations(compose_alone, overrides)):
                log.warning(
                    "%s has method.iterations=0 as the command itself, so its images are those that it begins with. To "
                    "optimise them write [%s,method.iterations=%g]",
                    where,
                    ",".join(overrides),
                    own,
                )
    if cut:
        log.warning(
            "debug cuts what rows say: %s. A row may have as much as the command itself: type such a number beside "
            "the rows, too",
            "; ".join(f"{what} in {', '.join(rows)}" for what, rows in cut.items()),
        )
    return expanded


def recomposed(config: RunConfig, composed: DictConfig, other: DictConfig) -> RunConfig:
    """Return a checked configuration as it would be, had the command been composed otherwise; its rows stay.

    Args:
        config: checked.
        composed: from what.
        other: the other composition.

    Raises:
        ValueError: that could not run.
    """
    return with_overrides(config, differences(_tree(composed), _tree(other)))


def _own_iterations(compose_alone: Composer, overrides: Sequence[str]) -> float | None:
    """Iterations of a row that is a command of its own; None where that cannot be composed."""
    with contextlib.suppress(*NOT_COMPOSED):
        return _number(_tree(compose_alone(overrides)), _ITERATIONS)
    return None


def _number(tree: Mapping[Any, Any], key: str, whole: bool = False) -> float | None:
    """Return what is at a dotted key, or at one that is whole, if it is a number."""
    node: Any = tree
    for part in [key] if whole else key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, (int, float)) else None


def reason(error: Exception) -> str:
    """Say in one line why a row cannot be composed, and what would be valid."""
    first = str(error).splitlines()[0]
    if said := said_by_resolver(first):
        return said
    if isinstance(error, MissingConfigException) and error.options:
        group, _, wrong = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={wrong}: choose {', '.join(error.options)}{closest(wrong, error.options, '')}"
    unknown = re.fullmatch(r"Could not override '(.+)'\.", first)
    if unknown and is_known(unknown[1]):
        path = unknown[1].split(".")
        instead = f"choose {path[0]}=NAME that has it" if model_at(path[:-1]) else f"write +{unknown[1]}=VALUE"
        return f"{unknown[1]}: there is none in this row; {instead}"
    if unknown:
        return f"{unknown[1]}: there is no such field or group{_nearest(unknown[1])}"
    return first


def _nearest(key: str) -> str:
    return closest(key, [*RunConfig.model_fields, *(field.key for field in fields())])


def _tree(config: DictConfig) -> dict[str, Any]:
    # Part by part, because the surroundings refer to things that only exist while a command runs.
    return {str(key): _plain(config[key]) for key in config if key == "students" or not is_shared_by_rows(str(key))}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, (DictConfig, ListConfig)) else value


def differences(base: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """List by dotted key what has another value in ``other``.

    Where two dictionaries do not have the same keys the whole of the other one is the value.
    """
    found: dict[str, Any] = {}
    for key, value in other.items():
        old = base[key]
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.keys() == old.keys():
            found |= differences(old, value, f"{prefix}{key}.")
        elif value != old:
            found[f"{prefix}{key}"] = value
    return found
