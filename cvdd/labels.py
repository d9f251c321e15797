"""Soft labels: teachers that score replayed samples, and the store that keeps what they said."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cvdd.artifact import write_atomically
from cvdd.bn import BatchStatisticsNetwork
from cvdd.config_base import ConfigError
from cvdd.replay import RECORD, Replay, batch_bounds, draw_epoch, replay
from cvdd.schema import LabelConfig

LOGITS = "logits.bin"
PARAMETERS = "parameters.bin"
PROGRESS = "progress.tmp"
SECONDS_BETWEEN_SAVES = 2.0


class Teachers:
    """The networks that label, averaged.

    Args:
        networks: trained networks.
        weights: their shares of the averaged logits.
        label: BatchNorm mode, halves and dropout.
    """

    def __init__(self, networks: Sequence[nn.Module], weights: Sequence[float], label: LabelConfig) -> None:
        self.label = label
        self.weights = list(weights)
        self.networks: list[nn.Module] = []
        for network in networks:
            frozen = network.eval().requires_grad_(False)
            self.networks.append(BatchStatisticsNetwork(frozen, label.dropout) if label.bn_mode == "batch" else frozen)

    def to(self, device: torch.device) -> Teachers:
        """Move the networks to a device."""
        for network in self.networks:
            network.to(device)
        return self

    @torch.no_grad()
    def score(self, samples: Tensor, batch_size: int) -> Tensor:
        """Return averaged logits [n, classes] of ``n // batch_size`` whole batches [n, 3, h, w].

        With batch statistics each batch, or each half of it (the first of ``batch_size // 2`` samples), is normalised
        by itself, however many batches share the forward pass.
        """
        total = None
        for network, weight in zip(self.networks, self.weights, strict=True):
            logits = weight * self._logits(network, samples, batch_size)
            total = logits if total is None else total + logits
        assert total is not None
        return total

    def _logits(self, network: nn.Module, samples: Tensor, batch_size: int) -> Tensor:
        if self.label.bn_mode == "running":
            logits: Tensor = network(samples)
            return logits
        first = batch_size // 2
        if not self.label.halves:
            return network(samples, batch_size)  # type: ignore[no-any-return]
        if 2 * first == batch_size:
            return network(samples, first)  # type: ignore[no-any-return]
        batches = samples.view(-1, batch_size, *samples.shape[1:])
        parts = [batches[:, :first], batches[:, first:]]
        scored = [network(part.flatten(0, 1), part.shape[1]).view(len(batches), part.shape[1], -1) for part in parts]
        return torch.cat(scored, dim=1).flatten(0, 1)


class SoftLabels(Protocol):
    """Labels of a distilled set, epoch by epoch, from a file or computed when asked."""

    @property
    def batch_size(self) -> int:
        """Images per full batch."""
        ...

    @property
    def count(self) -> int:
        """Images in the distilled set."""
        ...

    @property
    def epochs(self) -> int:
        """Labelled epochs."""
        ...

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        """Return the replay of all samples of an epoch and their logits [count, classes]."""
        ...


@dataclass
class ComputedLabels:
    """Labels that are computed on the fly, the same bits as the stored ones.

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


def check_batches(count: int, label: LabelConfig) -> None:
    """Refuse a batch of a single image where statistics are those of the batch.

    Raises:
        ConfigError: names batch sizes that work.
    """
    smallest = 4 if label.halves else 2
    if label.bn_mode != "batch" or count % label.batch_size == 0 or count % label.batch_size >= smallest:
        return
    sizes = [size for size in range(4, 65) if count % size == 0 or count % size >= smallest]
    raise ConfigError(
        f"label.batch_size={label.batch_size} leaves a last batch of {count % label.batch_size} of {count} images, too "
        f"few for batch statistics. Choose one of {', '.join(map(str, sizes[:12]))}, or label.bn_mode=running."
    )


@dataclass(frozen=True)
class LabelLayout:
    """Sizes of a label store, known before it is written.

    Attributes:
        epochs: labelled epochs.
        count: images.
        classes: length of a logit vector.
        dtype: of the logits.
        parameters: whether views and mixes are stored.
    """

    epochs: int
    count: int
    classes: int
    dtype: str
    parameters: bool

    @property
    def logits_bytes(self) -> int:
        """Size of the logits' file."""
        return self.epochs * self.count * self.classes * np.dtype(self.dtype).itemsize

    @property
    def parameters_bytes(self) -> int:
        """Size of the file of views and mixes."""
        return self.epochs * self.count * RECORD.itemsize if self.parameters else 0


def write_labels(folder: Path, computed: ComputedLabels, layout: LabelLayout, advance: Callable[[int], None]) -> None:
    """Compute all epochs and write them; an interrupted call goes on after the last epoch that is on disk.

    Args:
        folder: where the files go.
        computed: the labels.
        layout: their sizes; space for all is reserved before the first is computed.
        advance: called with the number of epochs done since the last call.
    """
    _reserve(folder / LOGITS, layout.logits_bytes)
    if layout.parameters:
        _reserve(folder / PARAMETERS, layout.parameters_bytes)
    progress = folder / PROGRESS
    done = int(progress.read_text()) if progress.exists() else 0
    advance(done)
    with contextlib.ExitStack() as files:
        logits_file = files.enter_context((folder / LOGITS).open("r+b"))
        parameters_file = files.enter_context((folder / PARAMETERS).open("r+b")) if layout.parameters else None
        saved = time.monotonic()
        for epoch in range(done, layout.epochs):
            plan, logits = computed.epoch(epoch)
            _write(logits_file, epoch * layout.logits_bytes // layout.epochs, logits.numpy().tobytes())
            if parameters_file is not None:
                _write(parameters_file, epoch * layout.parameters_bytes // layout.epochs, plan.record().tobytes())
            advance(1)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                for file in (logits_file, parameters_file):
                    if file is not None:
                        file.flush()
                        os.fsync(file.fileno())
                write_atomically(progress, str(epoch + 1).encode())
                saved = time.monotonic()


def _reserve(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size == size:
        return
    with path.open("wb") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.truncate(stream.fileno(), size)


def _write(stream: BinaryIO, offset: int, content: bytes) -> None:
    stream.seek(offset)
    stream.write(content)


class StoredLabels:
    """Labels read from a store; logits and parameters are memory-mapped.

    Args:
        folder: of a sealed label artefact.
        layout: its sizes.
        label: the recipe that it was made with.
        size: side of the images, to redraw parameters that are not stored.
        seed: of the labels, for the same.

    Raises:
        ConfigError: a file does not have the size that the layout says.
    """

    def __init__(self, folder: Path, layout: LabelLayout, label: LabelConfig, size: int, seed: int) -> None:
        self.layout, self.label, self.size, self.seed = layout, label, size, seed
        self.batch_size, self.count, self.epochs = label.batch_size, layout.count, layout.epochs
        sizes = {LOGITS: layout.logits_bytes, PARAMETERS: layout.parameters_bytes}
        for name, expected in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found != expected:
                raise ConfigError(f"{folder / name} has {found} bytes instead of {expected}: the labels are damaged")
        shape = (layout.epochs, layout.count, layout.classes)
        self._logits = np.memmap(folder / LOGITS, layout.dtype, "r", shape=shape)
        self._records = np.memmap(folder / PARAMETERS, RECORD, "r", shape=shape[:2]) if layout.parameters else None

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        """Read one epoch."""
        if self._records is None:
            plan = draw_epoch(self.label, self.count, self.size, self.seed, epoch)
        else:
            plan = Replay.from_record(np.asarray(self._records[epoch]))
        return plan, torch.from_numpy(np.array(self._logits[epoch]))


@dataclass(frozen=True)
class LabelledBatch:
    """One batch for a student.

    Attributes:
        replay: how to show the images.
        logits: [n, classes] of the teachers.
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
    """

    def __init__(self, labels: SoftLabels) -> None:
        self.labels = labels
        self.bounds = batch_bounds(labels.count, labels.batch_size)
        self._last: tuple[int, Replay, Tensor] | None = None

    def __len__(self) -> int:
        return self.labels.epochs * len(self.bounds)

    def __getitem__(self, index: int) -> LabelledBatch:
        epoch, batch = divmod(index, len(self.bounds))
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, *self.labels.epoch(epoch))
        start, stop = self.bounds[batch]
        return LabelledBatch(self._last[1].batch(start, stop), self._last[2][start:stop])
