"""Dense blocks that measure each map once, for judgements that are compiled.

Every layer of a dense block normalises the maps of all layers before it again, and so does what follows the block. Each
of these BatchNorm layers has running statistics of its own, but the maps' means and variances are the same everywhere:
here they are measured where a map is made, and carried along.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torchvision.models import densenet as torchvision_densenet

from cvdd.backbones.densenet import DenseLayer
from cvdd.fused_bn import FusedBatchNorm, FusedStatistics, measure
from cvdd.layer_statistics import Moments


class _Growth(nn.Module):
    """The maps that a layer adds."""

    def __init__(self, norm1: nn.Module, conv1: nn.Module, norm2: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        assert isinstance(norm1, FusedBatchNorm)
        assert isinstance(conv2, nn.Conv2d)
        self.norm1, self.conv1, self.norm2, self.conv2 = norm1, conv1, norm2, conv2

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(relu(self.norm1(x)))
        new: Tensor = self.conv2(relu(self.norm2(inner)))
        return new


class MeasuredDenseBlock(nn.Module):
    """A dense block of a network in evaluation mode.

    Args:
        layers: of the block, whose norms are fused.
        new_first: whether a layer's maps come before those that it was given, or after.
        following: the norm of all its maps, after the block.
        watch: who is told.
    """

    def __init__(
        self, layers: Sequence[_Growth], new_first: bool, following: FusedBatchNorm, watch: FusedStatistics
    ) -> None:
        super().__init__()
        self.layers, self.new_first, self.watch = nn.ModuleList(layers), new_first, watch
        # Norm number k normalises what came in and the maps of k layers.
        self._norms = [*(layer.norm1 for layer in layers), following]
        for norm in self._norms:
            norm.carried = True

    def forward(self, x: Tensor) -> Tensor:
        """From [n, c, h, w] to the maps that came in and those of all layers, as the block orders them."""
        watch, groups = self.watch, self.watch.groups
        centres = [norm.centre for norm in self._norms]
        moments = measure(x, centres[0], groups) if groups else None
        for layer, centre in zip(self.layers, centres[1:], strict=True):
            watch.carried = moments
            new = layer(x)
            if moments is not None:
                added = new.shape[1]
                own = measure(new, centre[:added] if self.new_first else centre[-added:], groups)
                moments = Moments(*(self._joined(*pair) for pair in zip(own, moments, strict=True)))
            x = self._joined(new, x)
        watch.carried = moments
        return x

    def _joined(self, new: Tensor, before: Tensor) -> Tensor:
        return torch.cat([new, before] if self.new_first else [before, new], dim=1)


def measure_once(network: nn.Module, watch: FusedStatistics) -> None:
    """Replace the dense blocks of a fused network, in place, where a norm of all their maps follows at once."""
    for path, parent in list(network.named_modules()):
        for (name, block), (_, after) in itertools.pairwise(list(parent.named_children())):
            following = after if isinstance(after, FusedBatchNorm) else next(after.children(), None)
            names = _norms_and_convolutions(block)
            if names is None or not isinstance(following, FusedBatchNorm):
                continue
            layers = [_Growth(*(layer.get_submodule(part) for part in names)) for layer in block.children()]
            if following.num_features == layers[-1].norm1.num_features + layers[-1].conv2.out_channels:
                measured = MeasuredDenseBlock(layers, type(block) is nn.Sequential, following, watch)
                network.set_submodule(f"{path}.{name}".lstrip("."), measured)


def _norms_and_convolutions(block: nn.Module) -> tuple[str, str, str, str] | None:
    """What the layers of a dense block call their parts, in order; None for another module."""
    kinds = {type(layer) for layer in block.children()}
    if type(block) is nn.Sequential and kinds == {DenseLayer}:
        return "bn1", "conv1", "bn2", "conv2"
    if type(block) is torchvision_densenet._DenseBlock and kinds == {torchvision_densenet._DenseLayer}:
        return "norm1", "conv1", "norm2", "conv2"
    return None
