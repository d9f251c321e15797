"""MobileNetV2 for small images (Sandler et al. 2018; first strides removed), any width and depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvdd.support.config_base import ConfigError

# (expansion, channels, blocks, stride of the first block). The original's second stage has stride 2; with 32-pixel
# images it keeps the resolution, so the whole network reduces by 8 instead of 32.
STAGES: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand, filter per channel, project: ``[B, in, H, W] -> [B, out, H / stride, W / stride]``.

    At stride 1 a shortcut is added; where the channels change it is a projection, which the original network does not
    have (57 BatchNorm layers instead of its 52).
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        channels = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride == 1 and in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block."""
        features = functional.relu_(self.bn1(self.conv1(images)))
        features = functional.relu_(self.bn2(self.conv2(features)))
        features = self.bn3(self.conv3(features))
        output: Tensor = features + self.shortcut(images) if self.stride == 1 else features
        return output


class MobileNetV2(nn.Module):
    """Inverted residuals, a 1x1 head convolution and global average pooling: ``[B, 3, H, W] -> [B, classes]``."""

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        stem_width: int,
        head_width: int,
        stem_stride: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        layers: list[nn.Module] = []
        in_channels = stem_width
        for expansion, channels, count, first_stride in stages:
            for index in range(count):
                stride = first_stride if index == 0 else 1
                layers.append(InvertedResidual(in_channels, channels, expansion, stride))
                in_channels = channels
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(in_channels, head_width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head_width)
        self.linear = nn.Linear(head_width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        features = functional.relu_(self.bn1(self.conv1(images)))
        features = functional.relu_(self.bn2(self.conv2(self.layers(features))))
        logits: Tensor = self.linear(torch.mean(features, dim=(2, 3)))
        return logits


def mobilenet_v2(
    num_classes: int,
    stages: Sequence[Sequence[int]] = STAGES,
    stem_width: int = 32,
    head_width: int = 1280,
    stem_stride: int = 1,
) -> MobileNetV2:
    """Build a small-image MobileNetV2 (no dropout).

    Args:
        num_classes: outputs of the head.
        stages: per stage ``[expansion, channels, blocks, stride]``.
        stem_width: channels of the 3x3 stem.
        head_width: channels of the last 1x1 convolution.
        stem_stride: 1 keeps the input resolution, 2 quarters the cost.

    Raises:
        ConfigError: a stage that is not four positive numbers.
    """
    for stage in stages:
        if len(stage) != 4 or min(stage) < 1:
            raise ConfigError(
                f"backbone.arguments.stages has {list(stage)}; each must be [expansion, channels, blocks, stride]"
            )
    return MobileNetV2(stages, stem_width, head_width, stem_stride, num_classes)
