"""From Hydra's composition to a checked configuration, with errors that say what to type."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cvdd.composition.fields import field_at, fields, model_at
from cvdd.composition.prior_overrides import prior_overrides
from cvdd.composition.surroundings import FULL_DATA_ROW, is_shared_by_rows
from cvdd.schema import RunConfig, needs_priors, with_overrides
from cvdd.support.closest import closest
from cvdd.support.config_base import ConfigError

REQUIREMENTS: Mapping[str, str] = MappingProxyType(
    {
        "greater_than": "must be greater than {gt:g}",
        "greater_than_equal": "must be at least {ge:g}",
        "less_than": "must be less than {lt:g}",
        "less_than_equal": "must be at most {le:g}",
        "too_short": "needs at least {min_length} of them",
        "too_long": "takes at most {max_length} of them",
        "string_too_short": "must not be empty",
        "string_pattern_mismatch": "must match {pattern}",
        "finite_number": "must be a finite number",
        "int_parsing": "must be a whole number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "string_type": "must be text; quote a number, as in '{value}'",
        "list_type": "must be a list, as in [a,b]",
        "tuple_type": "must be a list, as in [a,b]",
        "dict_type": "must hold keys and values, as in {{a: 1}}",
        "model_type": "must hold keys and values",
        "path_type": "must be a path",
    }
)
"""What is asked of a value, by pydantic's type of error."""

_WHOLE = ("experiment", "debug", "local", "sweep")
"""Groups whose files are of the whole configuration."""

_BRANCH = re.compile(
    r"(list|tuple|dict|literal|constrained|function|is-instance|nullable)\b.*[\[(-]|(int|float|str|bool)$"
)


def check(config: DictConfig) -> RunConfig:
    """Validate a composed configuration.

    Raises:
        ConfigError: lists every problem, each with the override to type and the valid choices.
    """
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        if said := said_by_resolver(first):
            raise ConfigError(said) from error
        # Another field may refer to the one that is missing; the latter is the one to set.
        missing = re.fullmatch(r".*[Mm]issing mandatory value: (\S+)", first)
        if missing:
            raise ConfigError(f"{missing[1]}: a value is missing; set {missing[1]}=VALUE") from error
        raise ConfigError(f"{error.full_key}: cannot be resolved: {first}") from error
    assert isinstance(tree, dict)
    try:
        run = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error))) from error
    rows = [run]
    if FULL_DATA_ROW in (run.method.name, *run.compare):
        where = f"compare.{FULL_DATA_ROW}" if FULL_DATA_ROW in run.compare else f"method.name={FULL_DATA_ROW}"
        raise ConfigError(f"{where}: this is the name of the row of protocol.full_data=true; choose another")
    for name, overrides in run.compare.items():
        row = _check_row(run, f"compare.{name}", overrides)
        if name == run.method.name and row != run:
            raise ConfigError(
                f"compare.{name}: the command's own row has this name too (method.name={name}). Drop the row by "
                f"~compare.{name}, or set another method.name"
            )
        rows.append(row)
    for row in rows:
        _check_priors(row)
    return run


def said_by_resolver(message: str) -> str | None:
    """Return what a resolver of this project said was wrong; OmegaConf hands on the words of an error alone.

    Args:
        message: first line of an error of OmegaConf.
    """
    said = re.fullmatch(r"ConfigError raised while resolving interpolation: (.+)", message)
    return None if said is None else said[1]


def _check_priors(run: RunConfig) -> None:
    if run.prior.source == "given" or not needs_priors(run):
        return
    try:
        with_overrides(run, prior_overrides(run, next(iter(run.committee.members))))
    except ValidationError as error:
        advice = "; change prior.*, or give the priors: prior.source=given"
        raise ConfigError("\n".join(f"measuring priors: {line}{advice}" for line in explain(error))) from error


