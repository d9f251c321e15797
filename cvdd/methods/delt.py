"""DELT: images of a class begin one after the other, each from a real one of middling difficulty (arXiv 2411.19946)."""

from __future__ import annotations

import math

from torch import Tensor

from cvdd.methods.selection import outward


def first_stages(ipc: int, stages: int) -> list[int]:
    """Stage in which each slot begins, [ipc], ascending: as many in each as can be, the early ones one more.

    Args:
        ipc: images per class.
        stages: of the recover loop; all slots end with the last.
    """
    each, more = divmod(ipc, stages)
    return [stage for stage in range(stages) for _ in range(each + (stage < more))]


def around_the_middle(losses: Tensor, count: int) -> Tensor:
    """Choose images of a class that its network neither tells well nor badly, and return their indices.

    Args:
        losses: [n] cross-entropy of each with its class.
        count: how many, at most n.

    Returns:
        [count] in the order in which they are taken: from the middle outward, easier ones first.
    """
    # As released: by the probability of the class, ascending.
    order = losses.argsort(descending=True, stable=True)
    return order[outward(len(order), math.ceil(len(order) / 2))[:count]]
