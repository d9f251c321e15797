"""First convolutions of frozen networks, written so that a GPU's matrix units can compute them and their gradient."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from cvdd.computing.copies import with_layers

ALIGNED = 8
"""Channels are a multiple of this where matrix units in half precision are to be used."""


class FoldedStem(nn.Module):
    """A convolution with stride 2 of images with few channels, as one without stride of their 2x2 blocks.

    Blocks become channels, so 7x7 places of 3 channels with stride 2 are 4x4 places of 12 channels (16 with zeros).
    On an H200 at 224 pixels the gradient of ResNet18's first layer took a fifth of the time of all layers. The weight
    is folded once; what it was made from must not change.

    Args:
        convolution: see :func:`can_be_folded`.
    """

    weight: Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        assert can_be_folded(convolution)
        self.plain = convolution
        self.size, self.padding = convolution.kernel_size[0], int(convolution.padding[0])
        # Cell k of the kernel, counted from the place itself, lies in block a: k - padding = 2a + b with b 0 or 1.
        self.first, self.last = -self.padding // 2, (self.size - 1 - self.padding) // 2
        before = -(2 * self.first + self.padding)
        after = 2 * self.last + 1 + self.padding - (self.size - 1)
        whole = pad(convolution.weight.detach(), (before, after, before, after))
        folded = _blocks(whole)
        self.channels = -(-folded.shape[1] // ALIGNED) * ALIGNED
        folded = pad(folded, (0, 0, 0, 0, 0, self.channels - folded.shape[1]))
        self.register_buffer("weight", folded.contiguous(memory_format=torch.channels_last), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [n, c, h, w]."""
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            plain: Tensor = self.plain(x)
            return plain
        around = []
        for side in (width, height):
            around += [-self.first, places(side, self.size, self.padding, 2) - side // 2 + self.last]
        folded = pad(_blocks(x), (*around, 0, self.channels - 4 * x.shape[1]))
        return conv2d(folded.contiguous(memory_format=torch.channels_last), self.weight, self.plain.bias)


def _blocks(x: Tensor) -> Tensor:
    """From [n, c, h, w] to the 2x2 blocks [n, 4c, h / 2, w / 2]."""
    n, c, height, width = x.shape
    return x.reshape(n, c, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, height // 2, -1)


def places(side: int, size: int, padding: int, stride: int) -> int:
    """Places at which a window of so many pixels fits into a side of an image, with zeros around it."""
    return (side + 2 * padding - size) // stride + 1


def is_square_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution that treats both axes alike, without gaps, with zeros around the images."""
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.dilation == (1, 1)
        and all(side[0] == side[1] for side in (module.kernel_size, module.stride, module.padding))
    )


def can_be_folded(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a square convolution with stride 2 of few channels."""
    return is_square_convolution(module) and module.in_channels <= 4 and module.groups == 1 and module.stride == (2, 2)


def with_folded_stem(network: nn.Module) -> nn.Module:
    """Replace a network's convolutions that can be folded, in place; return it."""
    return with_layers(network, lambda module: FoldedStem(module) if can_be_folded(module) else None)
