"""Matching the statistics that BatchNorm layers keep, when images are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvdd.backbones import batchnorm_layers
from cvdd.statistics.layer_statistics import InputWatch, Moments, Reduce, channel_moments
from cvdd.support.config_base import ConfigError


class BatchStatistics(InputWatch[Moments]):
    """Collects mean and biased variance of the input of every BatchNorm layer during one forward pass.

    Use as a context manager around the forward pass. Statistics are taken per group of consecutive samples, so that
    several units can share one pass. Layers and statistics are listed in the order of registration.

    Args:
        network: the network to watch.
        groups: number of equal groups of consecutive samples in the batch; it may be changed between passes, and with 0
            nothing is measured.
        across: adds up over the ranks that have the other samples of each group; None if there are none.
    """

    def __init__(self, network: nn.Module, groups: int, across: Reduce | None = None) -> None:
        self._batchnorm, self.groups, self._across = dict(batchnorm_layers(network)), groups, across
        super().__init__(self._batchnorm, self._moments)

    def _collect(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.groups:
            super()._collect(name, layer, inputs)

    def _moments(self, name: str, inputs: Tensor) -> Moments:
        return channel_moments(inputs, self.groups, self._across)

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps of the network besides the layers themselves."""
        return []

    @property
    def layers(self) -> list[nn.BatchNorm2d]:
        """The layers that the forward pass went through."""
        return [self._batchnorm[name] for name in self.measured]

    @property
    def means(self) -> list[Tensor]:
        """Per layer [groups, channels]."""
        return [moments.mean for moments in self.measured.values()]

    @property
    def variances(self) -> list[Tensor]:
        """Per layer [groups, channels], biased."""
        return [moments.variance for moments in self.measured.values()]

    def distance(self, first_multiplier: float) -> Tensor | None:
        """:func:`statistics_distance` of what was measured, [groups]; None if nothing was."""
        layers = self.layers
        return statistics_distance(self.means, self.variances, layers, first_multiplier) if layers else None


def statistics_distance(
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    layers: Sequence[nn.BatchNorm2d],
    first_multiplier: float,
) -> Tensor:
    """Distance between a batch's statistics and the running ones, summed over layers.

    ``sum_l w_l (||v_l - var_l|| + ||m_l - mean_l||)`` with Euclidean norms over channels, not squared, ``w_0 =
    first_multiplier``, else 1 (specification of the SRe2L family, section 2.2).

    Args:
        means: per layer [groups, channels].
        variances: per layer [groups, channels], biased.
        layers: the BatchNorm layers, in the order of the statistics.
        first_multiplier: weight of the first layer.

    Returns:
        [groups].
    """
    total = torch.zeros_like(means[0][:, 0])
    for index, (mean, variance, layer) in enumerate(zip(means, variances, layers, strict=True)):
        target = running_moments(layer)
        distance = (target.variance - variance).norm(dim=1) + (target.mean - mean).norm(dim=1)
        total = total + (first_multiplier if index == 0 else 1.0) * distance
    return total


def running_moments(layer: nn.BatchNorm2d) -> Moments:
    """Running mean and variance of a layer, each [channels].

    Raises:
        ConfigError: it keeps none.
    """
    if layer.running_mean is None or layer.running_var is None:
        raise ConfigError(
            "a BatchNorm layer keeps no running statistics to match (track_running_stats=False). Choose another "
            "backbone, or set method.r_bn=0"
        )
    return Moments(layer.running_mean, layer.running_var)


def require_batchnorm(network: nn.Module, name: str) -> None:
    """Refuse a network without BatchNorm layers where their statistics are needed.

    Raises:
        ConfigError: it has none.
    """
    if not batchnorm_layers(network):
        raise ConfigError(
            f"member {name} has no BatchNorm layer, so it has no statistics to match or to replace. Choose another "
            "backbone for it, set method.r_bn=0 (it votes by its cross-entropy alone), or label.bn_mode=running, or "
            f"committee.members.{name}.bn_scale=0 for both."
        )


def extras_after(layer: nn.BatchNorm2d) -> nn.Module:
    """Return what timm's BatchNorm layers do after normalising (dropout, activation); nothing for PyTorch's own.

    Raises:
        ConfigError: the layer is another kind of BatchNorm, which does something unknown besides normalising.
    """
    if type(layer).forward is nn.BatchNorm2d.forward:
        return nn.Identity()
    extras = [getattr(layer, "drop", None), getattr(layer, "act", None)]
    then = [extra for extra in extras if isinstance(extra, nn.Module)]
    if len(then) < len(extras):
        raise ConfigError(
            f"{type(layer).__name__} layers cannot use statistics of the batch; set label.bn_mode=running"
        )
    return nn.Sequential(*then)
