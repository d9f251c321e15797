"""What a student sees: the crops, flips and mixes of every epoch, drawn from a seed and replayed anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from cvdd.augment import Mix, Views, apply_views, draw_mix, draw_views, normalise
from cvdd.schema import LabelConfig
from cvdd.seeds import generator

RECORD = np.dtype(
    [
        ("index", "<i4"),
        ("box", "<i2", (4,)),
        ("flip", "?"),
        ("partner", "<i4"),
        ("mix_box", "<i2", (4,)),
        ("weight", "<f4"),
    ]
)
"""One sample of one epoch on disk."""


@dataclass(frozen=True)
class Replay:
    """Everything that turns stored images into the samples that were labelled.

    Attributes:
        index: [n] which image.
        box: [n, 4] crop: top, left, height, width in pixels.
        flip: [n] bool.
        partner: [n] position, within these n samples, of the sample that it is mixed with.
        mix_box: [n, 4] CutMix region: top, left, bottom, right.
        weight: [n] share of the sample itself in a Mixup; 1 with CutMix.
    """

    index: Tensor
    box: Tensor
    flip: Tensor
    partner: Tensor
    mix_box: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, start: int, stop: int) -> Replay:
        """Cut out whole batches; partners are counted from ``start``."""
        part = {field.name: getattr(self, field.name)[start:stop] for field in fields(self)}
        part["partner"] = part["partner"] - start
        return Replay(**part)

    def to(self, device: torch.device) -> Replay:
        """Copy to a device."""
        return Replay(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def record(self) -> np.ndarray:
        """Pack into an array of :data:`RECORD`."""
        record = np.empty(len(self), RECORD)
        for field in fields(self):
            record[field.name] = getattr(self, field.name).numpy()
        return record

    @staticmethod
    def from_record(record: np.ndarray) -> Replay:
        """Unpack an array of :data:`RECORD`."""
        return Replay(
            index=torch.from_numpy(record["index"].astype(np.int64)),
            box=torch.from_numpy(record["box"].astype(np.int64)),
            flip=torch.from_numpy(record["flip"].copy()),
            partner=torch.from_numpy(record["partner"].astype(np.int64)),
            mix_box=torch.from_numpy(record["mix_box"].astype(np.int64)),
            weight=torch.from_numpy(record["weight"].copy()),
        )


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """First and last-plus-one sample of each batch of an epoch; the last batch may be smaller."""
    return [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def draw_epoch(label: LabelConfig, count: int, size: int, seed: int, epoch: int) -> Replay:
    """Draw the order, views and mixes of one epoch; they depend on (seed, epoch) alone.

    Args:
        label: crop range, flip, mix and batch size.
        count: number of images.
        size: side of the images in pixels.
        seed: of the labels.
        epoch: which epoch.
    """
    source = generator(seed, "relabel", epoch)
    order = torch.randperm(count, generator=source)
    views = draw_views(count, size, size, label.crop_scale, label.flip, 0, source)
    mixes = [
        (start, stop, draw_mix(label.mix, label.mix_alpha, stop - start, size, source))
        for start, stop in batch_bounds(count, label.batch_size)
    ]
    return join(order, views, mixes)


def join(order: Tensor, views: Views, mixes: Sequence[tuple[int, int, Mix]]) -> Replay:
    """Build a replay from the order and views of its samples and the mix of each of its batches."""
    return Replay(
        index=order,
        box=views.boxes,
        flip=views.flips,
        partner=torch.cat([mix.permutation + start for start, _, mix in mixes]),
        mix_box=torch.cat([torch.tensor(mix.box).repeat(stop - start, 1) for start, stop, mix in mixes]),
        weight=torch.cat([torch.full((stop - start,), mix.weight) for start, stop, mix in mixes]),
    )


def replay(
    images: Tensor, replay: Replay, mean: Sequence[float], std: Sequence[float], rounding: bool = False
) -> Tensor:
    """Show images as they were labelled.

    Args:
        images: [images, 3, size, size] uint8, the whole distilled set, on any device.
        replay: n samples, on the same device.
        mean: of the normalisation.
        std: of the normalisation.
        rounding: round crops to 8 bits as the published programs do, which resize with PIL.

    Returns:
        [n, 3, size, size] normalised float32, mixed.
    """
    size = images.shape[-1]
    shifts = torch.zeros(len(replay), 2, dtype=torch.long, device=images.device)
    views = Views(replay.box, replay.flip, shifts)
    own = normalise(apply_views(images[replay.index].float(), views, size, rounding), mean, std)
    partner = own[replay.partner]
    place = torch.arange(size, device=images.device)
    top, left, bottom, right = replay.mix_box.unbind(dim=1)
    rows = (place >= top[:, None]) & (place < bottom[:, None])
    columns = (place >= left[:, None]) & (place < right[:, None])
    pasted = (rows[:, :, None] & columns[:, None, :])[:, None]
    weight = replay.weight[:, None, None, None]
    blended = torch.where(weight == 1, own, weight * own + (1 - weight) * partner)
    return torch.where(pasted, partner, blended)
