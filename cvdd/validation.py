"""From Hydra's composition to a checked configuration, with errors that say what to type."""

from __future__ import annotations

from typing import Any, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from cvdd.config_base import ConfigError
from cvdd.schema import RunConfig, with_overrides


def check(config: DictConfig) -> RunConfig:
    """Validate a composed configuration.

    Raises:
        ConfigError: lists every problem, each with the override to type and the valid choices.
    """
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from error
    assert isinstance(tree, dict)
    run = _validate({str(key): value for key, value in tree.items()})
    for name, overrides in run.compare.items():
        try:
            with_overrides(run, overrides)
        except ValidationError as error:
            raise ConfigError(f"compare.{name}: {_explain(error, {})}") from error
        except ConfigError as error:
            raise ConfigError(f"compare.{name}: {error}") from error
    return run


def _validate(tree: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree)) from error


def _explain(error: ValidationError, tree: dict[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if not _is_branch(part))
        message = str(problem["msg"]).removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"there is no such field; {_siblings(problem['loc'])}"
        elif problem["type"] == "missing":
            message = f"a value is missing; {field_help(key)}"
        elif key and problem["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, got {problem['input']!r}; {field_help(key)}"
        lines.append(f"{key}: {message}" if key and not message.startswith(key) else message)
    return "\n".join(dict.fromkeys(lines))


def _is_branch(part: str | int) -> bool:
    # pydantic adds the tried alternative of a union to the location; no field of ours is written like that.
    return isinstance(part, str) and (part.startswith(("list[", "literal[", "function-", "tuple[")) or part == "float")


def _siblings(location: tuple[str | int, ...]) -> str:
    model = _model_at(RunConfig, [str(part) for part in location[:-1]])
    if model is None:
        return "see --help"
    return f"the fields are {', '.join(model.model_fields)}"


def field_help(key: str) -> str:
    """One line of help for a dotted key of the configuration, empty if there is none."""
    *path, last = key.split(".")
    model = _model_at(RunConfig, path)
    if model is None or last not in model.model_fields:
        return ""
    return model.model_fields[last].description or ""


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, str]]:
    """All dotted keys of the configuration with their help, in order; a dictionary's entries appear as NAME."""
    rows: list[tuple[str, str]] = []
    for name, field in model.model_fields.items():
        nested = _nested(field)
        if nested is None:
            rows.append((prefix + name, field.description or ""))
        else:
            inner, is_dict = nested
            rows.extend(fields(inner, f"{prefix}{name}.{'NAME.' if is_dict else ''}"))
    return rows


def _model_at(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    parts = iter(path)
    for part in parts:
        if part not in model.model_fields:
            return None
        nested = _nested(model.model_fields[part])
        if nested is None:
            return None
        model, is_dict = nested
        if is_dict:
            next(parts, None)
    return model


def _nested(field: FieldInfo) -> tuple[type[BaseModel], bool] | None:
    annotation = field.annotation
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        return (value, True) if isinstance(value, type) and issubclass(value, BaseModel) else None
    if get_origin(annotation) in (Union,) or str(get_origin(annotation)) == "<class 'types.UnionType'>":
        for option in get_args(annotation):
            if isinstance(option, type) and issubclass(option, BaseModel):
                return option, False
        return None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    return None
