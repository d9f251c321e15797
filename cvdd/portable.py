"""A configuration without the directories of this machine, for pages and dashboards that other people see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cvdd.schema import RunConfig


def portable_config(config: RunConfig) -> dict[str, Any]:
    """Return a configuration as JSON without ``paths`` and ``cost``, which only asks what a run takes.

    A path inside one of ``paths`` is written as ``<paths.data>/...``, any other absolute one as ``<elsewhere>/NAME``;
    the results do not depend on where that is.
    """
    tree = config.model_dump(mode="json")
    del tree["cost"]
    roots = {value: f"<paths.{name}>" for name, value in tree.pop("paths").items()}
    return {key: _replace(value, roots) for key, value in tree.items()}


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
