"""Finding the BatchNorm layers of a network."""

from __future__ import annotations

from torch import nn


def batchnorm_layers(network: nn.Module) -> list[tuple[str, nn.BatchNorm2d]]:
    """Return ``(name, layer)`` of every 2-D BatchNorm (subclasses too) in registration order, that of ``modules()``.

    The order matters: BatchNorm matching weighs the first layer differently, and "first" means first registered.
    """
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]


def has_batchnorm(network: nn.Module) -> bool:
    """Return whether the network has 2-D BatchNorm statistics that can be matched."""
    return any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
