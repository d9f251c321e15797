"""Dense blocks that measure each map once, for judgements that are compiled.

Every layer of a dense block normalises the maps of all layers before it again, and so does what follows the block. Each
of these BatchNorm layers has running statistics of its own, but the maps' means and variances are the same everywhere:
here they are measured where a map is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvdd.computing.dense_blocks import parts_of_dense_layers, puts_new_maps_first
from cvdd.computing.fused_bn import FusedBatchNorm, FusedStatistics, measure


class _Growth(nn.Module):
    """The maps that a layer adds."""

    def __init__(self, norm1: nn.Module, conv1: nn.Module, norm2: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        assert isinstance(norm1, FusedBatchNorm)
        assert isinstance(norm2, FusedBatchNorm)
        assert isinstance(conv2, nn.Conv2d)
        norm1.rectifies = norm2.rectifies = True
        self.norm1, self.conv1, self.norm2, self.conv2 = norm1, conv1, norm2, conv2

    def forward(self, x: Tensor) -> Tensor:
        new: Tensor = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return new


class MeasuredDenseBlock(nn.Module):
    """A dense block of a network in evaluation mode.

    Args:
        name: of the block.
        layers: of the block, whose norms are fused.
        new_first: whether a layer's maps come before those that it was given, or after.
        following: the norm of all its maps, after the block.
        watch: who is told.
    """

    def __init__(
        self, name: str, layers: Sequence[_Growth], new_first: bool, following: FusedBatchNorm, watch: FusedStatistics
    ) -> None:
        super().__init__()
        self.name, self.layers, self.new_first, self.watch = name, nn.ModuleList(layers), new_first, watch
        # Norm number k normalises what came in, map 0, and the maps 1 to k of as many layers.
        norms = [*(layer.norm1 for layer in layers), following]
        self._centres = [norms[0].centre]
        for before, norm in itertools.pairwise(norms):
            added = norm.num_features - before.num_features
            self._centres.append(norm.centre[:added] if new_first else norm.centre[-added:])
        for number, norm in enumerate(norms):
            maps = {self._called(one): self._centres[one] for one in range(number + 1)}
            watch.compose(norm, dict(reversed(maps.items())) if new_first else maps)

    def forward(self, x: Tensor) -> Tensor:
        """From [n, c, h, w] to the maps that came in and those of all layers, as the block orders them."""
        self._measure(0, x)
        for number, layer in enumerate(self.layers, start=1):
            new = layer(x)
            self._measure(number, new)
            x = joined([new, x] if self.new_first else [x, new])
        return x

    def _measure(self, number: int, maps: Tensor) -> None:
        if self.watch.groups:
            self.watch.note(self._called(number), *measure(maps, self._centres[number]))

    def _called(self, number: int) -> str:
        return f"{self.name}:{number}"


def joined(maps: Sequence[Tensor]) -> Tensor:
    """Join maps [n, c, h, w] along their channels; the result lies in memory as the first of them does."""
    if not maps[0].is_contiguous(memory_format=torch.channels_last):
        return torch.cat(list(maps), dim=1)
    # A compiler lays out what it joins by the order of the axes, whatever lies side by side in the parts.
    return torch.cat([one.permute(0, 2, 3, 1) for one in maps], dim=3).permute(0, 3, 1, 2)


def measure_once(network: nn.Module, watch: FusedStatistics) -> None:
    """Replace the dense blocks of a fused network, in place, where a norm of all their maps follows at once."""
    for path, parent in list(network.named_modules()):
        for (name, block), (_, after) in itertools.pairwise(list(parent.named_children())):
            following = after if isinstance(after, FusedBatchNorm) else next(after.children(), None)
            names = parts_of_dense_layers(block)
            if names is None or not isinstance(following, FusedBatchNorm):
                continue
            layers = [_Growth(*(layer.get_submodule(part) for part in names)) for layer in block.children()]
            if following.num_features == layers[-1].norm1.num_features + layers[-1].conv2.out_channels:
                whole = f"{path}.{name}".lstrip(".")
                new_first = puts_new_maps_first(block)
                network.set_submodule(whole, MeasuredDenseBlock(whole, layers, new_first, following, watch))
