"""Copies of networks that hold the same tensors, and networks with other layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

from torch import nn


def sharing_copy(network: nn.Module, *, buffers: bool = True) -> nn.Module:
    """Return a copy whose layers can be replaced or told apart, with the same parameters.

    Args:
        network: to copy.
        buffers: whether buffers are the same too, rather than the copy's own.
    """
    shared = itertools.chain(network.parameters(), network.buffers() if buffers else ())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def with_layers(network: nn.Module, choose: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replace layers of a network in place; return it.

    Args:
        network: whose layers are replaced.
        choose: says what stands for a layer from now on; None for the layer itself.
    """
    for name, module in list(network.named_modules()):
        if (chosen := choose(module)) is not None:
            network.set_submodule(name, chosen)
    return network
