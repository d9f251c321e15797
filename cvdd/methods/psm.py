"""PSM's maths: difficulty of real images, groups of equal difficulty, and statistics of a group (arXiv 2609.34299)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from cvdd.backbones import batchnorm_layers
from cvdd.statistics.bn import running_moments
from cvdd.statistics.layer_statistics import InputWatch, Moments, channel_moments

EPSILON = 1e-6
"""Added to variances before their ratio is taken (appendix D.1)."""


def precision_distance(network: nn.Module, images: Tensor, variance_weight: float) -> Tensor:
    """How far the statistics of single images are from those that a network keeps (equation 4, inside the rank).

    ``mean_l (||m_l - mean_l|| + beta ||log((v_l + eps) / (var_l + eps))||) / sqrt(channels_l)`` over the BatchNorm
    layers, with mean and biased variance over the pixels of one image.

    Args:
        network: in evaluation mode, with BatchNorm layers.
        images: [n, 3, h, w], normalised.
        variance_weight: beta.

    Returns:
        [n] float64; the larger, the more difficult.
    """
    layers = dict(batchnorm_layers(network))
    watch = InputWatch[Moments](layers, lambda name, inputs: channel_moments(inputs, len(inputs)))
    with watch, torch.no_grad():
        network(images)
    distances = [_distance(moments, layers[name], variance_weight) for name, moments in watch.measured.items()]
    return torch.stack(distances).mean(dim=0)


def _distance(moments: Moments, layer: nn.BatchNorm2d, variance_weight: float) -> Tensor:
    kept = running_moments(layer)
    mean, variance = (values.double() for values in moments)
    ratio = (variance + EPSILON) / (kept.variance.double() + EPSILON)
    apart = (mean - kept.mean.double()).norm(dim=1) + variance_weight * ratio.log().norm(dim=1)
    distance: Tensor = apart / layer.num_features**0.5
    return distance


def ranks_in_class(distances: Tensor, labels: Tensor) -> Tensor:
    """Rank of each image among those of its class, from 0 (easiest); the first of equals comes first.

    Args:
        distances: [n].
        labels: [n].

    Returns:
        [n] int64.
    """
    ranks = torch.empty_like(labels)
    for label in labels.unique().tolist():
        ordered = _in_order(distances, labels, label)
        ranks[ordered] = torch.arange(len(ordered))
    return ranks


def _in_order(scores: Tensor, labels: Tensor, label: int) -> Tensor:
    """Positions of the images of a class, from easy to hard; the first of equals comes first."""
    of_class = (labels == label).nonzero()[:, 0]
    return of_class[scores[of_class].argsort(stable=True)]


def difficulty_groups(scores: Tensor, labels: Tensor, classes: int, groups: int) -> list[list[Tensor]]:
    """Divide each class into groups of nearly equal size, from easy to hard (section 4.2.1).

    Args:
        scores: [n], e.g. the mean rank over networks.
        labels: [n].
        classes: number of classes, each with at least as many images as there are groups.
        groups: how many.

    Returns:
        By group, then class: positions of its images, from easy to hard.
    """
    by_class = []
    for label in range(classes):
        ordered = _in_order(scores, labels, label)
        assert len(ordered) >= groups
        by_class.append(ordered.tensor_split(groups))
    return [[parts[group] for parts in by_class] for group in range(groups)]


def choose_start(group: Tensor, choice: Literal["front", "middle", "back", "random"], source: torch.Generator) -> int:
    """Choose the image with which a slot begins (section 4.2.3; one image, appendix C.2).

    Args:
        group: positions of the images of a class in a group, from easy to hard.
        choice: the easiest, the one in the middle (of an even number the harder), the hardest, or any.
        source: of the choice of any.
    """
    place = {"front": 0, "middle": len(group) // 2, "back": len(group) - 1}.get(choice)
    if place is None:
        place = int(torch.randint(len(group), (), generator=source))
    return int(group[place])


def update_statistics(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Move the running statistics of a network towards those of images; nothing else changes (equation 6).

    As in training, layers normalise by the statistics of the batch, and move by their own momentum.

    Args:
        network: in evaluation mode, in which it is left.
        batches: normalised images [n, 3, h, w], at least two.
    """
    layers = [layer for _, layer in batchnorm_layers(network)]
    _set_training(layers, True)
    with torch.no_grad():
        for images in batches:
            network(images)
    _set_training(layers, False)


def _set_training(layers: Sequence[nn.BatchNorm2d], training: bool) -> None:
    for layer in layers:
        # Of this module alone: what timm's layers have inside drops out while it is trained.
        layer.training = training
