"""What a student sees: the crops, flips and mixes of every epoch, drawn from a seed and replayed anywhere."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvdd.augmentation.augment import (
    Mix,
    Views,
    apply_views,
    cut_cells,
    draw_mix,
    draw_swaps,
    draw_views,
    in_cells,
    normalise,
    swap_halves,
)
from cvdd.augmentation.dsa import EACH, augment_each, draw_each
from cvdd.augmentation.randaugment import apply_operations, draw_operations
from cvdd.schema import LabelConfig
from cvdd.support.seeds import generator

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
MORE: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType(
    {"swap": ("?", (2,)), "operations": ("i1", (2,)), "dsa": ("<f4", (EACH,))}
)
"""What recipes draw beside, by the attribute of :class:`Replay`, in this order."""


def record_type(label: LabelConfig) -> np.dtype[Any]:
    """Return the type of one sample on disk: :data:`RECORD`, and what else the recipe draws."""
    drawn = {"swap": label.shuffle > 1, "operations": label.randaugment, "dsa": label.dsa}
    return _record_type([name for name, is_drawn in drawn.items() if is_drawn])


def _record_type(more: Collection[str]) -> np.dtype[Any]:
    return np.dtype([*RECORD.descr, *((name, *kind) for name, kind in MORE.items() if name in more)])


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
        swap: [n, 2] bool, whether the halves change places, top with bottom and left with right; None if none do.
        operations: [n, 2] of RandAugment, one after the other (:mod:`cvdd.augmentation.randaugment`); None without.
        dsa: [n, 8] of DSA, after crop and flip (:func:`cvdd.augmentation.dsa.draw_each`); None without.
        factor: cells on a side of each image, of which a crop shows a part of one.
    """

    index: Tensor
    box: Tensor
    flip: Tensor
    partner: Tensor
    mix_box: Tensor
    weight: Tensor
    swap: Tensor | None = None
    operations: Tensor | None = None
    dsa: Tensor | None = None
    factor: int = 1

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, start: int, stop: int) -> Replay:
        """Cut out whole batches; partners are counted from ``start``."""
        part = self._each(lambda values: values[start:stop])
        return replace(part, partner=part.partner - start)

    @staticmethod
    def cat(parts: Sequence[Replay]) -> Replay:
        """Join whole batches that were drawn alike, one after the other."""
        starts = np.cumsum([0, *(len(part) for part in parts)]).tolist()
        shifted = [replace(part, partner=part.partner + start) for part, start in zip(parts, starts, strict=False)]
        drawn = [part.drawn() for part in shifted]
        joined = {name: torch.cat([each[name] for each in drawn]) for name in drawn[0]}
        return Replay(**joined, factor=parts[0].factor)

    def to(self, device: torch.device) -> Replay:
        """Copy to a device."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Replay:
        changed = {name: change(values) for name, values in self.drawn().items()}
        return Replay(**changed, factor=self.factor)

    def drawn(self) -> dict[str, Tensor]:
        """What was drawn, by the names of the attributes."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: values for name, values in named.items() if isinstance(values, Tensor)}

    def own_share(self, size: int) -> Tensor:
        """Share of each image [size, size] that is the sample's own after the mix: [n]."""
        top, left, bottom, right = self.mix_box.unbind(dim=1)
        return self.weight * (1 - (bottom - top) * (right - left) / size**2)

    def record(self) -> np.ndarray:
        """Pack into an array of :data:`RECORD`, longer by what else was drawn."""
        drawn = self.drawn()
        record = np.empty(len(self), _record_type(drawn.keys()))
        for name, values in drawn.items():
            record[name] = values.numpy()
        return record

    @staticmethod
    def from_record(record: np.ndarray, factor: int) -> Replay:
        """Unpack what :meth:`record` packed; ``factor`` is the recipe's, and the same of all that it drew."""
        names = record.dtype.names or ()
        return Replay(
            index=torch.from_numpy(record["index"].astype(np.int64)),
            box=torch.from_numpy(record["box"].astype(np.int64)),
            flip=torch.from_numpy(record["flip"].copy()),
            partner=torch.from_numpy(record["partner"].astype(np.int64)),
            mix_box=torch.from_numpy(record["mix_box"].astype(np.int64)),
            weight=torch.from_numpy(record["weight"].copy()),
            swap=torch.from_numpy(record["swap"].copy()) if "swap" in names else None,
            operations=torch.from_numpy(record["operations"].astype(np.int64)) if "operations" in names else None,
            dsa=torch.from_numpy(record["dsa"].copy()) if "dsa" in names else None,
            factor=factor,
        )


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """First and last-plus-one sample of each batch of an epoch; the last batch may be smaller."""
    return [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


def draw_epoch(label: LabelConfig, count: int, size: int, seed: int, epoch: int) -> Replay:
    """Draw the order, views and mixes of one epoch; they depend on (seed, epoch) alone.

    Args:
        label: crop range, flip, mix, batch size, cells, and whether halves are shuffled, RandAugment and DSA are on.
        count: number of images.
        size: side of the images in pixels.
        seed: of the labels.
        epoch: which epoch.
    """
    source = generator(seed, "relabel", epoch)
    order = torch.randperm(count, generator=source)
    side = size // label.factor
    views = draw_views(count, side, side, label.crop_scale, label.flip, 0, source)
    batches = batch_bounds(count, label.batch_size)
    mixes = [(start, stop, draw_mix(label.mix, label.mix_alpha, stop - start, size, source)) for start, stop in batches]
    # From generators of their own, so that they change nothing else.
    if label.factor > 1:
        views = in_cells(views, label.factor, side, generator(seed, "cells", epoch))
    swap = draw_swaps(count, generator(seed, "shuffle", epoch)) if label.shuffle > 1 else None
    operations = draw_operations(count, generator(seed, "randaugment", epoch)) if label.randaugment else None
    dsa = draw_each(batches, size, generator(seed, "dsa", epoch)) if label.dsa else None
    return replace(join(order, views, mixes), swap=swap, operations=operations, dsa=dsa, factor=label.factor)


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
    images: Tensor,
    replay: Replay,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    rounding: bool = False,
) -> Tensor:
    """Show images as they were labelled: RandAugment, shuffle, crop and flip, DSA, then the mix.

    RandAugment changes the cell that is seen as if it were an image: what is moved brings in black, and no neighbour.

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
    shown = images[replay.index]
    if replay.operations is not None:
        if replay.factor > 1:
            shown, views = cut_cells(shown, views, replay.factor)
        shown = apply_operations(shown, replay.operations)
    if replay.swap is not None:
        shown = swap_halves(shown, replay.swap)
    own = normalise(apply_views(shown.float(), views, size, rounding), mean, std)
    if replay.dsa is not None:
        own = augment_each(own, replay.dsa)
    partner = own[replay.partner]
    place = torch.arange(size, device=images.device)
    top, left, bottom, right = replay.mix_box.unbind(dim=1)
    rows = (place >= top[:, None]) & (place < bottom[:, None])
    columns = (place >= left[:, None]) & (place < right[:, None])
    pasted = (rows[:, :, None] & columns[:, None, :])[:, None]
    weight = replay.weight[:, None, None, None]
    blended = torch.where(weight == 1, own, weight * own + (1 - weight) * partner)
    return torch.where(pasted, partner, blended)
