"""The fields of the configuration: their dotted keys, help and choices, read from the schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cvdd.schema import RunConfig


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
        key: dotted; the entries of a dictionary appear as NAME.
        description: one line of help.
        choices: the values it may take, if they are few.
        section: first part of the key, or ``general`` for fields that have no section.
        section_help: one line of help.
    """

    key: str
    description: str
    choices: tuple[str, ...]
    section: str
    section_help: str


def fields() -> list[Field]:
    """Return all fields in order, those without a section first."""
    rows: list[Field] = []
    for name, info in RunConfig.model_fields.items():
        nested = _nested(info)
        if nested is None:
            rows.append(Field(name, info.description or "", _choices(info.annotation), "general", "of every command."))
            continue
        summary = info.description or (inspect.getdoc(nested[0]) or "").splitlines()[0]
        for key, inner in _walk(nested[0], f"{name}.NAME" if nested[1] else name):
            rows.append(Field(key, inner.description or "", _choices(inner.annotation), name, summary))
    return sorted(rows, key=lambda row: row.section != "general")


def field_at(key: str) -> Field | None:
    """Return the field of a dotted key; keys inside a field that holds a dictionary or a list lead to it."""
    parts = key.partition("[")[0].split(".")
    for field in fields():
        names = field.key.split(".")
        if len(names) <= len(parts) and _agree(names, parts):
            return field
    return None


def is_known(key: str) -> bool:
    """Whether a dotted key is that of a field, of something in a field that holds a dictionary, or of a section."""
    return any(_agree(field.key.split("."), key.split(".")) for field in fields())


def is_required(name: str) -> bool:
    """Whether a configuration must have a section: what it may be without has a default."""
    info = RunConfig.model_fields.get(name)
    return info is not None and info.is_required()


def is_dictionary(path: Sequence[str]) -> bool:
    """Whether there is a field that holds sections by name at a dotted path."""
    parent = model_at(path[:-1])
    info = None if parent is None else parent.model_fields.get(path[-1])
    return info is not None and get_origin(info.annotation) is dict


def _agree(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the key of a field and another one are the same as far as the shorter one goes."""
    return all(a in (b, "NAME") for a, b in zip(names, parts, strict=False))


def model_at(path: Sequence[str]) -> type[BaseModel] | None:
    """Return the part of the schema at a dotted path, if there is one."""
    model: type[BaseModel] = RunConfig
    parts = iter(path)
    for part in parts:
        info = model.model_fields.get(part)
        nested = None if info is None else _nested(info)
        if nested is None:
            return None
        model, in_dictionary = nested
        if in_dictionary:
            next(parts, None)
    return model


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        nested = _nested(info)
        if nested is None:
            yield f"{prefix}.{name}", info
        else:
            yield from _walk(nested[0], f"{prefix}.{name}" + (".NAME" if nested[1] else ""))


def _nested(info: FieldInfo) -> tuple[type[BaseModel], bool] | None:
    """The model inside a field, and whether it is the value of a dictionary."""
    if get_origin(info.annotation) is dict:
        model = _model(get_args(info.annotation)[1])
        return None if model is None else (model, True)
    for option in (info.annotation, *get_args(info.annotation)):
        model = _model(option)
        if model is not None:
            return model, False
    return None


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(str(choice) for choice in get_args(annotation))
    return ()
