"""BatchNorm with the statistics of the batch at hand, or of each of its parts, when images are labelled."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cvdd.bn import extras_after
from cvdd.copies import with_layers
from cvdd.group_fusion import FusedGroupNorm, fuse_groups


class GroupBatchNorm(nn.Module):
    """BatchNorm that normalises each group of consecutive samples with the group's own mean and biased variance.

    It shares weight and bias with the layer that it stands for and has no running statistics to drift. What timm's
    BatchNorm layers do after normalising (dropout, activation) is kept.

    Raises:
        ConfigError: the layer is another kind of BatchNorm, which does something unknown besides normalising.
    """

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.group_size: int | None = None
        self.after = extras_after(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [n, c, h, w]; ``n`` is a multiple of ``group_size``, or one group if that is None."""
        normalised: Tensor = self.after(self._normalise(x))
        return normalised

    def _normalise(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        groups = 1 if self.group_size is None else n // self.group_size
        if groups == 1:
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return self._one_by_one(x, groups)
        # Groups become channels, so that the library's fused kernel computes all of them in one call.
        folded = x.reshape(groups, n // groups, c, h, w).transpose(0, 1).reshape(n // groups, groups * c, h, w)
        weight = None if self.weight is None else self.weight.repeat(groups)
        bias = None if self.bias is None else self.bias.repeat(groups)
        out = nn.functional.batch_norm(folded, None, None, weight, bias, True, 0.0, self.eps)
        return out.reshape(n // groups, groups, c, h, w).transpose(0, 1).reshape(n, c, h, w)

    def _one_by_one(self, x: Tensor, groups: int) -> Tensor:
        # On a CPU a call costs nothing, but copies that bring groups together cost as much as normalising.
        out = torch.empty_like(x)
        kind = x.dtype if self.weight is None else self.weight.dtype
        mean, scale = (x.new_empty(x.shape[1], dtype=kind) for _ in range(2))
        for part, place in zip(x.chunk(groups), out.chunk(groups), strict=True):
            torch.native_batch_norm(
                part, self.weight, self.bias, None, None, True, 0.0, self.eps, out=(place, mean, scale)
            )
        return out


class BatchStatisticsNetwork(nn.Module):
    """A frozen network in evaluation mode whose BatchNorm layers use the statistics of the batch at hand.

    This is the labelling network of batch-specific soft labels (CV-DD, section 3.4): running statistics are neither
    read nor touched and dropout is off.

    Args:
        network: the trained network; it is copied, not changed.
        dropout: keep dropout active, as the released program does by accident (fidelity only).
        fused: let its BatchNorm layers be compiled loops, for passes on a CPU (:mod:`cvdd.group_fusion`).
    """

    def __init__(self, network: nn.Module, dropout: bool = False, fused: bool = False) -> None:
        super().__init__()
        copied = copy.deepcopy(network).eval().requires_grad_(False)
        self.network = fuse_groups(copied) if fused else with_layers(copied, _grouped)
        kinds = GroupBatchNorm | FusedGroupNorm
        self.layers = [layer for layer in self.network.modules() if isinstance(layer, kinds)]
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
