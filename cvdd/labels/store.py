"""The store of soft labels: as large as was known before, interrupted without loss, read without loading."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvdd.artifact import DamagedArtifact, write_atomically
from cvdd.artifact.files import reserve
from cvdd.labels.pool import LabelPool
from cvdd.labels.replay import Replay, draw_epoch, record_type
from cvdd.labels.rows import Rest, read_rows, row_type, write_rows
from cvdd.labels.sources import ComputedLabels, epochs_together
from cvdd.schema import LabelConfig
from cvdd.support.config_base import ConfigError

LOGITS = "logits.bin"
PARAMETERS = "parameters.bin"
PROGRESS = "epochs{:05d}.tmp"
SECONDS_BETWEEN_SAVES = 2.0
BYTES_BETWEEN_SAVES = 2**26
SAMPLES_OF_A_BLOCK = 4096
"""Samples that are labelled under one claim, at least: seconds of work, so that claiming it costs nothing."""


@dataclass(frozen=True)
class LabelLayout:
    """Sizes of a label store, known before it is written.

    Attributes:
        pool: which batches are stored.
        classes: length of a logit vector.
        dtype: of the logits.
        top: of them that are kept; None is all (:mod:`cvdd.labels.rows`).
        rest: what stands for the others.
        record: of one sample's view and mix; None if they are not stored.
        together: epochs that are labelled in the same forward passes.
    """

    pool: LabelPool
    classes: int
    dtype: str
    top: int | None
    rest: Rest
    record: np.dtype[Any] | None
    together: int = 1

    @staticmethod
    def of(label: LabelConfig, count: int, classes: int) -> LabelLayout:
        """Return the layout of a recipe for so many images and classes."""
        record = record_type(label) if label.parameters == "stored" else None
        pool, together = LabelPool.of(label, count), epochs_together(label, count)
        return LabelLayout(pool, classes, label.dtype, label.top, label.rest, record, together)

    @property
    def blocks(self) -> list[range]:
        """The epochs of which something is stored, in the blocks that processes share.

        Epochs that share forward passes are in one block.
        """
        whole = self.pool.count * self.together
        length, stop = -(-SAMPLES_OF_A_BLOCK // whole) * self.together, self.pool.labelled_epochs
        return [range(first, min(first + length, stop)) for first in range(0, stop, length)]

    @property
    def row(self) -> np.dtype[Any]:
        """One sample's logits on disk."""
        return row_type(self.dtype, self.classes, self.top, self.rest)

    @property
    def logits_row(self) -> int:
        """Bytes of one sample's logits."""
        return self.row.itemsize

    @property
    def parameters_row(self) -> int:
        """Bytes of one sample's view and mix."""
        return 0 if self.record is None else self.record.itemsize

    @property
    def logits_bytes(self) -> int:
        """Size of the logits' file."""
        return self.pool.samples * self.logits_row

    @property
    def parameters_bytes(self) -> int:
        """Size of the file of views and mixes."""
        return self.pool.samples * self.parameters_row


def write_labels(folder: Path, computed: ComputedLabels, layout: LabelLayout, advance: Callable[[int], None]) -> None:
    """Compute what is stored and write it; an interrupted call goes on after the last epoch that is on disk.

    Args:
        folder: where the files go.
        computed: the labels.
        layout: their sizes; space for all is reserved before the first is computed.
        advance: called with the number of epochs done since the last call.
    """
    reserve_labels(folder, layout)
    for block in layout.blocks:
        write_epochs(folder, computed, layout, block, advance)


def reserve_labels(folder: Path, layout: LabelLayout) -> None:
    """Reserve the space for all labels, so that a full disk is known before the first is computed."""
    wanted = {LOGITS: layout.logits_bytes} | ({} if layout.record is None else {PARAMETERS: layout.parameters_bytes})
    for name, size in wanted.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            # Whatever is in a file of another size belongs to other labels.
            path.unlink(missing_ok=True)
            reserve(path, size)


def require_reserved(folder: Path, layout: LabelLayout) -> None:
    """Refuse labels whose files were cut while they were half made: what was written before is not known any more.

    Raises:
        DamagedArtifact: says what to delete.
    """
    sizes = {LOGITS: layout.logits_bytes} | ({PARAMETERS: layout.parameters_bytes} if layout.record is not None else {})
    for name, expected in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != expected:
            raise DamagedArtifact(
                f"{folder}: {name} has {found} bytes instead of {expected}, though parts of it were written. Delete "
                "this directory and repeat the command; it will be made again."
            )


def epochs_written(folder: Path, block: range) -> int:
    """Count the epochs of a block that are on disk, from its first."""
    progress = folder / PROGRESS.format(block.start)
    return int(progress.read_text()) if progress.exists() else 0


