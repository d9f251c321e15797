"""What voters said while images were made, iteration by iteration."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TERMS = ("ce", "bn", "features")
"""What each voter says of the units, by itself."""


@dataclass(frozen=True)
class LogRow:
    """State of a stack at one iteration.

    Attributes:
        iteration: number of finished optimiser steps.
        loss: what is minimised, the voting loss and the density's term, mean over units.
        ce: cross-entropy by member, mean over units, when it last judged; members that never did are missing.
        bn: statistics term by member, likewise.
        lr: learning rate.
        density: term of the data densification, mean over units.
        agreement: by pair of members, cosine of the gradients of their terms in the last iteration, mean over units;
            empty for a single member and without ``method.log_agreement``.
        features: by member, distance of features from those of the anchors, like ``ce``; empty without anchors.
    """

    iteration: int
    loss: float
    ce: dict[str, float]
    bn: dict[str, float]
    lr: float
    density: float = 0.0
    agreement: dict[str, float] = field(default_factory=dict)
    features: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Said:
    """What was said in one iteration, by the voters that judged it.

    Attributes:
        voters: their indices.
        loss: the voting loss and the data densification, summed over units.
        ce: [voters, units].
        bn: [voters, units].
        features: [voters, units].
        density: summed over units.
        gradients: of each one's judgement, where they were asked for: [units, images, 3, size, size].
    """

    voters: tuple[int, ...]
    loss: Tensor
    ce: Tensor
    bn: Tensor
    features: Tensor
    density: Tensor
    gradients: tuple[Tensor, ...] | None

    def kept(self) -> Said:
        """A copy that the next iteration does not overwrite, without gradients."""
        said = (self.loss, self.ce, self.bn, self.features, self.density)
        copied = torch.cat([part.flatten() for part in said]).split([part.numel() for part in said])
        loss, ce, bn, features, density = (one.view_as(part) for one, part in zip(copied, said, strict=True))
        return Said(self.voters, loss, ce, bn, features, density, None)
