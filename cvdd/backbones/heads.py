"""The classification head of a network: where it is and how to give it another number of classes."""

from __future__ import annotations

from torch import nn

from cvdd.support.config_base import ConfigError

IMAGENET_CLASSES = 1000


def find_head(network: nn.Module) -> tuple[str, nn.Linear] | None:
    """Return the name and the module of the last registered linear layer, or None where there is none."""
    heads = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    return heads[-1] if heads else None


def require_head(network: nn.Module, needed_by: str) -> tuple[str, nn.Linear]:
    """Return the name and the module of the last registered linear layer.

    Args:
        network: any.
        needed_by: the setting that needs it, for messages.

    Raises:
        ConfigError: it has none.
    """
    found = find_head(network)
    if found is None:
        raise ConfigError(
            f"{needed_by} needs what goes into a network's linear classifier, and a {type(network).__name__} has "
            f"none; choose another backbone, or do without {needed_by}"
        )
    return found


def replace_heads(network: nn.Module, num_classes: int) -> None:
    """Replace, in place, every 1000-class head (auxiliary ones too) by a fresh one with ``num_classes`` outputs.

    Raises:
        ConfigError: the network has no layer with 1000 outputs.
    """
    replacements: dict[str, nn.Module] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and layer.out_features == IMAGENET_CLASSES:
            replacements[name] = nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None)
        elif isinstance(layer, nn.Conv2d) and layer.out_channels == IMAGENET_CLASSES and layer.kernel_size == (1, 1):
            # SqueezeNet ends in a 1x1 convolution; its attribute with the number of classes is never read again.
            replacements[name] = nn.Conv2d(layer.in_channels, num_classes, kernel_size=1)
    if not replacements:
        raise ConfigError(
            "backbone.pretrained=true: the network has no 1000-class head to replace; set backbone.pretrained=false"
        )
    for name, layer in replacements.items():
        network.set_submodule(name, layer)
