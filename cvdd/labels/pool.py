"""Which label batches are stored, and which of them an epoch shows (specification of LPLD, sections B2.3 and B2.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cvdd.schema import LabelConfig
from cvdd.schema.types import whole_part
from cvdd.support.seeds import generator


@dataclass(frozen=True)
class LabelPool:
    """The label batches of all epochs in one row, of which the first ``keep`` are stored.

    Attributes:
        count: images in the distilled set.
        batch_size: images per batch; one batch is never more than the whole set.
        epochs: of the label recipe.
        keep: share of their batches that is stored.
    """

    count: int
    batch_size: int
    epochs: int
    keep: float

    @staticmethod
    def of(label: LabelConfig, count: int) -> LabelPool:
        """Return the pool of a recipe for so many images."""
        return LabelPool(count, min(label.batch_size, count), label.epochs, label.keep)

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return -(-self.count // self.batch_size)

    @property
    def stored(self) -> int:
        """Batches that are stored."""
        return whole_part(self.keep, self.epochs * self.batches)

    @property
    def labelled_epochs(self) -> int:
        """Epochs of which something is stored."""
        return -(-self.stored // self.batches)

    @property
    def samples(self) -> int:
        """Samples that are stored."""
        last = self.labelled_epochs - 1
        return last * self.count + self.kept(last) if last >= 0 else 0

    @property
    def shown(self) -> int:
        """Samples that an epoch shows: all images once, or as many full batches as an epoch has."""
        return self.count if self.keep == 1 else self.batches * self.batch_size

    def kept(self, epoch: int) -> int:
        """Samples of a labelled epoch that are stored, from its first."""
        batches = min(self.batches, self.stored - epoch * self.batches)
        return min(batches * self.batch_size, self.count)

    def samples_of(self, batch: int) -> tuple[int, int]:
        """First and last-plus-one stored sample of a batch, whose number counts on over the epochs."""
        epoch, within = divmod(batch, self.batches)
        start, stop = within * self.batch_size, min((within + 1) * self.batch_size, self.count)
        return epoch * self.count + start, epoch * self.count + stop

    def draw(self, seed: int, epoch: int) -> list[int]:
        """Draw the stored batches that an epoch shows, with replacement.

        The short last batch of an epoch is replaced by the one before it, so that all have the same size.
        """
        drawn = torch.randint(self.stored, (self.batches,), generator=generator(seed, "pool", epoch)).tolist()
        short = self.count % self.batch_size > 0
        return [batch - 1 if short and batch % self.batches == self.batches - 1 else batch for batch in drawn]

    def draw_in_rounds(self, seed: int, epoch: int) -> list[int]:
        """Draw the batches that an epoch shows where each is shown once before any is again (HALD, arXiv 2512.15647).

        Everything is stored. Short batches stay at the end of an epoch.
        """
        assert self.stored == self.epochs * self.batches
        full = self.count // self.batch_size
        number, within = divmod(epoch, self.epochs)
        order = torch.randperm(full * self.epochs, generator=generator(seed, "round", number)).tolist()
        drawn = [batch // full * self.batches + batch % full for batch in order[within * full : (within + 1) * full]]
        if full < self.batches:
            ends = torch.randperm(self.epochs, generator=generator(seed, "round of ends", number)).tolist()
            drawn.append(ends[within] * self.batches + full)
        return drawn
