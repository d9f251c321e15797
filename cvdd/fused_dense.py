"""Dense blocks that measure each map once, for judgements that are compiled.

Every layer of a dense block normalises the maps of all layers before it again, and so does what follows the block. Each
of these BatchNorm layers has running statistics of its own, but the maps' means and variances are the same everywhere:
here they are measured where a map is made, and carried along.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torchvision.models import densenet as torchvision_densenet

from cvdd.backbones.densenet import DenseLayer
from cvdd.fused_bn import FusedBatchNorm, FusedStatistics, measure
from cvdd.layer_statistics import Moments


class _Dense(NamedTuple):
    """What a dense block consists of.

    Attributes:
        layers: first norm and convolution, second norm and convolution of each.
        new_first: whether a layer's maps come before those that it was given, or after.
    """

    layers: list[tuple[nn.Module, nn.Module, nn.Module, nn.Module]]
    new_first: bool


class _Growth(nn.Module):
    """The maps that a layer adds."""

    def __init__(self, norm1: nn.Module, conv1: nn.Module, norm2: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = norm1, conv1, norm2, conv2

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(relu(self.norm1(x)))
        new: Tensor = self.conv2(relu(self.norm2(inner)))
        return new


class MeasuredDenseBlock(nn.Module):
    """A dense block of a network in evaluation mode.

    Args:
        dense: its layers, whose norms are fused.
        following: the norm of all its maps, after the block.
        watch: who is told.
    """

    def __init__(self, dense: _Dense, following: FusedBatchNorm, watch: FusedStatistics) -> None:
        super().__init__()
        self.growths = nn.ModuleList(_Growth(*parts) for parts in dense.layers)
        self.new_first, self.watch = dense.new_first, watch
        norms = [parts[0] for parts in dense.layers] + [following]
        centres: list[Tensor] = []
        for norm, (*_, last) in zip(norms[1:], dense.layers, strict=True):
            assert isinstance(norm, FusedBatchNorm)
            assert isinstance(last, nn.Conv2d)
            width = last.out_channels
            centres.append(norm.centre[:width] if dense.new_first else norm.centre[-width:])
        for norm in norms:
            assert isinstance(norm, FusedBatchNorm)
            norm.carried = True
        first = norms[0]
        assert isinstance(first, FusedBatchNorm)
        for number, centre in enumerate([first.centre, *centres]):
            self.register_buffer(f"centre{number}", centre, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """From [n, c, h, w] to the maps that came in and those of all layers, as the block orders them."""
        watch, groups = self.watch, self.watch.groups
        moments = measure(x, self.get_buffer("centre0"), groups) if groups else None
        for number, growth in enumerate(self.growths, start=1):
            watch.carried = moments
            new = growth(x)
            if moments is not None:
                own = measure(new, self.get_buffer(f"centre{number}"), groups)
                moments = Moments(*(torch.cat(self._ordered(*pair), dim=1) for pair in zip(own, moments, strict=True)))
            x = torch.cat(self._ordered(new, x), dim=1)
        watch.carried = moments
        return x

    def _ordered(self, new: Tensor, before: Tensor) -> list[Tensor]:
        return [new, before] if self.new_first else [before, new]


def measure_once(network: nn.Module, watch: FusedStatistics) -> None:
    """Replace the dense blocks of a fused network, in place, where it is known what follows them."""
    for path, parent in list(network.named_modules()):
        children = list(parent.named_children())
        for (name, block), (_, after) in itertools.pairwise(children):
            dense, following = _dense_of(block), _first_norm(after)
            if dense is not None and following is not None and _carries(dense, following):
                network.set_submodule(f"{path}.{name}".lstrip("."), MeasuredDenseBlock(dense, following, watch))


def _dense_of(block: nn.Module) -> _Dense | None:
    layers: Sequence[nn.Module] = list(block.children())
    if type(block) is nn.Sequential and layers and all(type(layer) is DenseLayer for layer in layers):
        return _Dense([_parts(layer, "bn1", "conv1", "bn2", "conv2") for layer in layers], True)
    known = torchvision_densenet._DenseLayer
    if type(block) is torchvision_densenet._DenseBlock and all(type(layer) is known for layer in layers):
        return _Dense([_parts(layer, "norm1", "conv1", "norm2", "conv2") for layer in layers], False)
    return None


def _parts(layer: nn.Module, *names: str) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    one, two, three, four = (layer.get_submodule(name) for name in names)
    return one, two, three, four


def _first_norm(module: nn.Module) -> FusedBatchNorm | None:
    found = module if isinstance(module, FusedBatchNorm) else next(module.children(), None)
    return found if isinstance(found, FusedBatchNorm) else None


def _carries(dense: _Dense, following: FusedBatchNorm) -> bool:
    last, *_, convolution = dense.layers[-1]
    return (
        isinstance(last, FusedBatchNorm)
        and isinstance(convolution, nn.Conv2d)
        and following.num_features == last.num_features + convolution.out_channels
    )
