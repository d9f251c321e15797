"""Rows of a comparison that are written as one would type them, as fields in which they differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cvdd.config_base import ConfigError
from cvdd.fields import fields
from cvdd.schema import RunConfig
from cvdd.validation import closest

Composer = Callable[[Sequence[str]], DictConfig]
"""Composes the same command with more overrides."""

SURROUNDINGS = ("verb", "paths", "trainer", "logger", "hydra", "compare", "expected")
"""Parts of a configuration in which a row cannot differ from the rest."""


def expand_rows(composed: DictConfig, compose: Composer) -> DictConfig:
    """Replace the rows of ``compare`` that are lists of overrides by the fields in which they differ.

    A row such as ``[method=sre2l, label=sre2l]`` is composed like the command itself with these overrides at its end,
    so that it may choose other files of a group; what comes out differently is the row.

    Args:
        composed: the configuration.
        compose: composes it again with more overrides.

    Raises:
        ConfigError: a row cannot be composed.
    """
    rows = composed.get("compare") or {}
    for name, row in rows.items():
        if isinstance(row, str):
            raise ConfigError(f"compare.{name}={row}: a row is a list of overrides; write [{row}]")
    written = {name: row for name, row in rows.items() if isinstance(row, ListConfig)}
    if not written:
        return composed
    base = _tree(composed)
    expanded = composed.copy()
    with open_dict(expanded):
        for name, row in written.items():
            overrides = [str(override) for override in row]
            try:
                tree = _tree(compose(overrides))
            except (HydraException, OmegaConfBaseException) as error:
                raise ConfigError(f"compare.{name}=[{','.join(overrides)}]: {_reason(error)}") from error
            expanded.compare[name] = differences(base, tree)
    return expanded


def _reason(error: Exception) -> str:
    """Say in one line why a row cannot be composed, and what would be valid."""
    first = str(error).splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options:
        group, _, wrong = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={wrong}: choose {', '.join(error.options)}{closest(wrong, error.options, '')}"
    unknown = re.fullmatch(r"Could not override '(.+)'\.", first)
    if unknown:
        known = [*RunConfig.model_fields, *(field.key for field in fields())]
        return f"{unknown[1]}: there is no such field or group{closest(unknown[1], known)}"
    return first


def _tree(config: DictConfig) -> dict[str, Any]:
    # Part by part, because the surroundings refer to things that only exist while a command runs.
    return {str(key): _plain(config[key]) for key in config if key not in SURROUNDINGS}


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
