"""The voting loss: how a committee judges images (CV-DD, equations 4 and 5)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cvdd.statistics.bn import BatchStatistics
from cvdd.statistics.features import FeatureWatch, feature_distance
from cvdd.statistics.layer_statistics import Reduce
from cvdd.statistics.matching import Matcher


@dataclass(frozen=True)
class Voter:
    """A member that votes.

    Attributes:
        name: of the member.
        network: frozen, in evaluation mode.
        bn_scale: factor on its statistics term.
        matcher: of this stack, where more is matched than running statistics of BatchNorm; None for those alone.
        dtype: what its convolutions compute in; statistics and losses are in float32 at least.
        channels_last: whether it takes images in that memory format.
        watch: of its BatchNorm layers, entered for good, which a compiled judgement needs; None to enter one for each
            forward pass.
        features: of the layer whose input is compared with that of anchors; None where there are none.
    """

    name: str
    network: nn.Module
    bn_scale: float = 1.0
    matcher: Matcher | None = None
    dtype: torch.dtype | None = None
    channels_last: bool = False
    watch: BatchStatistics | None = None
    features: FeatureWatch | None = None


class Judgement(NamedTuple):
    """What one member says of each unit, each [units].

    Attributes:
        value: ``ce * CE + r_bn * bn_scale * BN + weight * features``, which its share of the vote multiplies.
        ce: cross-entropy.
        bn: distance of statistics, the first layer's multiplier included; 0 without a layer to match.
        features: distance of features from those of the anchors, mean over images; 0 without anchors.
    """

    value: Tensor
    ce: Tensor
    bn: Tensor
    features: Tensor


class Anchors(NamedTuple):
    """What the images of a forward pass are to have the features of.

    Attributes:
        images: [units, images, 3, h, w] real ones, seen through the same views.
        weight: of the distance.
        distance: see :func:`cvdd.statistics.features.feature_distance`.
    """

    images: Tensor
    weight: float
    distance: Literal["l1", "l2"]


class Vote(NamedTuple):
    """What a committee says of a stack.

    Attributes:
        loss: scalar, ``sum_i w_i value_i``, summed over units: each unit's gradient is its own.
        gradient: of the loss with respect to the images, [units, images, 3, h, w].
        ce: [voters, units] cross-entropies.
        bn: [voters, units] distances of statistics; 0 for a voter without a layer to match.
        features: [voters, units] distances of features; 0 without anchors.
        slopes: gradient of each voter's value by itself, where they are kept.
    """

    loss: Tensor
    gradient: Tensor
    ce: Tensor
    bn: Tensor
    features: Tensor
    slopes: tuple[Tensor, ...] | None


def weigh(opinions: Iterable[tuple[Judgement, Tensor]], weights: Tensor, keep: bool = False) -> Vote:
    """Sum judgements by their shares of the vote (CV-DD, equation 4).

    Opinions are taken one by one, so that memory holds the graph of one voter at a time if they are computed so.

    Args:
        opinions: of each voter its judgement, without gradient, and the gradient of its value with respect to the
            images, [units, images, 3, h, w].
        weights: [voters, units] shares, summing to 1 over voters.
        keep: keep each gradient as well.
    """
    gradient: Tensor | None = None
    said, slopes = list[Judgement](), list[Tensor]()
    for (judgement, slope), weight in zip(opinions, weights, strict=True):
        share = weight.view(-1, 1, 1, 1, 1) * slope
        gradient = share if gradient is None else gradient.add_(share)
        said.append(judgement)
        if keep:
            slopes.append(slope)
    assert gradient is not None
    values, ce, bn, features = (torch.stack(parts) for parts in zip(*said, strict=True))
    return Vote((weights * values).sum(), gradient, ce, bn, features, tuple(slopes) if keep else None)


def judge(
    images: Tensor,
    targets: Tensor,
    voter: Voter,
    *,
    ce: float = 1.0,
    r_bn: float,
    first_bn_multiplier: float,
    statistics_of: Literal["unit", "stack"] = "unit",
    across: Reduce | None = None,
    anchors: Anchors | None = None,
) -> Judgement:
    """Let one member judge units in one forward pass; only its value has a gradient.

    Args:
        images: [units, images, 3, h, w], normalised, already augmented.
        targets: [units, images] class indices.
        voter: the member.
        ce: weight of the cross-entropies.
        r_bn: weight of the statistics terms; at 0 they are not computed and read 0.
        first_bn_multiplier: extra weight of the first BatchNorm layer; a voter's matcher has its own.
        statistics_of: match the statistics of each unit, as published, or those of all images together; every unit
            then counts their distance as its own. A voter's matcher has its own number of groups.
        across: adds up over the ranks that have the other images of each unit; None if there are none.
        anchors: whose features the images are to have; None for none.

    Raises:
        ConfigError: the layer whose input are the features is not called.
    """
    units, count = targets.shape
    groups = units if statistics_of == "unit" else 1
    aims = None if anchors is None else _features(voter, anchors.images.flatten(0, 1))
    logits, distance = _look(voter, images.flatten(0, 1), targets, groups, first_bn_multiplier, across, r_bn > 0)
    each = nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view(units, count)
    each = each.mean(dim=1) if across is None else across(each.sum(dim=1)) / across(each.new_tensor([float(count)]))
    # PyTorch 2.15 compiles a product with 1 beside the detached factor to one without gradient.
    value = each if ce == 1 else ce * each
    bn, features = torch.zeros_like(each), torch.zeros_like(each)
    if distance is not None:
        bn = distance.expand(units)
        value = value + r_bn * voter.bn_scale * bn
    if anchors is not None and aims is not None and voter.features is not None:
        features = feature_distance(voter.features.take(), aims, anchors.distance).view(units, count).mean(dim=1)
        value = value + anchors.weight * features
    return Judgement(value, each.detach(), bn.detach(), features.detach())


@torch.no_grad()
def _features(voter: Voter, images: Tensor) -> Tensor:
    """Return a voter's features of images [n, 3, h, w]: [n, k]."""
    assert voter.features is not None
    if voter.watch is not None:
        voter.watch.groups = 0
    # What is kept goes into something new; else a compiler returns it as well.
    voter.features.forget()
    voter.network(_as_taken(voter, images))
    return voter.features.take()


def _as_taken(voter: Voter, images: Tensor) -> Tensor:
    """Return images as a voter's network takes them."""
    if voter.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images.to(voter.dtype or images.dtype)


def _look(
    voter: Voter,
    images: Tensor,
    targets: Tensor,
    groups: int,
    first_multiplier: float,
    across: Reduce | None,
    matched: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return a voter's logits and, if its statistics are matched, their distance [groups]."""
    precision, images = images.dtype, _as_taken(voter, images)
    if not matched:
        if voter.watch is not None:
            voter.watch.groups = 0
        return voter.network(images).to(precision), None
    if voter.matcher is not None:
        with voter.matcher:
            logits = voter.network(images)
        return logits.to(precision), voter.matcher.distance(targets)
    if voter.watch is not None:
        # What is measured goes into something new; else a compiler returns it all, for those who know the old one.
        voter.watch.forget()
        voter.watch.groups = groups
        logits = voter.network(images)
        distance = voter.watch.distance(first_multiplier)
        voter.watch.forget()
        return logits.to(precision), distance
    with BatchStatistics(voter.network, groups, across) as statistics:
        logits = voter.network(images)
    return logits.to(precision), statistics.distance(first_multiplier)
