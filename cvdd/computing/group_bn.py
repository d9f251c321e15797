"""BatchNorm with the statistics of the batch at hand, or of each of its parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvdd.statistics.bn import extras_after


class GroupBatchNorm(nn.Module):
    """BatchNorm that normalises each group of consecutive samples with the group's own mean and biased variance.

    It shares weight and bias with the layer that it stands for and has no running statistics to drift. What timm's
    BatchNorm layers do after normalising (dropout, activation) is kept.

    Args:
        layer: for which it stands.

    Attributes:
        group_size: samples of a group; None is all.

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
