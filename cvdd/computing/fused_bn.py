"""BatchNorm that normalises and measures in one pass over the images, for judgements that are compiled.

A hook before each layer says the same in three passes, and leaves to the compiler the sum of three gradients of one
map, which it writes out in full precision. Here the map's gradient is one expression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvdd.backbones import batchnorm_layers
from cvdd.computing.norm_tracing import Norm
from cvdd.computing.statistics_rows import StatisticsRows
from cvdd.statistics.bn import BatchStatistics, extras_after, running_moments
from cvdd.statistics.layer_statistics import Moments, in_full


class _NormaliseAndMeasure(torch.autograd.Function):
    """Return the normalised map, and of each image and channel the mean deviation and the mean squared deviation."""

    @staticmethod
    def forward(
        x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, rectify: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Around the running mean, which is near the batch's: the squares lose nothing, and one pass is enough.
        deviation = in_full(x) - _by_channel(centre)
        out = deviation * _by_channel(scale) + _by_channel(shift)
        return as_type(out.relu() if rectify else out, x.dtype), *_moments(deviation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.rectify = inputs[4]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, centre, scale, shift = ctx.saved_tensors
        of_map, of_mean, of_square = gradients
        of_map = in_full(of_map)
        if ctx.rectify:
            # What was positive is worked out again: a compiler would write it down, and read it again.
            out = (in_full(x) - _by_channel(centre)) * _by_channel(scale) + _by_channel(shift)
            of_map = torch.where(out > 0, of_map, 0)
        gradient = of_map * _by_channel(scale) + _through_moments(x, centre, of_mean, of_square)
        return as_type(gradient, x.dtype), None, None, None, None


class _Measure(torch.autograd.Function):
    """Return the mean deviation and the mean squared deviation of each image and channel."""

    @staticmethod
    def forward(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        return _moments(in_full(x) - _by_channel(centre))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, centre = ctx.saved_tensors
        return as_type(_through_moments(x, centre, *gradients), x.dtype), None


def measure(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Measure maps in one pass over them.

    Args:
        x: [n, c, h, w].
        centre: [c], near the means.

    Returns:
        mean deviation from the centre, and mean squared deviation, [n, c] each, in float32 at least.
    """
    mean, square = _Measure.apply(x, centre)
    return mean, square


def _moments(deviation: Tensor) -> tuple[Tensor, Tensor]:
    # Divided before it is added up, so that a compiler has the sums written where they are compared.
    share = deviation / (deviation.shape[2] * deviation.shape[3])
    return share.sum(dim=(2, 3)), (share * deviation).sum(dim=(2, 3))


