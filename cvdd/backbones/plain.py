"""AlexNet and VGG for small images, to which matching methods transfer their images (specification of MTT, 2.6)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from cvdd.backbones.norms import NORMS, check_norm
from cvdd.support.config_base import ConfigError


class PlainNetwork(nn.Module):
    """Layers in a row and one linear head: ``[B, 3, H, W] -> [B, classes]``.

    The features are pooled to ``pooled_size`` squared before the head, which changes nothing at the size that the
    network was made for and lets it see others.
    """

    def __init__(self, features: Sequence[nn.Module], channels: int, pooled_size: int, num_classes: int) -> None:
        super().__init__()
        self.pooled_size = pooled_size
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(channels * pooled_size**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        features = functional.adaptive_avg_pool2d(self.features(images), self.pooled_size)
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


def alexnet(num_classes: int) -> PlainNetwork:
    """Build the AlexNet of the distillation literature: five convolutions, three max-poolings, no norm.

    Args:
        num_classes: outputs of the head.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, side, pooled in ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)):
        layers += [nn.Conv2d(channels, width, side, padding=side // 2), nn.ReLU()]
        if pooled:
            layers.append(nn.MaxPool2d(2))
        channels = width
    return PlainNetwork(layers, channels, 4, num_classes)


def vgg(
    num_classes: int,
    widths: Sequence[Sequence[int]] = ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    norm: str = "batch",
) -> PlainNetwork:
    """Build a VGG with one linear layer, by default VGG-11.

    Args:
        num_classes: outputs of the head.
        widths: channels of the 3x3 convolutions of each stage; a max-pooling follows each stage.
        norm: ``batch``, ``instance`` or ``none``.

    Raises:
        ConfigError: unknown ``norm``, or a stage without convolutions.
    """
    check_norm(norm)
    if not widths or not all(stage and min(stage) > 0 for stage in widths):
        raise ConfigError(f"backbone.arguments.widths={list(widths)}; give one or more positive widths per stage")
    layers: list[nn.Module] = []
    channels = 3
    for stage in widths:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), NORMS[norm](width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return PlainNetwork(layers, channels, 1, num_classes)
