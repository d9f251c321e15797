"""Composes a command before Hydra does, and says in a sentence why it cannot be composed and what to type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from yaml import MarkedYAMLError, YAMLError

from cvdd.composition.arguments import ArgumentError, apart, is_certain, own_directories
from cvdd.support.closest import closest

_ASKS_ELSE = frozenset(("--help", "-h", "--hydra-help", "--version", "--info", "--shell-completion", "-sc"))
"""Options of commands that compose nothing."""

_OTHER_CONFIG = frozenset(("--config-name", "-cn", "--experimental-rerun"))
"""Options with which Hydra composes something else."""

_NOT_THERE = re.compile(r"Could not (?:override|delete from config\.) '(.+)'")
_THERE = re.compile(r"Could not append to config\. An item is already at '(.+)'|Multiple values for (.+)\. To override")
_LIST_FILE = re.compile(r"In '(.+)': ConfigTypeError raised while composing config:\nCannot merge DictConfig with List")
_OTHER_KIND = re.compile(r"Error merging override ([^=]+)=")


def require_composable(verb: str, arguments: Sequence[str], directory: Path) -> None:
    """Refuse a command that cannot be composed; of a multirun, its first point.

    Args:
        verb: of the command.
        arguments: as Hydra would be given them.
        directory: of the configuration.

    Raises:
        ArgumentError: a line for each override that does not fit.
    """
    options, overrides = apart(arguments)
    if not is_certain(arguments) or any(option.partition("=")[0] in _ASKS_ELSE | _OTHER_CONFIG for option in options):
        return
    try:
        pairs = {override: _first(override) for override in overrides}
    except (HydraException, NotImplementedError):
        return
    folders = [directory, *own_directories(arguments)]
    absent: dict[str, str] = {}
    while True:
        try:
            composed = _composed(verb, list(pairs.values()), folders)
            break
        except ConfigCompositionException as error:
            match = _NOT_THERE.match(str(error))
            wrong = [override for override in pairs if match and _key(override) == match[1]]
            if match is None or not wrong:
                raise ArgumentError(_said(error, pairs)) from error
            # Without it the rest composes, or has another mistake that is told as well.
            absent |= dict.fromkeys(wrong, match[1])
            pairs = {override: first for override, first in pairs.items() if override not in wrong}
        except YAMLError as error:
            raise ArgumentError(said_of_yaml(error)) from error
        except (ValueError, HydraException):
            # Hydra, which composes the same again, knows best.
            return
    if absent:
        tree: Any = OmegaConf.to_container(composed)
        raise ArgumentError("\n".join(_absent(typed, key, tree, folders) for typed, key in absent.items()))
    if "--resolve" in options:
        _require_resolvable(composed)


def said_of_yaml(error: YAMLError) -> str:
    """Say in one line where a file is no YAML."""
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    if mark is None:
        return " ".join(str(error).split())
    return f"{mark.name}, line {mark.line + 1}: this is no YAML: {error.problem}"  # type: ignore[attr-defined]


def _first(override: str) -> str:
    """Return an override with the first of its values, if it has those of a multirun."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(iter(parsed.sweep_string_iterator()))}"


def _composed(verb: str, overrides: Sequence[str], folders: Sequence[Path]) -> DictConfig:
    own = ",".join(f"'file://{folder.absolute()}'" for folder in folders[1:])
    more = [f"hydra.searchpath=[{own}]"] if own else []
    with initialize_config_dir(str(folders[0].absolute()), version_base="1.3"):
        return compose(verb, [*overrides, *more])


def _require_resolvable(composed: DictConfig) -> None:
    """Refuse values that are read from what a user named, where there is nothing to read."""
    try:
        OmegaConf.to_container(composed, resolve=True)
    except InterpolationResolutionError as error:
        from cvdd.composition.validation import said_by_resolver

        # Whatever else cannot be resolved here, Hydra may resolve.
        if said := said_by_resolver(str(error).splitlines()[0]):
            raise ArgumentError(said) from error


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _said(error: ConfigCompositionException, overrides: Mapping[str, str]) -> str:
    from cvdd.composition.rows import reason

    if match := _THERE.match(str(error)):
        key = match[1] or match[2]
        typed = next((override for override in overrides if _key(override) == key), f"+{key}")
        return f"{typed}: {key} is there already; leave out the +"
    if match := _OTHER_KIND.match(str(error)):
        key = match[1].lstrip("+")
        typed = next((override for override in overrides if _key(override) == key), key)
        if key.startswith("compare."):
            return (
                f"{typed}: {key} is there already, and written in another way; type +compare.NAME=... with another "
                f"name, or drop that row in front of yours: ~{key} +{key}=..."
            )
        wanted = "a list, as in [a,b]" if "object_type=list" in str(error.__cause__) else "{KEY: VALUE, ...}"
        return f"{typed}: must be {wanted}"
    if match := _LIST_FILE.match(str(error)):
        return f"{match[1]}.yaml holds a list; a file of a group holds KEY: VALUE, a line each"
    return reason(error)


def _absent(typed: str, key: str, tree: Mapping[str, Any], folders: Sequence[Path]) -> str:
    """Say why there is nothing at a key."""
    from cvdd.composition.fields import model_at

    if "@" in key or any((folder / key).is_dir() for folder in folders):
        where = "backbone@students.NAME" if key == "backbone" else key
        return f"{typed}: nothing is chosen there yet; type +{where}={typed.partition('=')[2]}"
    node: Any = tree
    path: list[str] = []
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            break
        path.append(part)
        node = node[part]
    there, name = ".".join(path), key.split(".")[len(path)]
    if node is None and model_at(path) is not None:
        return f"{typed}: {there} is null here; {_where_it_is(path, folders)}"
    if not isinstance(node, Mapping) and node is not None:
        return f"{typed}: {there} is a single value; type {there}=VALUE"
    if not typed.startswith("~") and key == f"{there}.{name}":
        return f"{typed}: {there} has no {name} yet; to add it type +{typed.lstrip('+')}"
    names = [str(other) for other in node or ()]
    add = f", or add it: +backbone@students.{name}=NAME" if there == "students" else ""
    only = f"only {', '.join(names) or 'nothing'}{add}{closest(name, names, '')}"
    return f"{typed}: {there or 'the configuration'} has no {name}, {only}"


def _where_it_is(path: Sequence[str], folders: Sequence[Path]) -> str:
    """Say what to choose so that a section that is null is there."""
    files = sorted(_files_with(path, folders))
    if files:
        return f"choose {path[0]}={' or '.join(files)}, or leave this out"
    from cvdd.composition.fields import model_at

    model = model_at(path)
    needed = [name for name, info in model.model_fields.items() if info.is_required()] if model else []
    whole = f"{{{', '.join(f'{name}: VALUE' for name in needed)}}}"
    return f"type it as a whole, {'.'.join(path)}={whole}, or leave this out"


def _files_with(path: Sequence[str], folders: Sequence[Path]) -> Iterator[str]:
    """Yield the names of the files of a group that have a section."""
    section = re.compile(rf"^{re.escape(path[-1])}:(?!\s*null)", re.MULTILINE)
    for file in (file for folder in folders for file in (folder / path[0]).glob("*.yaml")):
        if section.search(file.read_text()):
            yield file.stem
