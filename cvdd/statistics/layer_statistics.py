"""Mean and variance of what goes into a layer, by channel and by patch, for each group of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cvdd.backbones import batchnorm_layers

Measured = TypeVar("Measured")

HALVES = (torch.bfloat16, torch.float16)


def in_full(x: Tensor) -> Tensor:
    """Return what is in half precision in float32, and all else as it is."""
    return x.float() if x.dtype in HALVES else x


class Moments(NamedTuple):
    """Mean and biased variance, each [groups, k], or [k] where there is one group."""

    mean: Tensor
    variance: Tensor


Reduce = Callable[[Tensor], Tensor]
"""Adds up a tensor over ranks; each rank's gradient is that of its own term."""


def channel_moments(inputs: Tensor, groups: int, across: Reduce | None = None) -> Moments:
    """Moments of each channel over the images and pixels of each group.

    Args:
        inputs: [n, c, h, w].
        groups: number of equal groups of consecutive images.
        across: adds up over the ranks that have the other images of each group; None if there are none.

    Returns:
        [groups, c].
    """
    grouped = inputs.unflatten(0, (groups, -1))
    if across is not None:
        count = across(inputs.new_tensor([grouped[:, :, 0].numel() / groups]))
        mean = across(grouped.sum(dim=(1, 3, 4))) / count
        # The deviations from the mean of all ranks add up to 0, so the variance does not change with it; those of one
        # rank do not, and would say that it does.
        deviation = grouped - mean.detach()[:, None, :, None, None]
        return Moments(mean, across(deviation.square().sum(dim=(1, 3, 4))) / count)
    # Two passes by hand: on a CPU torch.var_mean over these axes takes three times as long, gradient included.
    centre = grouped.mean(dim=(1, 3, 4), keepdim=True)
    variance = (grouped - centre).square().mean(dim=(1, 3, 4))
    return Moments(centre[:, 0, :, 0, 0], variance)


def patch_moments(inputs: Tensor, groups: int, patch: int) -> Moments:
    """Moments of each square patch of the map over the images, channels and pixels that fall into it.

    The map is resized bilinearly to the next multiples of ``patch`` first; one that is smaller becomes one patch
    (specification of G-VBSM, section 2.2).

    Args:
        inputs: [n, c, h, w].
        groups: number of equal groups of consecutive images.
        patch: side of a patch, in cells of the map.

    Returns:
        [groups, patches], row by row.
    """
    height, width = inputs.shape[-2:]
    rows, columns = -(-height // patch), -(-width // patch)
    if (height, width) != (rows * patch, columns * patch):
        inputs = nn.functional.interpolate(inputs, (rows * patch, columns * patch), mode="bilinear")
    grouped = inputs.unflatten(0, (groups, -1))
    # Cell by cell first, then the cells of a patch: on a CPU nine times as fast as all axes at once.
    mean = _patch_means(grouped.mean(dim=(1, 2)), patch)
    centre = mean.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
    variance = _patch_means((grouped - centre[:, None, None]).square().mean(dim=(1, 2)), patch)
    return Moments(mean.flatten(1), variance.flatten(1))


def _patch_means(cells: Tensor, patch: int) -> Tensor:
    means: Tensor = cells.unflatten(1, (-1, patch)).unflatten(3, (-1, patch)).mean(dim=(2, 4))
    return means


def layer_moments(layer: nn.Module, inputs: Tensor, groups: int, patch: int) -> dict[str, Moments]:
    """Moments that are matched at a layer: ``channels``, and at a convolution ``patches`` too."""
    moments = {"channels": channel_moments(inputs, groups)}
    if isinstance(layer, nn.Conv2d):
        moments["patches"] = patch_moments(inputs, groups, patch)
    return moments


def matched_layers(network: nn.Module, layers: str) -> dict[str, nn.Module]:
    """Return the layers whose inputs are matched, by name, in order of registration.

    Args:
        network: the network.
        layers: ``bn`` or ``bn_and_conv`` (all 2-D BatchNorm layers, or all 2-D convolutions too).
    """
    if layers == "bn":
        return dict(batchnorm_layers(network))
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d | nn.Conv2d)}


class InputWatch(Generic[Measured]):
    """Measures the inputs of layers during a forward pass; a context manager around it.

    Some networks run their layers in another order than they register them, and some leave layers out; what was
    measured is listed in the given order.

    Args:
        layers: the layers to watch, by name.
        measure: gets a layer's name and its input [n, c, h, w].
    """

    def __init__(self, layers: Mapping[str, nn.Module], measure: Callable[[str, Tensor], Measured]) -> None:
        self._layers, self._measure = layers, measure
        self._measured: dict[str, Measured] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def measured(self) -> dict[str, Measured]:
        """What was measured in the last pass, for the layers that it went through."""
        return {name: self._measured[name] for name in self._layers if name in self._measured}

    def forget(self) -> None:
        """Let go of what was measured, and of the graph behind it."""
        self._measured = {}

    def __enter__(self) -> Self:
        self.forget()
        self._handles = [
            layer.register_forward_pre_hook(partial(self._collect, name)) for name, layer in self._layers.items()
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _collect(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given = inputs[0]
        # Sums over a batch in half precision would lose what is compared.
        self._measured[name] = self._measure(name, in_full(given))
