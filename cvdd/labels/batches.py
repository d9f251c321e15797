"""What a student is given: batches of replayed samples with their labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from cvdd.labels.replay import Replay, batch_bounds
from cvdd.labels.sources import SoftLabels


@dataclass(frozen=True)
class LabelledBatch:
    """One batch for a student.

    Attributes:
        replay: how to show the images.
        logits: [n, classes] of the teachers; [n, 0] of hard labels.
    """

    replay: Replay
    logits: Tensor

    def to(self, device: torch.device) -> LabelledBatch:
        """Copy to a device (Lightning calls this)."""
        return LabelledBatch(self.replay.to(device), self.logits.to(device))


class SoftLabelDataset(Dataset[LabelledBatch]):
    """A plain dataset whose items are labelled batches: item ``epoch * batches + b`` is batch b of an epoch.

    Use it with ``DataLoader(dataset, sampler=..., batch_size=None)``; nothing of PyTorch is patched.

    Args:
        labels: stored or computed labels.
        device: where the epoch at hand is kept.
    """

    def __init__(self, labels: SoftLabels, device: torch.device | None = None) -> None:
        self.labels, self.device = labels, device or torch.device("cpu")
        self.bounds = batch_bounds(labels.count, labels.batch_size)
        self._last: tuple[int, Replay, Tensor] | None = None

    def __len__(self) -> int:
        return self.labels.epochs * len(self.bounds)

    def __getitem__(self, index: int) -> LabelledBatch:
        epoch, batch = divmod(index, len(self.bounds))
        if self._last is None or self._last[0] != epoch:
            plan, logits = self.labels.epoch(epoch)
            self._last = (epoch, plan.to(self.device), logits.to(self.device))
        start, stop = self.bounds[batch]
        return LabelledBatch(self._last[1].batch(start, stop), self._last[2][start:stop])


class WholeEpochs(Dataset[list[LabelledBatch]]):
    """The same batches, all those of an epoch as one item: item e is epoch e.

    Args:
        batches: one by one.
    """

    def __init__(self, batches: SoftLabelDataset) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches.labels.epochs

    def __getitem__(self, epoch: int) -> list[LabelledBatch]:
        count = len(self.batches.bounds)
        return [self.batches[epoch * count + batch] for batch in range(count)]


class EpochSampler(Sampler[int]):
    """Items ``epoch * length`` to ``(epoch + 1) * length`` in order; Lightning sets the epoch."""

    def __init__(self, length: int) -> None:
        self.length, self._epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._epoch * self.length, (self._epoch + 1) * self.length))

    def __len__(self) -> int:
        return self.length