def _check_row(run: RunConfig, row: str, overrides: Mapping[str, Any]) -> RunConfig:
    known = [field.key for field in fields()]
    for key, value in overrides.items():
        if is_shared_by_rows(key):
            raise ConfigError(f"{row}: {shared_by_rows(key)}")
        if not _exists(run, key):
            raise ConfigError(f"{row}: {key}={_typed(value)}: {_why_missing(run, key, known)}")
        if isinstance(value, str) and model_at(key.split(".")) is not None:
            others = ", ..." if len(overrides) > 1 else ""
            raise ConfigError(
                f"{row}: {key}={value} chooses a file, as only a row can that is written as one would type it: "
                f"\"+{row}=['{key}={value}'{others}]\""
            )
    try:
        return with_overrides(run, dict(overrides))
    except ValidationError as error:
        raise ConfigError("\n".join(f"{row}: {line}" for line in explain(error))) from error


def shared_by_rows(key: str) -> str:
    """Say why a row cannot have a field, and what to do instead."""
    return f"{key} is the same for all rows; set it beside compare, or start a command of its own"


def _why_missing(run: RunConfig, key: str, known: Sequence[str]) -> str:
    if key not in known:
        return f"there is no such field{closest(key, known)}"
    node, path = run.model_dump(), list[str]()
    for part in key.split("."):
        if node is None:
            break
        path.append(part)
        node = node[part]
    return f"{'.'.join(path)} is null here; write the row as a list, so that it may choose a group that has it"


def _exists(run: RunConfig, key: str) -> bool:
    node: Any = run.model_dump()
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def explain(error: ValidationError) -> list[str]:
    """One line for each problem: the override, the value that was given, what is valid, and the field's help."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        key = _key(problem["loc"])
        by_key.setdefault(key, []).append(problem)
    return [line for key, problems in by_key.items() for line in _lines(key, problems)]


def _key(location: Sequence[str | int]) -> str:
    """Write a location as ``part.name[0]``, without the alternatives of unions and the marks that pydantic adds to it.

    A key of a dictionary that is wrong itself has such a mark.
    """
    own = [part for part in location if part != "[key]" and not _BRANCH.match(str(part))]
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in own]
    return "".join(parts).removeprefix(".")


def _lines(key: str, problems: Sequence[ErrorDetails]) -> list[str]:
    own = [
        line
        for problem in problems
        if problem["type"] == "value_error"
        for line in str(problem["msg"]).removeprefix("Value error, ").splitlines()
    ]
    if own:
        # Written by this project, a line for each problem; most of these name their fields themselves.
        return [message if not key or message.startswith(key) else f"{key}: {message}" for message in own]
    problem = problems[0]
    if problem["type"] == "extra_forbidden" and key in _WHOLE:
        return [
            f"{key}: the chosen file of {key} is empty, or its first line is not '# @package _global_', which it must "
            f"be for {key} to set what stands beside it"
        ]
    if problem["type"] == "extra_forbidden":
        return [f"{key}={_typed(problem['input'])}: there is no such field{_siblings(key)}"]
    field = field_at(key)
    about = f" ({field.description})" if field and field.description else ""
    if problem["type"] == "missing" and key.endswith("]"):
        return [f"{key.partition('[')[0]}={_typed(problem['input'])}: too few values{about}"]
    if problem["type"] == "missing":
        first = key.partition(".")[0]
        # All of a section is in the files of its group, and nobody can type it.
        if model_at(key.split(".")) is not None and first != "expected":
            return [f"{key} is missing, which is in the files of {first}; choose {first}=NAME without ~{key}"]
        return [f"{key}: a value is missing; set +{key}=VALUE{about}"]
    # The alternatives of a union fail one by one; any of them would do.
    wanted = " or ".join(dict.fromkeys(_requirement(problem) for problem in problems))
    return [f"{key}={_typed(problem['input'])}: {wanted}{about}"]


def _requirement(problem: ErrorDetails) -> str:
    context = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        choices = str(context["expected"]).replace("'", "")
        return f"choose {choices}{closest(str(problem['input']), re.split(', | or ', choices), '')}"
    requirement = REQUIREMENTS.get(problem["type"])
    if requirement is None:
        message = str(problem["msg"])
        return message[:1].lower() + message[1:]
    return requirement.format(**context, value=problem["input"])


def _typed(value: Any) -> str:
    """Write a value as it would be typed in an override, shortened if it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value).replace("'", "") if isinstance(value, (list, tuple, dict)) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _siblings(key: str) -> str:
    *path, last = key.split(".")
    model = model_at(path)
    if model is None:
        return "; see --help"
    return closest(last, model.model_fields) + f"; the fields are {', '.join(model.model_fields)}"
