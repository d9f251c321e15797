"""Densely connected networks for small images (Huang et al. 2017, bottleneck and compression), any growth and depth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvdd.support.config_base import ConfigError


class DenseLayer(nn.Module):
    """Pre-activation 1x1 and 3x3 convolutions: ``[B, C, H, W] -> [B, growth + C, H, W]``, new channels first."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the layer."""
        features = self.conv1(functional.relu_(self.bn1(images)))
        features = self.conv2(functional.relu_(self.bn2(features)))
        return torch.cat([features, images], dim=1)


class Transition(nn.Module):
    """Compress the channels and halve the resolution: ``[B, in, H, W] -> [B, out, H / 2, W / 2]``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the transition."""
        return functional.avg_pool2d(self.conv(functional.relu_(self.bn(images))), 2)


class DenseNet(nn.Module):
    """Dense blocks ``dense<i>`` joined by ``trans<i>``, a last BatchNorm and global average pooling.

    ``[B, 3, H, W] -> [B, classes]``; the stem has ``2 * growth`` channels.
    """

    def __init__(
        self, blocks: Sequence[int], growth: int, reduction: float, stem_stride: int, num_classes: int
    ) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, stride=stem_stride, padding=1, bias=False)
        stages: list[str] = []
        for stage, count in enumerate(blocks, start=1):
            layers = [DenseLayer(channels + index * growth, growth) for index in range(count)]
            self.add_module(f"dense{stage}", nn.Sequential(*layers))
            stages.append(f"dense{stage}")
            channels += count * growth
            if stage < len(blocks):
                compressed = math.floor(channels * reduction)
                self.add_module(f"trans{stage}", Transition(channels, compressed))
                stages.append(f"trans{stage}")
                channels = compressed
        self.stages = tuple(stages)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        features = self.conv1(images)
        for name in self.stages:
            features = self.get_submodule(name)(features)
        logits: Tensor = self.linear(torch.mean(functional.relu_(self.bn(features)), dim=(2, 3)))
        return logits


def densenet(
    num_classes: int,
    blocks: Sequence[int] = (6, 12, 24, 16),
    growth: int = 32,
    reduction: float = 0.5,
    stem_stride: int = 1,
) -> DenseNet:
    """Build a small-image DenseNet; the defaults are DenseNet-121.

    Args:
        num_classes: outputs of the head.
        blocks: dense layers of each block.
        growth: channels that one layer adds.
        reduction: share of the channels that a transition keeps.
        stem_stride: 1 keeps the input resolution, 2 quarters the cost.

    Raises:
        ConfigError: an empty ``blocks`` or a ``reduction`` outside (0, 1].
    """
    if not blocks or min(blocks) < 1:
        raise ConfigError(f"backbone.arguments.blocks={list(blocks)}; give one positive count per dense block")
    if not 0 < reduction <= 1:
        raise ConfigError(f"backbone.arguments.reduction={reduction}; valid: above 0, at most 1")
    return DenseNet(blocks, growth, reduction, stem_stride, num_classes)
