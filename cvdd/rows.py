"""Rows of a comparison that are written as one would type them, as fields in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cvdd.config_base import ConfigError

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
                first = str(error).splitlines()[0]
                raise ConfigError(f"compare.{name}=[{','.join(overrides)}]: {first}") from error
            expanded.compare[name] = differences(base, tree)
    return expanded


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
