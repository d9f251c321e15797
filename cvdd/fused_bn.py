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
from cvdd.layer_statistics import HALVES, Moments


class _NormaliseAndMeasure(torch.autograd.Function):
    """Return the normalised map, and mean and biased variance of each group's channels."""

    @staticmethod
    def forward(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        # Around the running mean, which is near the batch's: the squares lose nothing, and one pass is enough.
        deviation = _full(x) - _by_channel(centre)
        normalised = deviation * _by_channel(scale) + _by_channel(shift)
        return as_type(normalised, x.dtype), *_moments(deviation, centre, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, scale, _, _ = inputs
        ctx.save_for_backward(x, scale, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean = ctx.saved_tensors
        of_map, of_mean, of_variance = gradients
        gradient = _full(of_map) * _by_channel(scale) + _through_moments(x, mean, of_mean, of_variance)
        return as_type(gradient, x.dtype), None, None, None, None


class _Measure(torch.autograd.Function):
    """Return mean and biased variance of each group's channels."""

    @staticmethod
    def forward(x: Tensor, centre: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        return _moments(_full(x) - _by_channel(centre), centre, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, mean = ctx.saved_tensors
        return as_type(_through_moments(x, mean, *gradients), x.dtype), None, None


def measure(x: Tensor, centre: Tensor, groups: int) -> Moments:
    """Mean and biased variance of each group's channels, in one pass over the maps.

    Args:
        x: [n, c, h, w].
        centre: [c], near the means.
        groups: number of equal groups of consecutive images.

    Returns:
        [groups, c] each, in float32 at least.
    """
    return Moments(*_Measure.apply(x, centre, groups))


def _moments(deviation: Tensor, centre: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    offset = _group_mean(deviation, groups)
    return offset + centre, _group_mean(deviation.square(), groups) - offset.square()


def _through_moments(x: Tensor, mean: Tensor, of_mean: Tensor, of_variance: Tensor) -> Tensor:
    """Gradient of maps through their mean and variance."""
    count = x.numel() / mean.numel()
    slope, constant = 2 / count * of_variance, of_mean / count
    grouped = _full(x).unflatten(0, (len(mean), -1))
    own: Tensor = (grouped - _by_group(mean)) * _by_group(slope) + _by_group(constant)
    return own.flatten(0, 1)


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

    Attributes:
        carried: whether the statistics of what it normalises are known to the watch already.
    """

    centre: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, layer: nn.BatchNorm2d, watch: FusedStatistics) -> None:
        super().__init__(layer.num_features, layer.eps, affine=False)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.name, self.watch, self.after, self.carried = name, watch, extras_after(layer), False
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
        if self.watch.groups == 0 or self.carried:
            mean, scale, shift = (_by_channel(values) for values in fixed)
            out = as_type((_full(x) - mean) * scale + shift, x.dtype)
            if self.watch.groups:
                assert self.watch.carried is not None
                self.watch.note(self.name, self.watch.carried)
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

    Attributes:
        carried: statistics of the maps at hand, where they were measured before they are normalised.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, 0)
        self.carried: Moments | None = None
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

    def forget(self) -> None:
        """Let go of what was measured, and of the graph behind it."""
        super().forget()
        self.carried = None

    def note(self, name: str, moments: Moments) -> None:
        """Take down what a layer measured."""
        self._measured[name] = moments
