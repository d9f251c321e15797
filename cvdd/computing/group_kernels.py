"""BatchNorm of groups on a CPU as two compiled loops: one measures maps, one does all that follows.

PyTorch's own passes over a map are two for its statistics, and one each to normalise it, to add a shortcut and to
rectify it. The loops are compiled once for all shapes, in a few seconds; a whole network takes a compiler a minute and
gains less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cvdd.statistics.layer_statistics import Moments, in_full

INNERMOST = 32 * 1024
"""Bytes of the innermost cache. A block of places lies in it while its moments are added up, channel by channel."""

BLOCK = 32
"""Places of a block, at most: it is summed up without a tree, and by many at once."""


def group_moments(maps: Tensor, groups: int) -> Moments:
    """Measure each group of consecutive images.

    Args:
        maps: [n, h, w, c], contiguous.
        groups: of them; ``n`` is a multiple.

    Returns:
        mean and biased variance, [groups, c], in float32 at least.
    """
    places = maps[..., 0].numel() // groups
    most = max(min(BLOCK, places, INNERMOST // (maps.shape[-1] * maps.element_size())), 1)
    block = next(size for size in range(most, 0, -1) if places % size == 0)
    return Moments(*_compiled(_moments)(maps.view(groups, places // block, block, maps.shape[-1])))


def normalise_groups(maps: Tensor, scale: Tensor, shift: Tensor, beside: Tensor | None, rectify: bool) -> Tensor:
    """Scale and shift each group of consecutive images by values of its own.

    Args:
        maps: [n, h, w, c], contiguous.
        scale: [groups, c].
        shift: [groups, c].
        beside: maps that are added to what was shifted, [n, h, w, c]; None adds nothing.
        rectify: whether what is below zero in the end becomes zero.

    Returns:
        [n, h, w, c], of the same type as ``maps``.
    """
    shape = len(scale), -1, maps.shape[-1]
    added = None if beside is None else beside.view(shape)
    made: Tensor = _compiled(_normalised)(maps.view(shape), scale[:, None], shift[:, None], added, rectify)
    return made.view(maps.shape)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _moments(blocks: Tensor) -> tuple[Tensor, Tensor]:
    # Around one of a block's own places. It takes part in the sum of squares, so that of a block of 32 at most five
    # bits are lost where squares cancel, however far the mean is from zero.
    size = blocks.shape[2]
    centre = in_full(blocks[:, :, 0])
    deviation = in_full(blocks) - centre[:, :, None]
    offset = deviation.sum(2) / size
    within = deviation.square().sum(2) / size - offset.square()
    means = offset + centre
    mean = means.mean(1)
    return mean, within.mean(1) + (means - mean[:, None]).square().mean(1)


def _normalised(maps: Tensor, scale: Tensor, shift: Tensor, beside: Tensor | None, rectify: bool) -> Tensor:
    made = in_full(maps) * scale + shift
    if beside is not None:
        made = made + in_full(beside)
    return (made.relu() if rectify else made).to(maps.dtype)
