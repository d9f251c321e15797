"""A configuration without the directories of this machine, for pages and dashboards that other people see."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain, count
from pathlib import Path
from typing import Any

from cvdd.composition.surroundings import SURROUNDINGS
from cvdd.schema import RunConfig

_PATH = re.compile(
    r"""(?<=')/[^']*  | (?<=")/[^"]*                                    # quoted, it may hold anything else
    | (?:(?<=[=,\[({\s]) | (?<=:)(?!//)) / (?:\\.|[^,\])}'"\\])*        # a value or a part of one, but no address""",
    re.VERBOSE,
)
"""An absolute path in an override."""

_PATH_IN_TEXT = re.compile(
    r"""(?<=')/[^'\n]+ | (?<=")/[^"\n]+                                # quoted, with spaces
    | (?:^ | (?<=[\s=,\[({<:`]) | (?<=file://)) /(?!/) [^\s,\])}>`'";:]+""",
    re.VERBOSE,
)
"""An absolute path in a sentence, which goes on after it."""


def portable_config(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as JSON without ``paths`` and ``cost``, which only asks what a run takes.

    A path inside one of ``paths`` is written as ``<paths.data>/...``, any other absolute one as ``<elsewhere>/NAME``;
    the results do not depend on where that is.
    """
    tree = config.model_dump(mode="json", exclude={"paths", "cost"})
    roots = _roots(config)
    return {key: _replace(value, roots) for key, value in tree.items()}


def what_is_made(config: RunConfig) -> dict[str, Any]:
    """Return what :func:`portable_config` does, but for how a command runs: equal for runs that make the same."""
    return {key: value for key, value in portable_config(config).items() if key not in SURROUNDINGS}


def portable_override(override: str, config: RunConfig | None = None) -> str:
    """Return what was typed with its paths written as :func:`portable_config` writes them.

    Args:
        override: as it was typed, a list or a dictionary of paths included.
        config: whose ``paths`` are known by their names; None if none are.
    """
    roots = {} if config is None else _roots(config)
    return _PATH.sub(lambda match: str(_replace(match[0], roots)), override)


def portable_values(values: Iterable[str]) -> dict[str, str]:
    """Return how each value of an override is written where others see it; different values remain different.

    Args:
        values: as they were typed.
    """
    shown: dict[str, str] = {}
    for value in dict.fromkeys(values):
        text = str(_replace(value, {})) if value.startswith("/") else portable_override(f"={value}")[1:]
        taken = set(shown.values())
        others = (f"{text} ({number})" for number in count(2))
        shown[value] = next(name for name in chain([text], others) if name not in taken)
    return shown


def portable_text(text: str) -> str:
    """Return a message with its paths written as :func:`portable_config` writes them.

    Args:
        text: such as that of an error.
    """
    return _PATH_IN_TEXT.sub(lambda match: str(_replace(match[0], {})), text)


def _roots(config: RunConfig) -> dict[str, str]:
    return {value: f"<paths.{name}>" for name, value in config.paths.model_dump(mode="json").items()}


def _replace(tree: Any, roots: dict[str, str]) -> Any:
    if isinstance(tree, dict):
        return {key: _replace(value, roots) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_replace(value, roots) for value in tree]
    if isinstance(tree, str) and Path(tree).is_absolute():
        # The longest first: one directory may lie inside another.
        for root in sorted(roots, key=len, reverse=True):
            if Path(tree).is_relative_to(root):
                return (Path(roots[root]) / Path(tree).relative_to(root)).as_posix()
        return f"<elsewhere>/{Path(tree).name}"
    return tree
