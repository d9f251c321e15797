"""How fast labels reach the disk, next to a plain stream of as many bytes: ``python -m benchmarks.disk --help``.

The labels cost nothing here, so that the disk is the limit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks import settings
from benchmarks.timing import alternate, ratio, ratios, timed
from cvdd.labels.replay import Replay, draw_epoch
from cvdd.labels.sources import ComputedLabels
from cvdd.labels.store import LabelLayout, write_labels
from cvdd.support.allocator import keep_freed_memory

CPU = torch.device("cpu")
STREAMED_AT_ONCE = 2**24
"""Bytes of one write of the plain stream."""


@dataclass
class _Known:
    """Labels that are there already, the same in every epoch."""

    plan: Replay
    logits: Tensor

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        return self.plan, self.logits


def stream(path: Path, size: int) -> None:
    """Write so many bytes, and wait until they are on the disk."""
    block = memoryview(os.urandom(STREAMED_AT_ONCE))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.posix_fallocate(descriptor, 0, size)
        rest = size
        while rest:
            rest -= os.write(descriptor, block[: min(rest, len(block))])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> None:
    """Compare, and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="of an epoch, each with 1,000 classes")
    parser.add_argument("--epochs", type=int, default=200, help="of labels")
    parser.add_argument("--repetitions", type=int, default=5, help="of each side")
    parser.add_argument("--folder", type=Path, help="on the disk that is meant, rather than that of temporary files")
    wanted = parser.parse_args()
    label = settings.configuration("imagenet").label.model_copy(update={"epochs": wanted.epochs})
    plan = draw_epoch(label, wanted.images, 224, 0, 0)
    logits = torch.randn(wanted.images, 1000, generator=torch.Generator().manual_seed(0)).half()
    layout = LabelLayout.of(label, wanted.images, 1000)
    size = layout.logits_bytes + layout.parameters_bytes
    keep_freed_memory()
    # Of what computes labels the store asks nothing but epochs.
    known = cast(ComputedLabels, _Known(plan, logits))
    with tempfile.TemporaryDirectory(dir=wanted.folder) as name:
        folder = Path(name)

        writes = timed(lambda: write_labels(folder, known, layout, lambda epochs: None), CPU)

        def stored() -> float:
            for file in folder.iterdir():
                file.unlink()
            return writes()

        streamed = timed(lambda: stream(folder / "stream", size), CPU)
        plain, store = alternate(streamed, stored, wanted.repetitions)
    low, high = (extreme(ratios(plain, store)) for extreme in (min, max))
    rates = [
        f"{side} {size / samples.median / 1e6:.0f} MB/s" for side, samples in (("stream", plain), ("store", store))
    ]
    print(f"{size / 1e6:.0f} MB, medians of {wanted.repetitions}: {', '.join(rates)}")
    print(f"the store reaches {ratio(plain, store):.2f} ({low:.2f} to {high:.2f}) of the stream")


if __name__ == "__main__":
    main()
