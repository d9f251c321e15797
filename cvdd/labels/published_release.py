"""Reading the distilled images and soft labels that the published CV-DD programs write.

Images are ``new###/class###_id###.jpg``; labels are one file for each batch, ``epoch_#/batch_#.tar``, with the crops,
flips and CutMix of its samples and the teachers' logits. Which images a batch shows is not stored: it follows from a
seed. The records are pickles; they are read without running any code in them.
"""

from __future__ import annotations

import _codecs
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from cvdd.augmentation.augment import Mix, Views
from cvdd.data import decode
from cvdd.labels.replay import Replay, batch_bounds, join
from cvdd.support.config_base import ConfigError
from cvdd.support.unpickling import load_without_code

PUBLISHED_SEED = 42
"""Seed of the order of the samples in every published script."""

# CutMix boxes are numpy integers. NumPy 1 wrote the constructor under another name.
_SCALARS: list[Any] = [
    multiarray.scalar,
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("int32", "int64", "float32", "float64")),
    _codecs.encode,
]


def read_published_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Read distilled images: [n, 3, size, size] uint8 and labels [n], in the order that the label records refer to.

    Args:
        folder: holds one sub-folder for each class; sorted by name, as are the files in them.

    Raises:
        ConfigError: there are no images, or they are not square and of one size.
        ValueError: a file is damaged; the message names it.
    """
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    files = [(file, label) for label, name in enumerate(classes) for file in sorted(name.glob("*.jpg"))]
    if not files:
        raise ConfigError(f"{folder}: no images found; expected new###/class###_id###.jpg")
    images = [decode(file) for file, _ in files]
    for (file, _), image in zip(files, images, strict=True):
        if image.shape != images[0].shape or image.shape[1] != image.shape[2]:
            raise ConfigError(f"{file}: {list(image.shape[1:])} pixels; all images must be square and of one size")
    return torch.stack(images), torch.tensor([label for _, label in files])


def read_record(path: Path, size: int) -> tuple[Views, Mix, Tensor]:
    """Read the record of one batch.

    Args:
        path: a ``batch_#.tar`` of the release.
        size: side of the images in pixels; records hold fractions of it.

    Returns:
        the views of the n samples, their CutMix and the logits [n, classes].

    Raises:
        ConfigError: the file is missing or damaged, holds anything but numbers, or is not such a record.
    """
    boxes, flips, permutation, region, logits = _read(path)
    pixels = boxes.double() * size
    region = tuple(int(edge) for edge in region)
    whole = pixels.round().long()
    top, left, height, width = whole.unbind(dim=1)
    inside = (top >= 0) & (left >= 0) & (height > 0) & (width > 0) & (top + height <= size) & (left + width <= size)
    if (pixels - whole).abs().max() > 0.01 or not inside.all() or min(region) < 0 or max(region) > size:
        raise ConfigError(f"{path}: its crops are not whole pixels of images of {size}x{size}; it is for other images")
    views = Views(whole, flips, torch.zeros(len(boxes), 2, dtype=torch.long))
    return views, Mix(permutation.long(), region, 1.0), logits


def _read(path: Path) -> tuple[Tensor, Tensor, Tensor, Any, Tensor]:
    content = load_without_code(path, ", or holds other things than numbers, which are refused", _SCALARS)
    if not isinstance(content, list) or len(content) != 6:
        raise ConfigError(f"{path}: not a label record, which is a list of six entries")
    boxes, flips, permutation, _, region, logits = content
    if region is None:
        raise ConfigError(f"{path}: the batch has no CutMix region; only records of CutMix are read")
    _check(path, boxes, flips, permutation, region, logits)
    return boxes, flips, permutation, region, logits


def _check(path: Path, boxes: Any, flips: Any, permutation: Any, region: Any, logits: Any) -> None:
    tensors = (boxes, flips, permutation, logits)
    if not all(isinstance(value, Tensor) for value in tensors) or not isinstance(region, list) or len(region) != 4:
        raise ConfigError(f"{path}: not a label record: boxes, flips, permutation, lambda, region and logits")
    n = len(boxes)
    fits = boxes.shape == (n, 4) and flips.shape == permutation.shape == (n,) and logits.ndim == 2 and len(logits) == n
    if not fits or n == 0 or flips.dtype != torch.bool:
        shapes = ", ".join(str(list(value.shape)) for value in tensors)
        raise ConfigError(f"{path}: boxes, flips, permutation and logits do not belong together: {shapes}")
    if permutation.sort().values.tolist() != list(range(n)):
        raise ConfigError(f"{path}: its permutation is not one of {n} samples")
    if not bool(logits.isfinite().all()):
        raise ConfigError(f"{path}: its logits are not finite")


def published_order(count: int, epochs: int, seed: int = PUBLISHED_SEED) -> list[Tensor]:
    """Return which image each sample of each epoch shows, as the published programs draw it.

    They share one generator between epochs, and PyTorch's sampler draws a second permutation after each epoch, for the
    samples that a longer epoch would need.
    """
    source = torch.Generator().manual_seed(seed)
    order = []
    for _ in range(epochs):
        order.append(torch.randperm(count, generator=source))
        torch.randperm(count, generator=source)
    return order


def size_of_records(folder: Path) -> tuple[int, int]:
    """Return how many epochs label records are of, and the samples of a full batch.

    Args:
        folder: holds the ``epoch_#`` folders.

    Raises:
        ConfigError: there are no records, an epoch is missing, or the first record is none.
    """
    epochs = len(list(folder.glob("epoch_*")))
    if epochs == 0:
        raise ConfigError(f"{folder}: no label records found; expected epoch_#/batch_#.tar")
    missing = [epoch for epoch in range(epochs) if not (folder / f"epoch_{epoch}").is_dir()]
    if missing:
        raise ConfigError(f"{folder}: epoch_{missing[0]} of {epochs} epochs is missing; copy the whole folder again")
    return epochs, len(_read(_record(folder, 0, 0))[-1])


def _record(folder: Path, epoch: int, batch: int) -> Path:
    return folder / f"epoch_{epoch}" / f"batch_{batch}.tar"


class PublishedLabels:
    """Soft labels of the release, to train a student on (a :class:`cvdd.labels.sources.SoftLabels`).

    Args:
        folder: holds the ``epoch_#`` folders.
        count: number of distilled images.
        size: their side in pixels.
        seed: of the order of the samples.
        classes: that they must have; None for any number.

    Raises:
        ConfigError: there are no records, an epoch is missing, the number of batches is not that of these images, or
            that of classes another.
    """

    def __init__(
        self, folder: Path, count: int, size: int, seed: int = PUBLISHED_SEED, classes: int | None = None
    ) -> None:
        self.folder, self.size, self.count = folder, size, count
        self.epochs, self.batch_size = size_of_records(folder)
        self.classes = read_record(_record(folder, 0, 0), size)[2].shape[1]
        if classes not in (None, self.classes):
            raise ConfigError(f"{folder}: labels of {self.classes} classes, and the images are of {classes}")
        self._order = published_order(count, self.epochs, seed)
        self._bounds = batch_bounds(count, self.batch_size)
        for epoch in range(self.epochs):
            found = len(list((folder / f"epoch_{epoch}").glob("batch_*.tar")))
            if found != len(self._bounds):
                raise ConfigError(
                    f"{folder}: epoch_{epoch} has {found} batches of {self.batch_size}, and {count} images make "
                    f"{len(self._bounds)}; these labels were made for other images, or were not copied whole"
                )

    def epoch(self, epoch: int) -> tuple[Replay, Tensor]:
        """Read one epoch.

        Raises:
            ConfigError: a record is missing, damaged, or has another number of samples than it must.
        """
        views, mixes, logits = [], [], []
        for batch, (start, stop) in enumerate(self._bounds):
            path = _record(self.folder, epoch, batch)
            view, mix, scores = read_record(path, self.size)
            if scores.shape != (stop - start, self.classes):
                raise ConfigError(
                    f"{path}: {len(scores)} samples of {scores.shape[1]} classes instead of {stop - start} of "
                    f"{self.classes}; it is for other images"
                )
            views.append(view)
            mixes.append((start, stop, mix))
            logits.append(scores)
        return join(self._order[epoch], Views.cat(views), mixes), torch.cat(logits)
