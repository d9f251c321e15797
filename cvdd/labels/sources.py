"""Labels of a distilled set: computed when they are asked for, or the images' own classes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cvdd.labels.pool import LabelPool
from cvdd.labels.replay import Replay, draw_epoch, replay
from cvdd.labels.rows import shortened
from cvdd.labels.teachers import Teachers
from cvdd.schema import LabelConfig
from cvdd.support.config_base import ConfigError
from cvdd.support.memory import is_out_of_memory
from cvdd.support.seeds import derive_seed, own_draws

log = logging.getLogger(__name__)


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
        stack: batches in a forward pass where memory is too short for those of the recipe; None is as many as it
            says. Where it still does not do it becomes smaller. The labels are the same but for their last bits, and
            for what ``label.dropout`` leaves out.
    """

    teachers: Teachers
    images: Tensor
    label: LabelConfig
    seed: int
    mean: Sequence[float]
    std: Sequence[float]
    stack: int | None = None

    def __post_init__(self) -> None:
        check_batches(len(self.images), self.label)
        self.pool = LabelPool.of(self.label, len(self.images))
        self._plans: dict[int, list[Replay]] = {}
        self._last: tuple[int, list[tuple[Replay, Tensor]]] | None = None

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
        """Draw an epoch and score it, with those that share its forward passes; the last ones are kept."""
        together = epochs_together(self.label, self.count)
        first = epoch - epoch % together
        if self._last is None or self._last[0] != first:
            plans = self._plans.pop(first, None) or self._draw(first, together)
            launched = self._launch_what_fits(plans, first)
            # A GPU computes meanwhile.
            self._plans = {first + together: self._draw(first + together, together)}
            dtype = getattr(torch, self.label.dtype)
            rounded = [_finite(torch.cat([part.cpu() for part in parts]), dtype) for parts in launched]
            logits = [shortened(one, self.label.top, self.label.rest) for one in rounded]
            self._last = (first, list(zip(plans, logits, strict=True)))
        return self._last[1][epoch - first]

    def _draw(self, first: int, together: int) -> list[Replay]:
        side = self.images.shape[-1]
        plans = []
        for epoch in range(first, min(first + together, self.pool.labelled_epochs)):
            plan = draw_epoch(self.label, self.count, side, self.seed, epoch)
            plans.append(plan.batch(0, self.pool.kept(epoch)))
        return plans

    @contextlib.contextmanager
    def _own_draws(self, first: int) -> Iterator[None]:
        """Let dropout of the teachers depend on the labels' seed and the epoch alone, and nobody else's draws on it."""
        if not self.label.dropout:
            yield
            return
        with own_draws(derive_seed(self.seed, "dropout", first), self.images.device):
            yield

    def _launch_what_fits(self, plans: Sequence[Replay], first: int) -> list[list[Tensor]]:
        while True:
            stack = self.stack or self.label.stack
            self.teachers.compiled_samples = samples_together(self.label, self.count, stack)
            try:
                with self._own_draws(first):
                    return self._launch(plans, stack)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or stack == 1:
                    raise
                self.stack = stack // 2
                self.teachers.forget_recordings()
                log.warning("out of memory: going on with %d label batches in a forward pass", self.stack)
            if self.images.device.type == "cuda":
                torch.cuda.empty_cache()

    def _launch(self, plans: Sequence[Replay], stack: int) -> list[list[Tensor]]:
        """Score epochs in shared passes, by size of batch; return of each its logits in pieces, one after the other."""
        pieces: dict[int, list[tuple[int, Replay]]] = {}
        size = self.label.batch_size
        for number, plan in enumerate(plans):
            whole = len(plan) // size * size
            for start, stop, batch_size in ((0, whole, size), (whole, len(plan), len(plan) - whole)):
                if start < stop:
                    pieces.setdefault(batch_size, []).append((number, plan.batch(start, stop)))
        scored: list[list[Tensor]] = [[] for _ in plans]
        for batch_size, parts in pieces.items():
            joined = Replay.cat([part for _, part in parts])
            step = batch_size * stack
            passes = [
                self._score(joined.batch(start, min(start + step, len(joined))), batch_size)
                for start in range(0, len(joined), step)
            ]
            lengths = [len(part) for _, part in parts]
            for (number, _), logits in zip(parts, torch.cat(passes).split(lengths), strict=True):
                scored[number].append(logits)
        return scored

    def _score(self, plan: Replay, batch_size: int) -> Tensor:
        samples = replay(self.images, plan.to(self.images.device), self.mean, self.std)
        return self.teachers.score(samples, batch_size)


