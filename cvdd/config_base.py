"""Base class of every part of the configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the override to type and the valid choices."""


class StrictConfig(BaseModel):
    """A frozen part of the configuration that refuses unknown keys and lossy type conversions.

    Every field carries a one-line ``description``; it is what ``--help`` prints.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, arbitrary_types_allowed=False, allow_inf_nan=False
    )
