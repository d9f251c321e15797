"""BatchNorm that normalises and measures in one pass over the images, for judgements that are compiled.

A hook before each layer says the same in three passes, and leaves to the compiler the sum of three gradients of one
map, which it writes out in full precision. Here the map's gradient is one expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvdd.backbones import batchnorm_layers
from cvdd.bn import BatchStatistics, extras_after, running_moments
from cvdd.config_base import ConfigError
from cvdd.copies import sharing_copy
from cvdd.layer_statistics import HALVES, Moments


class _NormaliseAndMeasure(torch.autograd.Function):
    """Return the normalised map, and mean and biased variance of each group's channels."""

    @staticmethod
    def forward(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        # Around the running mean, which is near the batch's: the squares lose nothing, and one pass is enough.
        deviation = _full(x) - _by_channel(centre)
        normalised = deviation * _by_channel(scale) + _by_channel(shift)
        offset = _group_mean(deviation, groups)
        variance = _group_mean(deviation.square(), groups) - offset.square()
        return as_type(normalised, x.dtype), offset + centre, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, scale, _, _ = inputs
        ctx.save_for_backward(x, scale, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean = ctx.saved_tensors
        of_map, of_mean, of_variance = gradients
        groups = len(mean)
        count = x.numel() / mean.numel()
        slope, constant = 2 / count * of_variance, of_mean / count
        grouped = _full(x).unflatten(0, (groups, -1))
        own = (grouped - _by_group(mean)) * _by_group(slope) + _by_group(constant)
        gradient = _full(of_map) * _by_channel(scale) + own.flatten(0, 1)
        return as_type(gradient, x.dtype), None, None, None, None


def _group_mean(x: Tensor, groups: int) -> Tensor:
    # Image by image, whose values are near each other in memory.
    mean: Tensor = x.mean(dim=(2, 3)).unflatten(0, (groups, -1)).mean(dim=1)
    return mean


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast what is not of the type yet; PyTorch 2.11 compiles a cast that does nothing to one without gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALVES else x


def _by_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _by_group(values: Tensor) -> Tensor:
    return values[:, None, :, None, None]


class FusedBatchNorm(nn.BatchNorm2d):
    """A frozen BatchNorm layer in evaluation mode that tells a watch the statistics of what it normalises.

    Args:
        name: of the layer.
        layer: with running statistics; parameters and buffers are shared. None of them may change any more.
        watch: who is told; while it has no groups, the layer only normalises.
    """

    centre: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, layer: nn.BatchNorm2d, watch: FusedStatistics) -> None:
        super().__init__(layer.num_features, layer.eps, affine=False)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.name, self.watch, self.after = name, watch, extras_after(layer)
        mean, variance = running_moments(layer)
        scale = (variance + layer.eps).rsqrt()
        scale = scale if layer.weight is None else scale * layer.weight.detach()
        shift = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach()
        for kind, values in (("centre", mean), ("scale", scale), ("shift", shift)):
            self.register_buffer(kind, values, persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [n, c, h, w] with the running statistics."""
        fixed = self.centre, self.scale, self.shift
        if self.watch.groups == 0:
            mean, scale, shift = (_by_channel(values) for values in fixed)
            out = as_type((_full(x) - mean) * scale + shift, x.dtype)
        else:
            out, *moments = _NormaliseAndMeasure.apply(x, *fixed, self.watch.groups)
            self.watch.note(self.name, Moments(*moments))
        normalised: Tensor = self.after(out)
        return normalised


class _Targets(nn.Module):
    """Running statistics of all layers in one row of channels.

    A module, because a compiler takes the sizes of a module's tensors as given, and compiles for any size where those
    of other objects differ between members.

    Args:
        layers: of each, mean and variance [channels].
    """

    means: Tensor
    variances: Tensor
    first: Tensor
    membership: Tensor

    def __init__(self, layers: Sequence[Moments]) -> None:
        super().__init__()
        means = torch.cat([layer.mean for layer in layers])
        lengths = torch.tensor([len(layer.mean) for layer in layers], device=means.device)
        number = torch.arange(len(layers), device=means.device)
        self.register_buffer("means", means)
        self.register_buffer("variances", torch.cat([layer.variance for layer in layers]))
        # [layers]: 1 for the first, 0 for the others; [channels, layers]: 1 where a channel belongs to a layer.
        self.register_buffer("first", (number == 0).to(means.dtype))
        self.register_buffer("membership", (number.repeat_interleave(lengths)[:, None] == number).to(means.dtype))

    def distance(self, means: Sequence[Tensor], variances: Sequence[Tensor], first_multiplier: float) -> Tensor:
        """Weighted sum over layers of the norms of both differences: [groups]."""
        apart = torch.stack([self.means - torch.cat(list(means), 1), self.variances - torch.cat(list(variances), 1)])
        squares = apart.square() @ self.membership
        # The gradient of a root at 0 is not finite.
        norms = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().sum(dim=0)
        return norms @ (1 + (first_multiplier - 1) * self.first)


class FusedStatistics(BatchStatistics):
    """What fused layers measure in a pass; used like the hooks that it stands for, but never entered.

    Args:
        network: whose BatchNorm layers are replaced.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, 0)
        for name, layer in batchnorm_layers(network):
            self._batchnorm[name] = FusedBatchNorm(name, layer, self)
            network.set_submodule(name, self._batchnorm[name])
        moments = [running_moments(layer) for layer in self._batchnorm.values()]
        self._targets = _Targets(moments) if moments else None

    def distance(self, first_multiplier: float) -> Tensor | None:
        """:func:`cvdd.bn.statistics_distance`, of all layers at once, which a compiler reads in a few operations."""
        if self._targets is None or len(self._measured) < len(self._batchnorm):
            return super().distance(first_multiplier)
        return self._targets.distance(self.means, self.variances, first_multiplier)

    def note(self, name: str, moments: Moments) -> None:
        """Take down what a layer measured."""
        self._measured[name] = moments


def fuse_statistics(network: nn.Module) -> tuple[nn.Module, BatchStatistics]:
    """Return a copy of a frozen network, with parameters shared, whose BatchNorm layers measure what they normalise.

    A network with another kind of BatchNorm, or with layers that keep no running statistics, stays as it is and has
    hooks.
    """
    if not all(_is_known(layer) for _, layer in batchnorm_layers(network)):
        watch = BatchStatistics(network, 1)
        watch.__enter__()
        return network, watch
    fused = sharing_copy(network)
    return fused, FusedStatistics(fused)


def _is_known(layer: nn.BatchNorm2d) -> bool:
    try:
        running_moments(layer)
        extras_after(layer)
    except ConfigError:
        return False
    return True
