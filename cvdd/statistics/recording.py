"""What a network sees of the real data: the statistics that images are matched to and that it does not hold itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cvdd.schema import StatisticsConfig
from cvdd.statistics.layer_statistics import InputWatch, Moments, layer_moments, matched_layers

Table = Mapping[str, Mapping[str, Moments]]
"""By the layer's name, then ``channels`` or ``patches``."""

MOVING_SHARE = 0.1
"""Share of a new batch in the moving average of a class (specification of LPLD, section B2.1)."""


@dataclass(frozen=True)
class RealStatistics:
    """Statistics of the real training images at the inputs of a network's layers.

    Attributes:
        layers: of all images, each [k]; convolutions only, BatchNorm layers hold their own.
        classes: of each class, each [classes, k]; empty where classes have no targets of their own.
    """

    layers: Table
    classes: Table

    def to(self, device: torch.device) -> RealStatistics:
        """Return the same on a device."""
        return RealStatistics(_moved(self.layers, device), _moved(self.classes, device))


def _moved(table: Table, device: torch.device) -> Table:
    return {
        layer: {part: Moments(*(tensor.to(device) for tensor in moments)) for part, moments in parts.items()}
        for layer, parts in table.items()
    }


def record_statistics(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], config: StatisticsConfig, classes: int
) -> RealStatistics:
    """Show a network the real data once and record what ``config`` asks for.

    Of all images: the mean over batches of each batch's statistics, weighted by its share of the images; the variance
    is therefore not the total one (specification of G-VBSM, section 2.2). Of a class, by ``class_statistics``:
    ``images`` averages the mean and variance that each image has by itself (EDC, section A2.2), ``total`` takes all
    images of the class together, ``moving`` goes ``0.9 old + 0.1 new`` at every batch that shows the class, starting
    at mean 0 and variance 1 (LPLD, section B2.1). A class without images stays at the start, or at 0.

    The release of EDC stores mean and variance of a class's patches under each other's name, so that its program
    compares one with the other; here they are what they are called.

    Args:
        network: in evaluation mode, on the device of the batches.
        batches: normalised images [n, 3, h, w] and their labels [n].
        config: which layers, and how.
        classes: number of classes.

    Returns:
        float32 on the batches' device; sums are in double precision.
    """
    watched = matched_layers(network, config.layers)
    everything: dict[str, dict[str, _OverBatches]] = {}
    by_class: dict[str, dict[str, _OverImages | _Moving]] = {}

    def measure(name: str, inputs: Tensor) -> dict[str, Moments]:
        # Moments of single images: those of any set of them follow.
        return layer_moments(watched[name], inputs, len(inputs), config.patch)

    watch = InputWatch(watched, measure)
    for images, labels in batches:
        with watch, torch.no_grad():
            network(images)
        for name, parts in watch.measured.items():
            for part, measured in parts.items():
                moments = Moments(measured.mean.double(), measured.variance.double())
                if isinstance(watched[name], nn.Conv2d):
                    totals = everything.setdefault(name, {})
                    totals.setdefault(part, _OverBatches(moments.mean)).add(moments)
                if config.class_share:
                    of_classes = by_class.setdefault(name, {})
                    if part not in of_classes:
                        of_classes[part] = _class_totals(config.class_statistics, classes, moments.mean)
                    of_classes[part].add(moments, labels)
    return RealStatistics(_results(everything), _results(by_class))


def pool(moments: Moments, group: Tensor, groups: int) -> Moments:
    """Moments of groups of images from those of the images: the mean variance, plus the variance of the means.

    Args:
        moments: each [n, k], of images with equally many pixels.
        group: [n] the group of each image.
        groups: number of groups.

    Returns:
        [groups, k]; 0 for a group without images.
    """
    count = torch.bincount(group, minlength=groups).clamp(min=1)[:, None]
    empty = moments.mean.new_zeros(groups, moments.mean.shape[1])
    mean = empty.index_add(0, group, moments.mean) / count
    spread = moments.variance + (moments.mean - mean[group]).square()
    return Moments(mean, empty.index_add(0, group, spread) / count)


class _OverBatches:
    def __init__(self, like: Tensor) -> None:
        self.images = 0
        self.mean, self.variance = like.new_zeros(like.shape[1]), like.new_zeros(like.shape[1])

    def add(self, moments: Moments) -> None:
        count = len(moments.mean)
        batch = pool(moments, torch.zeros(count, dtype=torch.long, device=moments.mean.device), 1)
        self.images += count
        self.mean += count * batch.mean[0]
        self.variance += count * batch.variance[0]

    def result(self) -> Moments:
        return Moments(self.mean / self.images, self.variance / self.images)


class _OverImages:
    def __init__(self, classes: int, like: Tensor, together: bool) -> None:
        self.together = together
        self.count = like.new_zeros(classes, 1)
        self.mean = like.new_zeros(classes, like.shape[1])
        self.variance, self.square = torch.zeros_like(self.mean), torch.zeros_like(self.mean)

    def add(self, moments: Moments, labels: Tensor) -> None:
        self.count.index_add_(0, labels, torch.ones_like(moments.mean[:, :1]))
        self.mean.index_add_(0, labels, moments.mean)
        self.variance.index_add_(0, labels, moments.variance)
        self.square.index_add_(0, labels, moments.mean.square())

    def result(self) -> Moments:
        count = self.count.clamp(min=1)
        mean, variance = self.mean / count, self.variance / count
        if self.together:
            variance = variance + (self.square / count - mean.square()).clamp(min=0)
        return Moments(mean, variance)


class _Moving:
    def __init__(self, classes: int, like: Tensor) -> None:
        self.classes = classes
        self.mean = like.new_zeros(classes, like.shape[1])
        self.variance = torch.ones_like(self.mean)

    def add(self, moments: Moments, labels: Tensor) -> None:
        batch = pool(moments, labels, self.classes)
        share = MOVING_SHARE * (torch.bincount(labels, minlength=self.classes) > 0)[:, None]
        self.mean = torch.lerp(self.mean, batch.mean, share.to(self.mean))
        self.variance = torch.lerp(self.variance, batch.variance, share.to(self.mean))

    def result(self) -> Moments:
        return Moments(self.mean, self.variance)


def _class_totals(kind: Literal["images", "total", "moving"], classes: int, like: Tensor) -> _OverImages | _Moving:
    return _Moving(classes, like) if kind == "moving" else _OverImages(classes, like, together=kind == "total")


def _results(totals: Mapping[str, Mapping[str, _OverBatches | _OverImages | _Moving]]) -> Table:
    return {
        layer: {part: Moments(*(tensor.float() for tensor in total.result())) for part, total in parts.items()}
        for layer, parts in totals.items()
    }
