"""Choosing real images instead of making them: herding in the features of several networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvdd.statistics.features import FEATURES_AT_ONCE, head_features


def herd(features: Tensor, count: int) -> Tensor:
    """Choose samples whose mean is that of all, one after the other (Welling, 2009).

    Sample k is the one that brings the mean of the first k closest to the mean of all, so that a shorter choice is the
    beginning of a longer one.

    Args:
        features: [n, dimensions].
        count: how many, at most n.

    Returns:
        [count] different positions, in the order in which they were chosen.
    """
    assert count <= len(features)
    mean = features.mean(dim=0)
    total = torch.zeros_like(mean)
    free = torch.ones(len(features), dtype=torch.bool, device=features.device)
    chosen = []
    for number in range(1, count + 1):
        distance = ((total + features) / number - mean).norm(dim=1).masked_fill(~free, torch.inf)
        best = int(distance.argmin())
        chosen.append(best)
        free[best] = False
        total = total + features[best]
    return torch.tensor(chosen)


def member_features(networks: Sequence[nn.Module], images: Tensor, batch: int = FEATURES_AT_ONCE) -> Tensor:
    """What each network's classifier sees of some images, on a common scale.

    Every feature is divided by its standard deviation over the images, and every network by the root of its number of
    features, so that all networks count the same.

    Args:
        networks: in evaluation mode, on one device.
        images: [n, 3, size, size], normalised.
        batch: images per forward pass.

    Returns:
        [n, features of all networks], on the CPU.

    Raises:
        ConfigError: a network has no linear classifier.
    """
    parts = []
    for network in networks:
        features = head_features(network, images, "method.init=herding", batch)
        scale = features.std(dim=0, correction=0).clamp(min=1e-6) * features.shape[1] ** 0.5
        parts.append((features - features.mean(dim=0)) / scale)
    return torch.cat(parts, dim=1)


def outward(count: int, middle: int) -> Tensor:
    """Places 0 to ``count - 1`` from the one in the middle outward, of two as far the upper one first: [count]."""
    distance = torch.arange(count) - middle
    return (2 * distance.abs() - (distance > 0).long()).argsort(stable=True)