def epochs_together(label: LabelConfig, count: int) -> int:
    """Number of epochs whose batches share forward passes: as many as fit ``label.stack``, counted from epoch 0.

    A part of what labels depend on, in their last bits.

    Args:
        label: the recipe.
        count: images of an epoch.
    """
    return max(label.stack // max(count // label.batch_size, 1), 1)


def samples_at_most(label: LabelConfig, count: int, stack: int) -> int:
    """Samples in the largest forward pass over a set: those of a stack of batches, or all that are labelled together.

    Args:
        label: the recipe.
        count: images of an epoch.
        stack: batches in a forward pass.
    """
    pool, kept = _sharing_passes(label, count)
    return min(sum(kept), pool.batch_size * stack)


def samples_together(label: LabelConfig, count: int, stack: int) -> int:
    """Samples of the first forward pass over a set, which are those of most of them.

    It follows from the recipe and not from where a process begins, which may be the short last passes.

    Args:
        label: the recipe.
        count: images of an epoch.
        stack: batches in a forward pass.
    """
    pool, kept = _sharing_passes(label, count)
    whole = sum(samples // pool.batch_size * pool.batch_size for samples in kept)
    return min(whole, pool.batch_size * stack)


def _sharing_passes(label: LabelConfig, count: int) -> tuple[LabelPool, list[int]]:
    """The pool, and the stored samples of each of its first epochs, which share forward passes."""
    pool = LabelPool.of(label, count)
    together = min(epochs_together(label, count), pool.labelled_epochs)
    return pool, [pool.kept(epoch) for epoch in range(together)]


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


class NonFiniteLabels(ValueError):
    """Logits of the teachers cannot be stored."""


def _finite(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round logits to the type in which they are stored.

    Raises:
        NonFiniteLabels: some are not finite, or not in this type.
    """
    rounded = logits.to(dtype)
    if not bool(logits.isfinite().all()):
        raise NonFiniteLabels(
            "the teachers' logits are not finite: a member's training has gone astray; choose a smaller learning rate "
            "(recipe.lr), or other teachers (label.teachers)"
        )
    if not bool(rounded.isfinite().all()):
        raise NonFiniteLabels(
            f"the teachers' logits reach {float(logits.abs().max()):.3g}, which is too much for "
            f"label.dtype={str(dtype).removeprefix('torch.')}: set label.dtype=float32, or look at the members, whose "
            "training may have gone astray (recipe.lr)"
        )
    return rounded


def check_batches(count: int, label: LabelConfig, measures_prior: bool = False) -> None:
    """Refuse a batch of a single image where statistics are those of the batch, and a pool without any batch.

    Args:
        count: images that are labelled.
        label: how.
        measures_prior: whether the images are those of a prior's measurement, whose statistics are always those of
            half-batches.

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
    ways = [f"choose label.batch_size from {', '.join(map(str, sizes[:12]))}"] if sizes else []
    ways += (
        ["raise prior.images_per_class", "give the priors: prior.source=given"]
        if measures_prior
        else ["raise ipc.images_per_class", "label.bn_mode=running"]
    )
    raise ConfigError(
        f"label.batch_size={label.batch_size} leaves a last batch of {count % label.batch_size} of {count} images"
        f"{' that measure a prior' * measures_prior}, too few for batch statistics: {', or '.join(ways)}"
    )
