"""Residual networks for small images (He et al. 2016, CIFAR stem), any width and depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvdd.config_base import ConfigError


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return an empty (identity) path, or a strided projection where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[B, in, H, W] -> [B, channels, H / stride, W / stride]``."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block."""
        features = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(features)) + self.shortcut(images))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: ``[B, in, H, W] -> [B, 4 * channels, H / stride, W / stride]``."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block."""
        features = functional.relu(self.bn1(self.conv1(images)))
        features = functional.relu(self.bn2(self.conv2(features)))
        return functional.relu(self.bn3(self.conv3(features)) + self.shortcut(images))


class ResNet(nn.Module):
    """Residual network with a 3x3 stem without pooling, and global average pooling: ``[B, 3, H, W] -> [B, classes]``.

    Stages are called ``layer1``, ``layer2``, ... and the head ``linear``; stage ``i`` has ``width * 2 ** i`` channels
    and every stage but the first halves the resolution.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        width: int,
        stem_stride: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = tuple(f"layer{stage + 1}" for stage in range(len(blocks)))
        in_channels = width
        for stage, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            channels = width * 2**stage
            layers: list[nn.Module] = []
            for index in range(count):
                stride = 2 if index == 0 and stage > 0 else 1
                layers.append(block(in_channels, channels, stride))
                in_channels = channels * block.expansion
            self.add_module(name, nn.Sequential(*layers))
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        features = functional.relu(self.bn1(self.conv1(images)))
        for name in self.stages:
            features = self.get_submodule(name)(features)
        logits: Tensor = self.linear(torch.mean(features, dim=(2, 3)))
        return logits


def resnet(
    num_classes: int,
    block: str = "basic",
    blocks: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
    stem_stride: int = 1,
) -> ResNet:
    """Build a small-image residual network.

    Args:
        num_classes: outputs of the head.
        block: ``basic`` (ResNet-18/34) or ``bottleneck`` (ResNet-50/101).
        blocks: residual blocks of each stage; their number is the number of stages.
        width: channels of the stem and of the first stage.
        stem_stride: 1 keeps the input resolution, 2 quarters the cost.

    Raises:
        ConfigError: unknown ``block`` or an empty ``blocks``.
    """
    kinds: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
    if block not in kinds:
        raise ConfigError(f"backbone.arguments.block={block}; valid choices: {', '.join(kinds)}")
    if not blocks or min(blocks) < 1:
        raise ConfigError(f"backbone.arguments.blocks={list(blocks)}; give one positive count per stage")
    return ResNet(kinds[block], blocks, width, stem_stride, num_classes)