def _through_moments(x: Tensor, centre: Tensor, of_mean: Tensor, of_square: Tensor) -> Tensor:
    """Gradient of maps through what was measured of them."""
    places = x.shape[2] * x.shape[3]
    constant, slope = (values[:, :, None, None] for values in (of_mean / places, 2 / places * of_square))
    own: Tensor = (in_full(x) - _by_channel(centre)) * slope + constant
    return own


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast what is not of the type yet; PyTorch 2.11 compiles a cast that does nothing to one without gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def _by_channel(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


class FusedBatchNorm(nn.BatchNorm2d, Norm):
    """A frozen BatchNorm layer in evaluation mode that tells a watch the statistics of what it normalises.

    Args:
        name: of the layer.
        layer: with running statistics; parameters and buffers are shared. None of them may change any more.
        watch: who is told; while it has no groups, the layer only normalises.

    Attributes:
        measures: whether it measures what it normalises, which someone else does otherwise.
        rectifies: whether what is below zero becomes zero.
    """

    centre: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, layer: nn.BatchNorm2d, watch: FusedStatistics) -> None:
        super().__init__(layer.num_features, layer.eps, affine=False)
        self.weight, self.bias = layer.weight, layer.bias
        self.running_mean, self.running_var = layer.running_mean, layer.running_var
        self.name, self.watch, self.after = name, watch, extras_after(layer)
        self.measures, self.rectifies = True, False
        mean, variance = running_moments(layer)
        scale = (variance + layer.eps).rsqrt()
        scale = scale if layer.weight is None else scale * layer.weight.detach()
        shift = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach()
        for kind, values in (("centre", mean), ("scale", scale), ("shift", shift)):
            self.register_buffer(kind, values, persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [n, c, h, w] with the running statistics."""
        if self.watch.groups and self.measures:
            out, *moments = _NormaliseAndMeasure.apply(x, self.centre, self.scale, self.shift, self.rectifies)
            self.watch.note(self.name, *moments)
        else:
            out = (in_full(x) - _by_channel(self.centre)) * _by_channel(self.scale) + _by_channel(self.shift)
            out = as_type(out, x.dtype)
            # Last: what a compiler keeps for the gradient is as wide as this.
            out = out.relu() if self.rectifies else out
        normalised: Tensor = self.after(out)
        return normalised


class FusedStatistics(BatchStatistics):
    """What fused layers measure in a pass; used like the hooks that it stands for, but never entered.

    Args:
        network: whose BatchNorm layers are replaced. Each measures its own input, until someone says otherwise by
            :meth:`compose`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, 0)
        self._deviations: dict[str, tuple[Tensor, Tensor]] = {}
        self._centres: dict[str, Tensor] = {}
        self._composed: dict[str, tuple[str, ...]] = {}
        self._rows: StatisticsRows | None = None
        for name, layer in batchnorm_layers(network):
            fused = FusedBatchNorm(name, layer, self)
            self._batchnorm[name] = fused
            self._centres[name], self._composed[name] = fused.centre, (name,)
            network.set_submodule(name, fused)

    def compose(self, layer: FusedBatchNorm, maps: Mapping[str, Tensor]) -> None:
        """Have a layer measure nothing, because its input consists of maps that are measured where they are made.

        Args:
            layer: one of the network's.
            maps: by name, in the order of the layer's channels; of each, the values around which it is measured.
        """
        layer.measures = False
        self._centres.pop(layer.name, None)
        self._centres |= {name: centre for name, centre in maps.items() if name not in self._centres}
        self._composed[layer.name] = tuple(maps)

    def prepare(self) -> None:
        """Lay out what is compared, now that all layers are composed."""
        if self._batchnorm:
            moments = [running_moments(layer) for layer in self._batchnorm.values()]
            self._rows = StatisticsRows(moments, self._centres, list(self._composed.values()))

    @property
    def tensors(self) -> list[Tensor]:
        """What is compared with, laid out in one row."""
        return [] if self._rows is None else list(self._rows.buffers())

    def note(self, name: str, mean: Tensor, square: Tensor) -> None:
        """Take down mean deviation and mean squared deviation of a map, [images, channels] each."""
        self._deviations[name] = mean, square

    @property
    def measured(self) -> dict[str, Moments]:
        """Moments of each layer's input, [groups, channels], for the layers whose maps were all measured."""
        whole = {name: maps for name, maps in self._composed.items() if all(one in self._deviations for one in maps)}
        return {name: self._moments_of(maps) for name, maps in whole.items()}

    def _moments_of(self, maps: Sequence[str]) -> Moments:
        offset, square = (
            torch.cat([self._deviations[one][kind] for one in maps], dim=1).unflatten(0, (self.groups, -1)).mean(dim=1)
            for kind in (0, 1)
        )
        return Moments(offset + torch.cat([self._centres[one] for one in maps]), square - offset.square())

    def distance(self, first_multiplier: float) -> Tensor | None:
        """:func:`cvdd.statistics.bn.statistics_distance`, of all layers at once if all were passed."""
        if self._rows is None or len(self._deviations) < len(self._centres):
            return super().distance(first_multiplier)
        means, squares = zip(*(self._deviations[name] for name in self._centres), strict=True)
        return self._rows.distance(means, squares, self.groups, first_multiplier)

    def forget(self) -> None:
        """Let go of what was measured, and of the graph behind it."""
        super().forget()
        self._deviations = {}
