"""The backbone part of the configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from pydantic import Field, field_validator

from cvdd.support.config_base import ConfigError, StrictConfig

PACKAGES_OF_OTHERS = "cvdd.backbones"
ALLOWED_PACKAGES = ("cvdd", "timm", "torchvision.models")
_FILE_OF_WEIGHTS = "committee.members.NAME.checkpoint, which reads weights without running code"
RESERVED: Mapping[str, str] = MappingProxyType(
    {
        "num_classes": "the dataset config",
        "pretrained": "the backbone.pretrained config",
        # timm's own ways to files; those of some versions are unpickled freely, and no digest would cover their bytes.
        "checkpoint_path": _FILE_OF_WEIGHTS,
        "pretrained_cfg": _FILE_OF_WEIGHTS,
        "pretrained_cfg_overlay": _FILE_OF_WEIGHTS,
    }
)
"""Arguments of builders that have a place of their own, and which."""


def check_target(target: str) -> str:
    """Return ``target`` unchanged when it lies in a package whose builders may be called.

    A config is data that people pass around; the check keeps it from naming any callable on the machine.

    Raises:
        ConfigError: the dotted path is malformed or lies outside these packages and :func:`packages_of_others`.
    """
    allowed = (*ALLOWED_PACKAGES, *packages_of_others())
    inside = any(target.startswith(package + ".") for package in allowed)
    if not inside or not all(part.isidentifier() for part in target.split(".")):
        choices = ", ".join(f"{package}.<...>" for package in allowed)
        raise ConfigError(
            f"backbone.target={target} is not an accepted builder; valid dotted paths: {choices}. An installed package "
            f"adds its own by an entry point of the group {PACKAGES_OF_OTHERS}"
        )
    return target


@functools.cache
def packages_of_others() -> tuple[str, ...]:
    """Return the modules that installed packages name as entry points, because their builders may be called too.

    Whoever installs a package trusts its code; a configuration alone cannot add one.
    """
    return tuple(sorted({entry.module for entry in entry_points(group=PACKAGES_OF_OTHERS)}))


class BackboneConfig(StrictConfig):
    """One network: committee members, teachers and students are all described by this."""

    name: str = Field(min_length=1, description="family name shown in tables and used in the initialisation seed")
    target: str = Field(description="dotted path of the builder, under cvdd, timm or torchvision.models")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the builder, num_classes excepted"
    )
    pretrained: bool = Field(default=False, description="start from the ImageNet weights of torchvision or timm")
    min_size: int = Field(default=32, ge=1, description="smallest image side in pixels that the network accepts")

    @field_validator("target")
    @classmethod
    def _target_is_allowed(cls, target: str) -> str:
        return check_target(target)

    @field_validator("arguments")
    @classmethod
    def _reserved_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for reserved, instead in RESERVED.items():
            if reserved in arguments:
                raise ConfigError(f"backbone.arguments.{reserved} is set by {instead}; remove it")
        return arguments
