"""Whether members pull images in the same direction: cosines between the gradients of their losses."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def agreement(gradients: Tensor) -> Tensor:
    """Compare the gradients of the members' judgements with respect to the same images.

    Args:
        gradients: [members, units, ...] as the members saw the images, that is already through their view; a member's
            share of the vote changes nothing.

    Returns:
        [members, members] cosines in float32, mean over units; 0 where a gradient vanishes.
    """
    directions = torch.nn.functional.normalize(gradients.flatten(2).float(), dim=-1)
    return torch.einsum("aud,bud->ab", directions, directions) / gradients.shape[1]


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
