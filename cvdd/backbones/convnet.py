"""ConvNet-D, the plain student of the distillation literature (Gidaris and Komodakis 2018; Zhao et al. 2021)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from cvdd.backbones.norms import NORMS, check_norm
from cvdd.config_base import ConfigError


class ConvNet(nn.Module):
    """``depth`` blocks of convolution, norm, ReLU and 2x2 average pooling: ``[B, 3, H, W] -> [B, classes]``.

    The features are pooled to ``pooled_size`` squared before the head. With the usual pairs (depth 3 and 32 pixels,
    depth 4 and 64, depth 5 and 128) the map already is 4x4 and this changes nothing; other sizes work with one head.
    """

    def __init__(self, depth: int, width: int, norm: str, pooled_size: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(depth):
            layers += [
                nn.Conv2d(width if index else 3, width, 3, padding=1),
                NORMS[norm](width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
        self.pooled_size = pooled_size
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * pooled_size**2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        features = functional.adaptive_avg_pool2d(self.features(images), self.pooled_size)
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


def convnet(num_classes: int, depth: int = 3, width: int = 128, norm: str = "batch", pooled_size: int = 4) -> ConvNet:
    """Build a ConvNet.

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
    return ConvNet(depth, width, norm, pooled_size, num_classes)
