"""Networks that label with the statistics of the batch at hand."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cvdd.computing.copies import with_layers
from cvdd.computing.group_bn import GroupBatchNorm
from cvdd.computing.group_fusion import fuse_groups


class BatchStatisticsNetwork(nn.Module):
    """A frozen network in evaluation mode whose BatchNorm layers use the statistics of the batch at hand.

    This is the labelling network of batch-specific soft labels (CV-DD, section 3.4): running statistics are neither
    read nor touched and dropout is off.

    Args:
        network: the trained network; it is copied, not changed.
        dropout: keep dropout active, as the released program does by accident (fidelity only).
        fused: let its BatchNorm layers be compiled loops, for passes on a CPU (:mod:`cvdd.computing.group_fusion`).
    """

    def __init__(self, network: nn.Module, dropout: bool = False, fused: bool = False) -> None:
        super().__init__()
        copied = copy.deepcopy(network).eval().requires_grad_(False)
        self.network = fuse_groups(copied) if fused else with_layers(copied, _grouped)
        self.layers = [layer for layer in self.network.modules() if isinstance(layer, GroupBatchNorm)]
        if dropout:
            for module in self.network.modules():
                if isinstance(module, nn.Dropout):
                    module.train()

    @torch.no_grad()
    def forward(self, x: Tensor, group_size: int | None = None) -> Tensor:
        """Return logits [n, classes]; every ``group_size`` consecutive samples are normalised together."""
        for layer in self.layers:
            layer.group_size = group_size
        logits: Tensor = self.network(x)
        return logits


def _grouped(layer: nn.Module) -> nn.Module | None:
    return GroupBatchNorm(layer) if isinstance(layer, nn.BatchNorm2d) else None
