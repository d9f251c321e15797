"""The normalisations that networks of the distillation literature differ in."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from torch import nn

from cvdd.support.config_base import ConfigError


def _instance_norm(channels: int) -> nn.Module:
    """One group per channel: what the literature calls instance normalisation, with a learnt scale and shift."""
    return nn.GroupNorm(channels, channels)


def _no_norm(channels: int) -> nn.Module:
    return nn.Identity()


NORMS: MappingProxyType[str, Callable[[int], nn.Module]] = MappingProxyType(
    {"batch": nn.BatchNorm2d, "instance": _instance_norm, "none": _no_norm}
)
"""From the name of a norm to what makes a layer for so many channels; only ``batch`` has statistics to match."""


def check_norm(norm: str) -> None:
    """Refuse a norm that there is not.

    Raises:
        ConfigError: unknown ``norm``.
    """
    if norm not in NORMS:
        raise ConfigError(f"backbone.arguments.norm={norm}; valid choices: {', '.join(NORMS)}")
