"""ConvNet-D, the plain student of the distillation literature (Gidaris and Komodakis 2018; Zhao et al. 2021)."""

from __future__ import annotations

from torch import nn

from cvdd.backbones.norms import NORMS, check_norm
from cvdd.backbones.plain import PlainNetwork
from cvdd.support.config_base import ConfigError


def convnet(
    num_classes: int, depth: int = 3, width: int = 128, norm: str = "batch", pooled_size: int = 4
) -> PlainNetwork:
    """Build a ConvNet: ``depth`` blocks of convolution, norm, ReLU and 2x2 average pooling.

    With the usual pairs (depth 3 and 32 pixels, depth 4 and 64, depth 5 and 128) the head sees the map as it is.

    Args:
        num_classes: outputs of the head.
        depth: number of blocks, each of which halves the resolution.
        width: channels of every block.
        norm: ``batch``, ``instance`` or ``none``; only ``batch`` has statistics to match.
        pooled_size: side of the feature map that the head sees.

    Raises:
        ConfigError: unknown ``norm`` or a ``depth`` below 1.
    """
    check_norm(norm)
    if depth < 1:
        raise ConfigError(f"backbone.arguments.depth={depth}; valid: 1 and above")
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [
            nn.Conv2d(width if index else 3, width, 3, padding=1),
            NORMS[norm](width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    return PlainNetwork(layers, width, pooled_size, num_classes)
