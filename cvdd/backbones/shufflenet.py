"""ShuffleNetV2 for small images (Ma et al. 2018; stem without stride or pooling), any width and depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvdd.support.config_base import ConfigError


def channel_shuffle(features: Tensor, groups: int = 2) -> Tensor:
    """Interleave the channel groups of ``features`` ``[B, C, H, W]`` so that the next split mixes both branches."""
    batch, channels, height, width = features.shape
    grouped = features.view(batch, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(batch, channels, height, width)


class BasicBlock(nn.Module):
    """Half of the channels pass untouched, the other half is filtered: ``[B, C, H, W] -> [B, C, H, W]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block."""
        kept, features = images.chunk(2, dim=1)
        features = functional.relu_(self.bn1(self.conv1(features)))
        features = self.bn2(self.conv2(features))
        features = functional.relu_(self.bn3(self.conv3(features)))
        return channel_shuffle(torch.cat([kept, features], dim=1))


class DownBlock(nn.Module):
    """Two strided branches, concatenated: ``[B, in, H, W] -> [B, out, H / 2, W / 2]``.

    Layers 1 and 2 are the short branch, layers 3 to 5 the long one.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block."""
        short = self.bn1(self.conv1(images))
        short = functional.relu_(self.bn2(self.conv2(short)))
        long = functional.relu_(self.bn3(self.conv3(images)))
        long = self.bn4(self.conv4(long))
        long = functional.relu_(self.bn5(self.conv5(long)))
        return channel_shuffle(torch.cat([short, long], dim=1))


class ShuffleNetV2(nn.Module):
    """Shuffle stages, a 1x1 head convolution and global average pooling: ``[B, 3, H, W] -> [B, classes]``."""

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        stem_width: int,
        head_width: int,
        stem_stride: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.stages = tuple(f"layer{stage + 1}" for stage in range(len(widths)))
        in_channels = stem_width
        for name, channels, count in zip(self.stages, widths, blocks, strict=True):
            basic = [BasicBlock(channels) for _ in range(count)]
            self.add_module(name, nn.Sequential(DownBlock(in_channels, channels), *basic))
            in_channels = channels
        self.conv2 = nn.Conv2d(in_channels, head_width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head_width)
        self.linear = nn.Linear(head_width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        features = functional.relu_(self.bn1(self.conv1(images)))
        for name in self.stages:
            features = self.get_submodule(name)(features)
        features = functional.relu_(self.bn2(self.conv2(features)))
        logits: Tensor = self.linear(torch.mean(features, dim=(2, 3)))
        return logits


def shufflenet_v2(
    num_classes: int,
    widths: Sequence[int] = (48, 96, 192),
    blocks: Sequence[int] = (3, 7, 3),
    stem_width: int = 24,
    head_width: int = 1024,
    stem_stride: int = 1,
) -> ShuffleNetV2:
    """Build a small-image ShuffleNetV2; the defaults are the 0.5x network.

    Args:
        num_classes: outputs of the head.
        widths: channels of each stage, even.
        blocks: basic blocks that follow the down block of each stage.
        stem_width: channels of the 3x3 stem.
        head_width: channels of the last 1x1 convolution.
        stem_stride: 1 keeps the input resolution, 2 quarters the cost.

    Raises:
        ConfigError: odd widths, or ``widths`` and ``blocks`` of different lengths.
    """
    if len(widths) != len(blocks):
        raise ConfigError(
            f"backbone.arguments.blocks={list(blocks)} must have one count per stage of widths={list(widths)}"
        )
    if any(channels % 2 for channels in widths):
        raise ConfigError(f"backbone.arguments.widths={list(widths)} must be even: a block splits its channels")
    return ShuffleNetV2(widths, blocks, stem_width, head_width, stem_stride, num_classes)
