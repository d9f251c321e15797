"""Labelling networks on a CPU whose BatchNorm layers are compiled loops that rectify as they normalise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvdd.computing.copies import with_layers
from cvdd.computing.dense_blocks import parts_of_dense_layers, puts_new_maps_first
from cvdd.computing.group_bn import GroupBatchNorm
from cvdd.computing.group_kernels import group_moments, normalise_groups
from cvdd.computing.norm_tracing import Norm, with_parts
from cvdd.statistics.layer_statistics import Moments


class FusedGroupNorm(GroupBatchNorm, Norm):
    """The same where there is a compiler, but for last bits.

    Args:
        layer: for which it stands; weight and bias are shared.

    Attributes:
        rectifies: whether what is below zero becomes zero.
    """

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__(layer)
        self.rectifies = False

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """Normalise [n, c, h, w], and add what is beside it; ``n`` is a multiple of ``group_size``."""
        maps = side_by_side(x)
        added = None if beside is None else side_by_side(beside.expand_as(x))
        normalised: Tensor = self.after(self.normalise(maps, self.measure(maps), added).permute(0, 3, 1, 2))
        return normalised

    def measure(self, maps: Tensor) -> Moments:
        """Moments of each group, [groups, c], of maps [n, h, w, c]."""
        return group_moments(maps, len(maps) // (self.group_size or len(maps)))

    def normalise(self, maps: Tensor, moments: Moments, added: Tensor | None = None) -> Tensor:
        """Normalise maps [n, h, w, c] with moments [groups, c]."""
        scale = torch.rsqrt(moments.variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -moments.mean * scale
        shift = shift if self.bias is None else shift + self.bias
        return normalise_groups(maps, scale, shift, added, self.rectifies)


def side_by_side(x: Tensor) -> Tensor:
    """Return [n, c, h, w] as contiguous [n, h, w, c]."""
    return x.permute(0, 2, 3, 1).contiguous()


class _Growth(nn.Module):
    """The maps that a layer of a dense block adds, from those of the layers before it and their moments."""

    def __init__(self, norm1: nn.Module, conv1: nn.Module, norm2: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        assert isinstance(norm1, FusedGroupNorm)
        assert isinstance(norm2, FusedGroupNorm)
        norm1.rectifies = norm2.rectifies = True
        self.norm1, self.conv1, self.norm2, self.conv2 = norm1, conv1, norm2, conv2

    def forward(self, maps: Tensor, moments: Moments) -> Tensor:
        inner = self.conv1(self.norm1.normalise(maps, moments).permute(0, 3, 1, 2))
        return side_by_side(self.conv2(self.norm2(inner)))


class GroupedDenseBlock(nn.Module):
    """A dense block that measures each map once: every layer of it normalises all maps of the layers before it.

    Args:
        layers: of the block.
        new_first: whether a layer's maps come before those that it was given, or after.
    """

    def __init__(self, layers: Sequence[_Growth], new_first: bool) -> None:
        super().__init__()
        self.layers, self.new_first = nn.ModuleList(layers), new_first

    def forward(self, x: Tensor) -> Tensor:
        """From [n, c, h, w] to the maps that came in and those of all layers, as the block orders them."""
        maps, moments = side_by_side(x), None
        for layer in self.layers:
            assert isinstance(layer, _Growth)
            moments = moments or layer.norm1.measure(maps)
            new = layer(maps, moments)
            measured = layer.norm1.measure(new)
            maps = self._joined(new, maps)
            moments = Moments(*(self._joined(*pair) for pair in zip(measured, moments, strict=True)))
        return maps.permute(0, 3, 1, 2)

    def _joined(self, new: Tensor, old: Tensor) -> Tensor:
        return torch.cat([new, old] if self.new_first else [old, new], dim=-1)


def fuse_groups(network: nn.Module) -> nn.Module:
    """Let a frozen network's BatchNorm layers be compiled loops; return it, or another that holds its layers.

    Sums and rectifiers that follow a BatchNorm layer become a part of it, if PyTorch can trace the network.

    Raises:
        ConfigError: a layer is another kind of BatchNorm, which does something unknown besides normalising.
    """
    with_layers(network, lambda layer: FusedGroupNorm(layer) if isinstance(layer, nn.BatchNorm2d) else None)
    with_layers(network, _grouped_block)
    return with_parts(network, FusedGroupNorm, GroupedDenseBlock, sums=True)


def _grouped_block(block: nn.Module) -> nn.Module | None:
    names = parts_of_dense_layers(block)
    if names is None:
        return None
    layers = [_Growth(*(layer.get_submodule(part) for part in names)) for layer in block.children()]
    return GroupedDenseBlock(layers, puts_new_maps_first(block))
