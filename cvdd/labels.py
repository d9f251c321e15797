"""Labels of a distilled set: computed when they are asked for, or the images' own classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cvdd.config_base import ConfigError
from cvdd.label_pool import LabelPool
from cvdd.replay import Replay, draw_epoch, replay
from cvdd.schema import LabelConfig
from cvdd.teachers import Teachers


class SoftLabels(Protocol):
    """Labels of a distilled set, epoch by epoch, from a file or computed when asked."""

    @property
    def batch_size(self) -> int:
        """Images per full batch."""
        ...

    @property
    def count(self) -> int:
        """Samples of an epoch."""
        ...

    @property
    def epochs(self) -> int:
        """Labelled epochs."""
        ...

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        """Return the replay of all samples of an epoch and their logits [count, classes]; [count, 0] if hard."""
        ...


@dataclass
class ComputedLabels:
    """Labels that are computed on the fly, the same bits as the stored ones; of a pool, those that it stores.

    Attributes:
        teachers: who labels.
        images: [count, 3, size, size] uint8.
        label: the recipe.
        seed: of the labels.
        mean: of the normalisation.
        std: of the normalisation.
    """

    teachers: Teachers
    images: Tensor
    label: LabelConfig
    seed: int
    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        check_batches(len(self.images), self.label)
        self.pool = LabelPool.of(self.label, len(self.images))
        self._last: tuple[int, Replay, Tensor] | None = None

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return self.label.batch_size

    @property
    def count(self) -> int:
        """Images in the distilled set."""
        return len(self.images)

    @property
    def epochs(self) -> int:
        """Labelled epochs."""
        return self.label.epochs

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        """Draw an epoch and score it; the last one is kept."""
        if self._last is None or self._last[0] != epoch:
            plan = draw_epoch(self.label, self.count, self.images.shape[-1], self.seed, epoch)
            plan = plan.batch(0, self.pool.kept(epoch))
            self._last = (epoch, plan, self._score(plan))
        return self._last[1], self._last[2]

    def _score(self, plan: Replay) -> Tensor:
        size = self.label.batch_size
        whole = len(plan) // size * size
        step = size * self.label.stack
        stacks = [(start, min(start + step, whole), size) for start in range(0, whole, step)]
        if whole < len(plan):
            stacks.append((whole, len(plan), len(plan) - whole))
        parts = []
        for start, stop, batch_size in stacks:
            part = plan.batch(start, stop).to(self.images.device)
            samples = replay(self.images, part, self.mean, self.std)
            parts.append(self.teachers.score(samples, batch_size).cpu())
        return torch.cat(parts).to(getattr(torch, self.label.dtype))


@dataclass(frozen=True)
class HardLabels:
    """No labels but the images' own classes; the views and mixes of every epoch are drawn all the same.

    Attributes:
        label: the recipe.
        count: images in the distilled set.
        size: side of the images in pixels.
        seed: of the labels.
    """

    label: LabelConfig
    count: int
    size: int
    seed: int

    @property
    def batch_size(self) -> int:
        """Images per batch."""
        return self.label.batch_size

    @property
    def epochs(self) -> int:
        """Epochs that can be shown."""
        return self.label.epochs

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        """Draw an epoch; there are no logits: [count, 0]."""
        return draw_epoch(self.label, self.count, self.size, self.seed, epoch), torch.empty(self.count, 0)


def check_batches(count: int, label: LabelConfig) -> None:
    """Refuse a batch of a single image where statistics are those of the batch, and a pool without any batch.

    Raises:
        ConfigError: names batch sizes, or shares, that work.
    """
    pool = LabelPool.of(label, count)
    if pool.stored == 0:
        total = pool.batches * pool.epochs
        raise ConfigError(f"label.keep={label.keep} keeps none of {total} label batches; set at least {1 / total:.2g}")
    smallest = 4 if label.halves else 2
    if (
        label.teachers == "none"
        or label.bn_mode != "batch"
        or count % label.batch_size == 0
        or count % label.batch_size >= smallest
    ):
        return
    sizes = [size for size in range(4, 65) if count % size == 0 or count % size >= smallest]
    raise ConfigError(
        f"label.batch_size={label.batch_size} leaves a last batch of {count % label.batch_size} of {count} images, too "
        f"few for batch statistics. Choose one of {', '.join(map(str, sizes[:12]))}, or label.bn_mode=running."
    )
