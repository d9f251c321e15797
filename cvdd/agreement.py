"""Whether members pull images in the same direction: cosines between the gradients of their losses."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]
"""From images [units, ...] to one member's loss, a scalar summed over units."""


def gradient_agreement(images: Tensor, losses: Sequence[Loss]) -> Tensor:
    """Compare the gradients of the members' losses with respect to the same images.

    Each member is asked alone, so memory holds one graph at a time. Nothing is written to ``images``, neither values
    nor ``grad``. A unit must depend on its own images alone for the cosines to be those of units.

    Args:
        images: [units, ...] as the members see them, that is already through their view.
        losses: one for each member, cross-entropy and statistics weighted as in its vote; a factor changes nothing.

    Returns:
        [members, members] cosines in float32, mean over units; 0 where a gradient vanishes.
    """
    seen = images.detach().requires_grad_()
    with torch.enable_grad():
        gradients = [torch.autograd.grad(loss(seen), seen)[0].flatten(1) for loss in losses]
    directions = torch.nn.functional.normalize(torch.stack(gradients).float(), dim=-1)
    return torch.einsum("aud,bud->ab", directions, directions) / len(images)


def pairs_of(matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Write a symmetric matrix [members, members] as ``A-B`` and its entry, for each pair in the members' order."""
    rows = matrix.tolist()
    return {
        f"{names[first]}-{names[second]}": rows[first][second]
        for first, second in itertools.combinations(range(len(names)), 2)
    }


def mean_agreement(history: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Average the agreement of each pair of members over the log rows and units in which both voted.

    Args:
        history: by the unit's name, ``rows`` with ``agreement``, as stored with the images; older rows have none.
    """
    found: dict[str, list[float]] = {}
    for unit in history.values():
        for row in unit["rows"]:
            for pair, cosine in row.get("agreement", {}).items():
                found.setdefault(pair, []).append(cosine)
    return {pair: statistics.fmean(cosines) for pair, cosines in found.items()}
