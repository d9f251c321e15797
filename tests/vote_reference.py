"""The voting loss as one differentiable sum, to hold against what is weighed voter by voter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cvdd.synthesis.voting import Voter, judge


@dataclass(frozen=True)
class VoteTerms:
    """What the members say.

    Attributes:
        loss: scalar, the voting loss summed over units, so that each unit's gradient is its own.
        ce: [members, units] cross-entropies.
        bn: [members, units] distances of statistics.
    """

    loss: Tensor
    ce: Tensor
    bn: Tensor


def voting_loss(images: Tensor, targets: Tensor, voters: Sequence[Voter], weights: Tensor, **options: Any) -> VoteTerms:
    """Compute ``sum_i w_i (ce * CE_i + r_bn * BN_i)`` with one graph for all voters; options are those of ``judge``."""
    said = [judge(images, targets, voter, **{"first_bn_multiplier": 10.0, **options}) for voter in voters]
    loss = images.new_zeros(())
    for judgement, weight in zip(said, weights, strict=True):
        loss = loss + (weight * judgement.value).sum()
    return VoteTerms(loss, torch.stack([one.ce for one in said]), torch.stack([one.bn for one in said]))
