"""The voting loss: how a committee judges images (CV-DD, equations 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cvdd.bn import FIRST_LAYER_MULTIPLIER, BatchStatistics, statistics_distance


@dataclass(frozen=True)
class Voter:
    """A member that votes.

    Attributes:
        name: of the member.
        network: frozen, in evaluation mode.
        bn_scale: factor on its BatchNorm term.
    """

    name: str
    network: nn.Module
    bn_scale: float = 1.0


@dataclass(frozen=True)
class VoteTerms:
    """What the members say.

    Attributes:
        loss: scalar, the voting loss summed over units, so that each unit's gradient is its own.
        ce: [members, units] cross-entropies.
        bn: [members, units] distances of BatchNorm statistics, the first layer's multiplier included.
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
) -> VoteTerms:
    """Compute ``sum_i w_i (ce * CE_i + r_bn * BN_i)`` for a stack of units in one forward pass per voter.

    Args:
        images: [units, images, 3, h, w], normalised, already augmented.
        targets: [units, images] class indices.
        voters: the members of this draw.
        weights: [members, units] shares of the vote, summing to 1 over members.
        ce: weight of the cross-entropies.
        r_bn: weight of the BatchNorm terms; at 0 they are not computed and read 0.
        first_bn_multiplier: extra weight of the first BatchNorm layer.
        statistics_of: match the statistics of each unit, as published, or those of all images of the stack together;
            every unit then counts the stack's distance as its own.
    """
    units, count = targets.shape
    flat = images.flatten(0, 1)
    total = images.new_zeros(())
    all_ce, all_bn = [], []
    for voter, weight in zip(voters, weights, strict=True):
        with BatchStatistics(voter.network, units if statistics_of == "unit" else 1) as statistics:
            logits = voter.network(flat)
        each = nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view(units, count).mean(dim=1)
        if r_bn and statistics.layers:
            distance = statistics_distance(
                statistics.means, statistics.variances, statistics.layers, first_bn_multiplier
            ).expand(units)
        else:
            distance = torch.zeros_like(each)
        total = total + (weight * (ce * each + r_bn * voter.bn_scale * distance)).sum()
        all_ce.append(each.detach())
        all_bn.append(distance.detach())
    return VoteTerms(total, torch.stack(all_ce), torch.stack(all_bn))
