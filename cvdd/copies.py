"""Copies of networks that hold the same tensors."""

from __future__ import annotations

import copy
import itertools

from torch import nn


def sharing_copy(network: nn.Module, *, buffers: bool = True) -> nn.Module:
    """Return a copy whose layers can be replaced or told apart, with the same parameters.

    Args:
        network: to copy.
        buffers: whether buffers are the same too, rather than the copy's own.
    """
    shared = itertools.chain(network.parameters(), network.buffers() if buffers else ())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