def write_epochs(
    folder: Path, computed: ComputedLabels, layout: LabelLayout, block: range, advance: Callable[[int], None]
) -> None:
    """Compute a block of epochs and write it at its place; an interrupted call goes on after what is on disk.

    Several processes may write different blocks of the same files at once.

    Args:
        folder: where the files are; their space is reserved.
        computed: the labels.
        layout: their sizes.
        block: the epochs.
        advance: called with the number of epochs done since the last call.

    Raises:
        DamagedArtifact: the files are not those whose space was reserved.
    """
    require_reserved(folder, layout)
    done = epochs_written(folder, block)
    advance(done)
    first = block.start + done
    pending: list[tuple[bytes, bytes]] = []
    held, saved = 0, time.monotonic()
    progress = folder / PROGRESS.format(block.start)
    with ThreadPoolExecutor(1) as writer:
        # The disk writes what was computed while more is computed, and one write waits for the one before.
        writing: Future[None] | None = None

        def save(start: int, epochs: Sequence[tuple[bytes, bytes]]) -> None:
            offset = start * layout.pool.count
            logits, parameters = (b"".join(parts) for parts in zip(*epochs, strict=True))
            _write(folder / LOGITS, offset * layout.logits_row, logits)
            if parameters:
                _write(folder / PARAMETERS, offset * layout.parameters_row, parameters)
            write_atomically(progress, str(start + len(epochs) - block.start).encode())

        for epoch in range(first, block.stop):
            plan, logits = computed.epoch(epoch)
            parameters = b"" if layout.record is None else plan.record().tobytes()
            pending.append((write_rows(logits, layout.top, layout.rest), parameters))
            held += len(pending[-1][0])
            advance(1)
            due = time.monotonic() - saved > SECONDS_BETWEEN_SAVES or held > BYTES_BETWEEN_SAVES
            if due or epoch + 1 == block.stop:
                if writing is not None:
                    writing.result()
                writing = writer.submit(save, first, pending)
                first, pending, held, saved = epoch + 1, [], 0, time.monotonic()
        if writing is not None:
            writing.result()


def _write(path: Path, offset: int, content: bytes) -> None:
    # O_DSYNC: it is on disk before it is noted as done. And a client of NFS sends exactly these bytes, where it would
    # otherwise send whole pages, with what another machine's neighbouring epoch had in them before.
    descriptor = os.open(path, os.O_WRONLY | os.O_DSYNC)
    try:
        rest = memoryview(content)
        while rest:
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written
    finally:
        os.close(descriptor)


class StoredLabels:
    """Labels read from a store; logits and parameters are memory-mapped.

    Of a store that holds all label batches an epoch shows its own, or batches that are drawn in rounds; of a pruned
    one, batches that are drawn with replacement.

    Args:
        folder: of a sealed label artefact.
        layout: its sizes.
        label: the recipe that it was made with.
        size: side of the images, to redraw parameters that are not stored.
        seed: of the labels, for the same and for the draws from a pool.
        in_rounds: whether each label batch is shown once before any is again, in as many epochs as one likes.

    Raises:
        ConfigError: a file does not have the size that the layout says.
    """

    def __init__(
        self,
        folder: Path,
        layout: LabelLayout,
        label: LabelConfig,
        size: int,
        seed: int,
        in_rounds: bool = False,
    ) -> None:
        self._in_rounds, self._draws = in_rounds, in_rounds or label.keep < 1
        self._drawn_again: dict[int, np.ndarray] = {}
        self.pool, self.label, self.size, self.seed = layout.pool, label, size, seed
        self.batch_size, self.count, self.epochs = label.batch_size, layout.pool.shown, label.epochs
        sizes = {LOGITS: layout.logits_bytes, PARAMETERS: layout.parameters_bytes}
        for name, expected in sizes.items():
            found = (folder / name).stat().st_size if (folder / name).exists() else 0
            if found != expected:
                raise ConfigError(f"{folder / name} has {found} bytes instead of {expected}: the labels are damaged")
        samples = layout.pool.samples
        self._classes, row = layout.classes, layout.row
        # A row of all logits becomes an axis of the array.
        self._logits = np.memmap(folder / LOGITS, row, "r", shape=(samples,))
        self._records = (
            None if layout.record is None else np.memmap(folder / PARAMETERS, layout.record, "r", shape=(samples,))
        )

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        """Read one epoch."""
        if self._in_rounds:
            return self._drawn(self.pool.draw_in_rounds(self.seed, epoch))
        if self.pool.keep < 1:
            return self._drawn(self.pool.draw(self.seed, epoch))
        first = epoch * self.count
        return self._plan(first, first + self.count), self._read(first, first + self.count)

    def _drawn(self, batches: Sequence[int]) -> tuple[Replay, Tensor]:
        places = [self.pool.samples_of(batch) for batch in batches]
        plans = [self._plan(*place) for place in places]
        return Replay.cat(plans), torch.cat([self._read(*place) for place in places])

    def _read(self, start: int, stop: int) -> Tensor:
        return read_rows(self._logits[start:stop], self._classes)

    def _plan(self, start: int, stop: int) -> Replay:
        """Views and mixes of stored samples of one epoch, which are whole batches."""
        epoch, first = divmod(start, self.pool.count)
        if self._records is None:
            record = self._redrawn(epoch)[first : first + stop - start]
        else:
            record = np.asarray(self._records[start:stop])
        plan = Replay.from_record(record, self.label.factor)
        # Partners are counted from the first sample of the epoch.
        return replace(plan, partner=plan.partner - first)

    def _redrawn(self, epoch: int) -> np.ndarray:
        if epoch not in self._drawn_again:
            if not self._draws:
                # Epochs come one after the other; drawn batches are of any.
                self._drawn_again.clear()
            # As small as on disk.
            self._drawn_again[epoch] = draw_epoch(self.label, self.pool.count, self.size, self.seed, epoch).record()
        return self._drawn_again[epoch]
