"""Residual networks for small images (He et al. 2016, CIFAR stem), any width and depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvdd.backbones.norms import NORMS, check_norm
from cvdd.support.config_base import ConfigError

DOWNSAMPLING = ("stride", "pool")


class Shape(NamedTuple):
    """What the blocks of a network have in common.

    Attributes:
        norm: one of :data:`cvdd.backbones.norms.NORMS`.
        pool: halve the resolution by average pooling after a convolution, not by its stride.
    """

    norm: str
    pool: bool

    def layer(self, channels: int) -> nn.Module:
        """A normalisation."""
        return NORMS[self.norm](channels)

    def stride(self, stride: int) -> int:
        """Of the convolution of a block that has this stride."""
        return 1 if self.pool else stride

    def halved(self, features: Tensor, stride: int) -> Tensor:
        """What follows that convolution."""
        return functional.avg_pool2d(features, stride) if self.pool and stride > 1 else features

    def shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        """Return an empty (identity) path, or a projection where the shape changes."""
        if stride == 1 and in_channels == out_channels:
            return nn.Sequential()
        projection = nn.Conv2d(in_channels, out_channels, 1, stride=self.stride(stride), bias=False)
        pooling = [nn.AvgPool2d(stride)] if self.pool and stride > 1 else []
        return nn.Sequential(projection, *pooling, self.layer(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``[B, in, H, W] -> [B, channels, H / stride, W / stride]``."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shape: Shape) -> None:
        super().__init__()
        self._stride, self._shape = stride, shape
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=shape.stride(stride), padding=1, bias=False)
        self.bn1 = shape.layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = shape.layer(channels)
        self.shortcut = shape.shortcut(in_channels, channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block."""
        features = self._shape.halved(functional.relu_(self.bn1(self.conv1(images))), self._stride)
        return functional.relu_(self.bn2(self.conv2(features)) + self.shortcut(images))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: ``[B, in, H, W] -> [B, 4 * channels, H / stride, W / stride]``."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, shape: Shape) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self._stride, self._shape = stride, shape
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = shape.layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=shape.stride(stride), padding=1, bias=False)
        self.bn2 = shape.layer(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = shape.layer(out_channels)
        self.shortcut = shape.shortcut(in_channels, out_channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block."""
        features = functional.relu_(self.bn1(self.conv1(images)))
        features = self._shape.halved(functional.relu_(self.bn2(self.conv2(features))), self._stride)
        return functional.relu_(self.bn3(self.conv3(features)) + self.shortcut(images))


class ResNet(nn.Module):
    """Residual network with a 3x3 stem without pooling: ``[B, 3, H, W] -> [B, classes]``.

    Stages are called ``layer1``, ``layer2``, ... and the head ``linear``; stage ``i`` has ``width * 2 ** i`` channels
    and every stage but the first halves the resolution. The head sees features averaged to ``pooled_size`` squared.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        width: int,
        stem_stride: int,
        shape: Shape,
        pooled_size: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = shape.layer(width)
        self.stages = tuple(f"layer{stage + 1}" for stage in range(len(blocks)))
        in_channels = width
        for stage, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            channels = width * 2**stage
            layers: list[nn.Module] = []
            for index in range(count):
                stride = 2 if index == 0 and stage > 0 else 1
                layers.append(block(in_channels, channels, stride, shape))
                in_channels = channels * block.expansion
            self.add_module(name, nn.Sequential(*layers))
        self.pooled_size = pooled_size
        self.linear = nn.Linear(in_channels * pooled_size**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        features = functional.relu_(self.bn1(self.conv1(images)))
        for name in self.stages:
            features = self.get_submodule(name)(features)
        if self.pooled_size == 1:
            features = torch.mean(features, dim=(2, 3))
        else:
            features = functional.adaptive_avg_pool2d(features, self.pooled_size).flatten(1)
        logits: Tensor = self.linear(features)
        return logits


def resnet(
    num_classes: int,
    block: str = "basic",
    blocks: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
    stem_stride: int = 1,
    norm: str = "batch",
    downsampling: str = "stride",
    pooled_size: int = 1,
) -> ResNet:
    """Build a small-image residual network.

    Args:
        num_classes: outputs of the head.
        block: ``basic`` (ResNet-18/34) or ``bottleneck`` (ResNet-50/101).
        blocks: residual blocks of each stage; their number is the number of stages.
        width: channels of the stem and of the first stage.
        stem_stride: 1 keeps the input resolution, 2 quarters the cost.
        norm: ``batch``, ``instance`` or ``none``; only ``batch`` has statistics to match.
        downsampling: ``stride``, or ``pool`` for average pooling after the convolution.
        pooled_size: side of the feature map that the head sees.

    Raises:
        ConfigError: unknown ``block``, ``norm`` or ``downsampling``, or an empty ``blocks``.
    """
    kinds: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}
    if block not in kinds:
        raise ConfigError(f"backbone.arguments.block={block}; valid choices: {', '.join(kinds)}")
    check_norm(norm)
    if downsampling not in DOWNSAMPLING:
        raise ConfigError(f"backbone.arguments.downsampling={downsampling}; valid choices: {', '.join(DOWNSAMPLING)}")
    if not blocks or min(blocks) < 1:
        raise ConfigError(f"backbone.arguments.blocks={list(blocks)}; give one positive count per stage")
    return ResNet(
        kinds[block], blocks, width, stem_stride, Shape(norm, downsampling == "pool"), pooled_size, num_classes
    )
