"""The voting loss: how a committee judges images (CV-DD, equations 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cvdd.bn import FIRST_LAYER_MULTIPLIER, BatchStatistics, statistics_distance
from cvdd.layer_statistics import Reduce
from cvdd.matching import Matcher


@dataclass(frozen=True)
class Voter:
    """A member that votes.

    Attributes:
        name: of the member.
        network: frozen, in evaluation mode.
        bn_scale: factor on its statistics term.
        matcher: of this stack, where more is matched than running statistics of BatchNorm; None for those alone.
    """

    name: str
    network: nn.Module
    bn_scale: float = 1.0
    matcher: Matcher | None = None


@dataclass(frozen=True)
class VoteTerms:
    """What the members say.

    Attributes:
        loss: scalar, the voting loss summed over units, so that each unit's gradient is its own.
        ce: [members, units] cross-entropies.
        bn: [members, units] distances of statistics, the first layer's multiplier included; 0 for a member that has
            no layer to match, whose vote is its cross-entropy.
    """

    loss: Tensor
    ce: Tensor
    bn: Tensor


def voting_loss(
    images: Tensor,
    targets: Tensor,
    voters: Sequence[Voter],
    weights: Tensor,
    *,
    ce: float = 1.0,
    r_bn: float,
    first_bn_multiplier: float = FIRST_LAYER_MULTIPLIER,
    statistics_of: Literal["unit", "stack"] = "unit",
    across: Reduce | None = None,
) -> VoteTerms:
    """Compute ``sum_i w_i (ce * CE_i + r_bn * BN_i)`` for a stack of units in one forward pass per voter.

    Args:
        images: [units, images, 3, h, w], normalised, already augmented.
        targets: [units, images] class indices.
        voters: the members of this draw.
        weights: [members, units] shares of the vote, summing to 1 over members.
        ce: weight of the cross-entropies.
        r_bn: weight of the statistics terms; at 0 they are not computed and read 0.
        first_bn_multiplier: extra weight of the first BatchNorm layer; a voter's matcher has its own.
        statistics_of: match the statistics of each unit, as published, or those of all images of the stack together;
            every unit then counts the stack's distance as its own. A voter's matcher has its own number of groups.
        across: adds up over the ranks that have the other images of each unit; None if there are none. The loss is
            then that of all images, on each rank, and its gradient that of the rank's own.
    """
    units, count = targets.shape
    whole = count if across is None else int(across(images.new_tensor([float(count)])))
    groups = units if statistics_of == "unit" else 1
    flat = images.flatten(0, 1)
    total = images.new_zeros(())
    all_ce, all_bn = [], []
    for voter, weight in zip(voters, weights, strict=True):
        logits, distance = _judge(voter, flat, targets, groups, first_bn_multiplier, across, matched=r_bn > 0)
        each = nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view(units, count)
        each = each.mean(dim=1) if across is None else across(each.sum(dim=1)) / whole
        distance = torch.zeros_like(each) if distance is None else distance.expand(units)
        total = total + (weight * (ce * each + r_bn * voter.bn_scale * distance)).sum()
        all_ce.append(each.detach())
        all_bn.append(distance.detach())
    return VoteTerms(total, torch.stack(all_ce), torch.stack(all_bn))


def _judge(
    voter: Voter,
    images: Tensor,
    targets: Tensor,
    groups: int,
    first_multiplier: float,
    across: Reduce | None,
    *,
    matched: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return a voter's logits and, if its statistics are matched, their distance [groups]."""
    if not matched:
        return voter.network(images), None
    if voter.matcher is not None:
        with voter.matcher:
            logits = voter.network(images)
        return logits, voter.matcher.distance(targets)
    with BatchStatistics(voter.network, groups, across) as statistics:
        logits = voter.network(images)
    if not statistics.layers:
        return logits, None
    return logits, statistics_distance(statistics.means, statistics.variances, statistics.layers, first_multiplier)
