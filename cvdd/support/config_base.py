"""Base classes of every part of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the override to type and the valid choices."""


class StrictConfig(BaseModel):
    """A frozen part of the configuration that refuses unknown keys and lossy type conversions.

    Every field carries a one-line ``description``; it is what ``--help`` prints.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=False, allow_inf_nan=False
    )

    def at_default(self, name: str) -> bool:
        """Whether a field is what it would be if nobody had said anything."""
        return bool(getattr(self, name) == type(self).model_fields[name].default)


class CheckedConfig(StrictConfig):
    """A part of the configuration whose fields must agree with each other.

    Everything that is wrong is told at once, a line for each problem.
    """

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """Yield what does not agree, each in one line that names the override to type."""
        raise NotImplementedError
