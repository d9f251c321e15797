"""The networks that label."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cvdd.computing.compiler import compiling
from cvdd.computing.graphs import Recorded, side_by_side
from cvdd.computing.matrix_convolution import with_matrix_convolutions
from cvdd.computing.passes import Passes
from cvdd.labels.batch_statistics import BatchStatisticsNetwork
from cvdd.methods.gvbsm import balanced_mean
from cvdd.schema import LabelConfig


class Teachers:
    """The networks that label, averaged.

    Args:
        networks: trained networks; they are frozen, and brought into the form in which they label fastest, in place.
        weights: their shares of the averaged logits.
        label: BatchNorm mode, halves, dropout, and whether logits are balanced before they are averaged.
        passes: how they compute. Recorded passes of the networks are made side by side.

    Attributes:
        compiled_samples: of the passes that are compiled, where any are; None is all. Each other number would be
            one more shape, which takes a compiler a while.
    """

    def __init__(
        self, networks: Sequence[nn.Module], weights: Sequence[float], label: LabelConfig, passes: Passes | None = None
    ) -> None:
        self.label = label
        self._passes = passes or Passes()
        self._compiled: dict[nn.Module, Callable[..., Tensor] | None] = {}
        self.compiled_samples: int | None = None
        self._recorded: dict[int, Recorded] = {}
        self._streams: list[torch.cuda.Stream] = []
        self.weights = list(weights)
        self.networks: list[nn.Module] = []
        for network in networks:
            frozen = network.eval().requires_grad_(False)
            if self._passes.multiplies:
                frozen = with_matrix_convolutions(frozen)
            used = frozen
            if label.bn_mode == "batch":
                used = BatchStatisticsNetwork(frozen, label.dropout, self._passes.compile_norms)
            # What convolutions take without rearranging: as fast in every family or faster, up to 1.7 times.
            self.networks.append(used.to(memory_format=torch.channels_last))

    def to(self, device: torch.device) -> Teachers:
        """Move the networks to a device."""
        for network in self.networks:
            network.to(device)
        return self

    @torch.no_grad()
    def score(self, samples: Tensor, batch_size: int) -> Tensor:
        """Return averaged logits [n, classes] of ``n // batch_size`` whole batches [n, 3, h, w].

        With batch statistics each batch, or each half of it (the first of ``batch_size // 2`` samples), is normalised
        by itself, however many batches share the forward pass. A balanced average is that of each batch.
        """
        if not self._passes.record or samples.device.type != "cuda":
            return self._score(batch_size, samples)
        if not self._streams:
            self._streams = [torch.cuda.Stream(samples.device) for _ in self.networks]
        if batch_size not in self._recorded:
            # Weak: what refers to itself waits for the garbage collector, and holds the memory of the GPU until then.
            score = weakref.WeakMethod(self._score)
            self._recorded[batch_size] = Recorded(partial(_call, score, batch_size), samples.device, "labelling")
        scored: Tensor = self._recorded[batch_size](samples)
        # The next call overwrites them.
        return scored.clone()

    def forget_recordings(self) -> None:
        """Let go of the memory of all passes that were recorded; the next ones are recorded anew."""
        self._recorded.clear()

    @torch.no_grad()
    def _score(self, batch_size: int, samples: Tensor) -> Tensor:
        samples = samples.contiguous(memory_format=torch.channels_last)
        calls = [partial(self._logits, self._ready(network, samples), samples, batch_size) for network in self.networks]
        with compiling(self._passes.compile or self._passes.compile_norms), self._passes.around(samples.device):
            scored = list(side_by_side(calls, self._streams))
        scored = [logits.float() for logits in scored]
        if self.label.weights == "balanced":
            return balanced_mean(torch.stack(scored), batch_size)
        total = None
        for logits, weight in zip(scored, self.weights, strict=True):
            total = weight * logits if total is None else total + weight * logits
        assert total is not None
        return total

    def _ready(self, network: nn.Module, samples: Tensor) -> Callable[..., Tensor]:
        if self.compiled_samples not in (None, len(samples)):
            return network
        if network not in self._compiled:
            self._compiled[network] = self._passes.compiled(network)
        return self._compiled[network] or network

    def _logits(self, network: Callable[..., Tensor], samples: Tensor, batch_size: int) -> Tensor:
        if self.label.bn_mode == "running":
            return network(samples)
        first = batch_size // 2
        if not self.label.halves:
            return network(samples, batch_size)
        if 2 * first == batch_size:
            return network(samples, first)
        batches = samples.view(-1, batch_size, *samples.shape[1:])
        parts = [batches[:, :first], batches[:, first:]]
        scored = [network(part.flatten(0, 1), part.shape[1]).view(len(batches), part.shape[1], -1) for part in parts]
        return torch.cat(scored, dim=1).flatten(0, 1)


def _call(method: weakref.WeakMethod[Any], batch_size: int, samples: Tensor) -> Tensor:
    score = method()
    assert score is not None
    scored: Tensor = score(batch_size, samples)
    return scored
