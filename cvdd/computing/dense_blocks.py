"""What dense blocks consist of, in this project's networks and in torchvision's."""

from __future__ import annotations

from torch import nn
from torchvision.models import densenet as torchvision_densenet

from cvdd.backbones.densenet import DenseLayer


def parts_of_dense_layers(block: nn.Module) -> tuple[str, str, str, str] | None:
    """What the layers of a dense block call their parts, in order; None for another module."""
    kinds = {type(layer) for layer in block.children()}
    if type(block) is nn.Sequential and kinds == {DenseLayer}:
        return "bn1", "conv1", "bn2", "conv2"
    if type(block) is torchvision_densenet._DenseBlock and kinds == {torchvision_densenet._DenseLayer}:
        return "norm1", "conv1", "norm2", "conv2"
    return None


def puts_new_maps_first(block: nn.Module) -> bool:
    """Whether the maps that a layer of a dense block makes come before those that it was given, or after."""
    return type(block) is nn.Sequential
