"""Matching a network's statistics of the images to those of the real data (G-VBSM, EDC, LPLD)."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from cvdd.schema import StatisticsConfig
from cvdd.statistics.bn import running_moments
from cvdd.statistics.layer_statistics import HALVES, InputWatch, Moments, layer_moments, matched_layers
from cvdd.statistics.recording import RealStatistics
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import generator


class Matcher:
    """Compares what goes into the layers of one voter with targets, for one stack of units.

    Call :meth:`begin`, use it as a context manager around the forward pass, then call :meth:`distance`, once for each
    pass. At BatchNorm layers mean and biased variance of each channel are compared, at convolutions those of each
    patch too (specification of G-VBSM, sections 2.2 and 2.3; of EDC, section A2.3; of LPLD, section B2.2).

    With ``momentum`` a statistic is a moving average over iterations in value and that of the current images in
    gradient. The averages are kept for each group and belong to the stack; the released programs carry them from one
    batch of images to the next, so that there images depend on which were made before them.

    Args:
        network: the voter's, frozen, in evaluation mode.
        config: what is matched.
        groups: number of equal groups of consecutive images that have statistics of their own: the units of the
            stack, or 1.
        first_multiplier: weight of the first layer in order of registration; the others have 1. While that layer is
            left out no other takes its place.
        recorded: statistics of the real data where ``config.recorded``.
        seed: of the choice of convolutions that an iteration leaves out.
    """

    def __init__(
        self,
        network: nn.Module,
        config: StatisticsConfig,
        groups: int,
        first_multiplier: float,
        recorded: RealStatistics | None,
        seed: int,
    ) -> None:
        assert recorded is not None or not config.recorded
        self.config, self.groups, self.first_multiplier, self.seed = config, groups, first_multiplier, seed
        self._network = network
        self._layers = matched_layers(network, config.layers)
        self._recorded = recorded
        self._device: torch.device | None = None
        self._left_out: frozenset[str] = frozenset()
        self._averages: dict[str, Tensor] = {}
        self._watch = InputWatch(self._layers, self._measure)

    def begin(self, iteration: int) -> None:
        """Choose the convolutions that this iteration leaves out.

        The choice depends on (seed, iteration) alone and holds for all units, so that no unit depends on those beside
        it.
        """
        if not self.config.drop_rate:
            return
        convolutions = [name for name, layer in self._layers.items() if isinstance(layer, nn.Conv2d)]
        draws = torch.rand(len(convolutions), generator=generator(self.seed, "drop", iteration)).tolist()
        self._left_out = frozenset(
            name for name, draw in zip(convolutions, draws, strict=True) if draw < self.config.drop_rate
        )

    def __enter__(self) -> Self:
        device = next(self._network.parameters()).device
        if self._recorded is not None and self._device != device:
            self._recorded, self._device = self._recorded.to(device), device
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, trace)

    def _measure(self, name: str, inputs: Tensor) -> dict[str, Moments]:
        if name in self._left_out:
            return {}
        return layer_moments(self._layers[name], inputs, self.groups, self.config.patch)

    def distance(self, targets: Tensor) -> Tensor:
        """Distance of the last forward pass, summed over layers, and move the averages on.

        Of each statistic the Euclidean norm over its entries, not squared: with ``class_share`` s, ``1 - s`` times the
        distance to the target of all data plus ``s`` times that to the mean of the targets of the group's classes.

        Args:
            targets: [units, images] class indices; ``groups`` is ``units`` or 1.

        Returns:
            [groups]; 0 if there was no layer to match.

        Raises:
            ConfigError: a map has another size than when the statistics of its patches were recorded.
        """
        parameter = next(self._network.parameters())
        dtype = torch.float32 if parameter.dtype in HALVES else parameter.dtype
        total = torch.zeros(self.groups, dtype=dtype, device=parameter.device)
        labels = targets.reshape(self.groups, -1)
        for index, (name, parts) in enumerate(self._watch.measured.items()):
            weight = self.first_multiplier if index == 0 else 1.0
            for part, moments in parts.items():
                total = total + weight * self._moments_distance(name, part, moments, labels)
        self._watch.forget()
        return total

    def _moments_distance(self, name: str, part: str, moments: Moments, labels: Tensor) -> Tensor:
        share = self.config.class_share
        shown = Moments(
            self._averaged(f"{name}/{part}/mean", moments.mean),
            self._averaged(f"{name}/{part}/variance", moments.variance),
        )
        distance = torch.zeros_like(shown.mean[:, 0])
        if share < 1:
            distance = distance + (1 - share) * _distance(name, self._target(name, part), shown)
        if share > 0:
            assert self._recorded is not None
            table = self._recorded.classes[name][part]
            own = Moments(table.mean[labels].mean(dim=1), table.variance[labels].mean(dim=1))
            distance = distance + share * _distance(name, own, shown)
        return distance

    def _target(self, name: str, part: str) -> Moments:
        layer = self._layers[name]
        if isinstance(layer, nn.BatchNorm2d):
            return running_moments(layer)
        assert self._recorded is not None
        return self._recorded.layers[name][part]

    def _averaged(self, key: str, value: Tensor) -> Tensor:
        momentum = self.config.momentum
        if momentum is None:
            return value
        current = value.detach()
        if key in self._averages:
            average = momentum * self._averages[key].to(current.device) + (1 - momentum) * current
        else:
            average = current if self.config.start == "first" else (1 - momentum) * current
        self._averages[key] = average
        return average + (value - current)

    def state(self) -> dict[str, Tensor]:
        """Return the moving averages, each [groups, k], for a checkpoint; later passes leave these tensors alone."""
        return dict(self._averages)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from averages that :meth:`state` returned."""
        self._averages = dict(state)


def _distance(name: str, target: Moments, shown: Moments) -> Tensor:
    if target.mean.shape[-1] != shown.mean.shape[-1]:
        raise ConfigError(
            f"layer {name}: its map has {shown.mean.shape[-1]} patches, and {target.mean.shape[-1]} when the "
            "statistics of the real data were recorded. Patches need images of the data set's size: set "
            "method.sizes=null, or method.statistics.layers=bn"
        )
    distance: Tensor = (target.mean - shown.mean).norm(dim=1) + (target.variance - shown.variance).norm(dim=1)
    return distance
