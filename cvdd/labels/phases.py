"""Labels of a student's whole training, some of whose epochs teach the images' own classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cvdd.labels.replay import Replay
from cvdd.labels.sources import HardLabels, SoftLabels


@dataclass(frozen=True)
class HardBetweenSoft:
    """Soft labels, then the images' own classes, then soft labels again (HALD, arXiv 2512.15647).

    Few soft labels for many epochs teach what a crop looks like, which need not be what the image is; epochs of hard
    labels between them bring that back.

    Attributes:
        soft: as many epochs as are left.
        hard: of the same images.
        epochs: of the whole training.
        hard_epochs: of these, in the middle; of an odd number of others the second part has one more.
    """

    soft: SoftLabels
    hard: HardLabels
    epochs: int
    hard_epochs: int

    @property
    def batch_size(self) -> int:
        """Images per full batch."""
        return self.soft.batch_size

    @property
    def count(self) -> int:
        """Samples of an epoch of soft labels; one of hard labels may have fewer, all images once."""
        return self.soft.count

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        """Return an epoch of either: [n, classes] logits, or [n, 0]."""
        first = (self.epochs - self.hard_epochs) // 2
        if first <= epoch < first + self.hard_epochs:
            return self.hard.epoch(epoch - first)
        return self.soft.epoch(epoch if epoch < first else epoch - self.hard_epochs)
