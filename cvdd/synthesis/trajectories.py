"""Expert trajectories on disk: one array of parameters per expert, [epochs + 1, parameters], memory-mapped.

The published format pickles ten experts into a file of a gigabyte, which must be read whole for two snapshots.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from cvdd.artifact import write_atomically
from cvdd.artifact.files import reserve
from cvdd.support.config_base import ConfigError

LAYOUT = "trajectories.json"


@dataclass(frozen=True)
class TrajectoryLayout:
    """Sizes of a store, known before anything is written.

    Attributes:
        experts: number of arrays.
        snapshots: rows of each: the initialisation and one after every epoch.
        parameters: columns of each.
        dtype: ``float32`` or ``float16``.
    """

    experts: int
    snapshots: int
    parameters: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Size of all arrays."""
        return self.experts * self.snapshots * self.parameters * numpy.dtype(self.dtype).itemsize

    def file(self, folder: Path, expert: int) -> Path:
        """Path of one expert's array."""
        return folder / f"expert{expert:05d}.npy"

    def save(self, folder: Path) -> None:
        """Write it beside the arrays."""
        write_atomically(folder / LAYOUT, (json.dumps(asdict(self)) + "\n").encode())


class TrajectoryWriter:
    """Writes one expert's trajectory, row by row and in any number of sessions.

    The array has its full size from the start, so that a full disk is noticed before any training. Until
    :meth:`finish` its name ends in ``.tmp``; then it is complete.

    Args:
        folder: of the store.
        layout: of the store.
        expert: which one.
    """

    def __init__(self, folder: Path, layout: TrajectoryLayout, expert: int) -> None:
        self._path = layout.file(folder, expert)
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        shape = (layout.snapshots, layout.parameters)
        dtype = numpy.dtype(layout.dtype)
        self._layout = layout
        if not self._temporary.exists():
            # Under a name of its own until it has its size: an array that is too short would be taken for one to go
            # on with.
            new = self._path.with_name(self._path.name + ".new.tmp")
            numpy.lib.format.open_memmap(new, mode="w+", dtype=dtype, shape=shape).flush()
            # A sparse file that cannot be filled ends a process without any message when its pages are written.
            reserve(new, new.stat().st_size)
            new.replace(self._temporary)
        self._rows = numpy.lib.format.open_memmap(self._temporary, mode="r+")

    def write(self, snapshot: int, vector: Tensor) -> None:
        """Copy the parameters [p] after so many epochs, and wait until they are on disk.

        Raises:
            ConfigError: a parameter is beyond the range of float16.
        """
        with numpy.errstate(over="ignore"):
            row = vector.detach().cpu().numpy().astype(self._layout.dtype)
        if not numpy.isfinite(row).all():
            raise ConfigError(
                f"method.mtt.experts.dtype={self._layout.dtype}: a parameter after epoch {snapshot} is beyond its "
                "range; use method.mtt.experts.dtype=float32, or lower method.mtt.experts.lr if that fails as well"
            )
        self._rows[snapshot] = row
        self._rows.flush()

    def finish(self) -> None:
        """Give the array its final name."""
        del self._rows
        self._temporary.replace(self._path)


class Trajectories:
    """Reads slices of stored trajectories.

    Args:
        folder: of the store.

    Raises:
        ConfigError: the store is incomplete, or an array is not what the layout says.
    """

    def __init__(self, folder: Path) -> None:
        remedy = "Delete this directory and repeat the command; the experts will be trained again."
        try:
            self.layout = TrajectoryLayout(**json.loads((folder / LAYOUT).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{folder} holds no trajectories: {LAYOUT} cannot be read ({error}). {remedy}") from error
        self._experts = []
        for expert in range(self.layout.experts):
            path = self.layout.file(folder, expert)
            try:
                rows = numpy.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"{folder} is incomplete: {path.name}, expert {expert + 1} of {self.layout.experts}, cannot be "
                    f"read ({error}). {remedy}"
                ) from error
            expected = (self.layout.snapshots, self.layout.parameters)
            if rows.shape != expected or rows.dtype != numpy.dtype(self.layout.dtype):
                raise ConfigError(
                    f"{path} holds {rows.dtype} {list(rows.shape)} instead of {self.layout.dtype} {list(expected)}. "
                    f"{remedy}"
                )
            self._experts.append(rows)

    def snapshot(self, expert: int, epoch: int) -> Tensor:
        """Parameters [p] float32 of an expert after so many epochs; a copy, nothing else is read.

        Raises:
            ConfigError: there is no such expert or epoch.
        """
        if not (0 <= expert < self.layout.experts and 0 <= epoch < self.layout.snapshots):
            raise ConfigError(
                f"snapshot {epoch} of expert {expert} was asked for; the store has snapshots 0 to "
                f"{self.layout.snapshots - 1} of experts 0 to {self.layout.experts - 1}. Lower method.mtt.start_epochs "
                "or method.mtt.target_epochs, or train longer with method.mtt.experts.epochs"
            )
        return torch.from_numpy(self._experts[expert][epoch].astype(numpy.float32))

    def segment(self, expert: int, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Parameters [p] float32 of an expert after ``start`` epochs, and ``length`` epochs later.

        Raises:
            ConfigError: the segment is longer than what is stored, or the expert did not move in it.
        """
        first, last = self.snapshot(expert, start), self.snapshot(expert, start + length)
        if torch.equal(first, last):
            raise ConfigError(
                f"expert {expert} has the same parameters after epochs {start} and {start + length}, so that its way "
                "cannot be matched; raise method.mtt.experts.lr, or method.mtt.target_epochs, or use "
                "method.mtt.experts.dtype=float32"
            )
        return first, last
