"""Batches of real images that do not fit memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cvdd.data import Data, resize_and_crop


class RealImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches of real images that do not fit memory, resized and cropped to one size for batched augmentation.

    Args:
        data: the data set.
        side: of the images.
        own: picks from [n] indices those of the images that this rank forwards; of the others only labels are given.
            None picks all.
        shorter_side: before the centre crop, in pixels; None is ``side``.
    """

    def __init__(
        self,
        data: Data,
        side: int,
        own: Callable[[Tensor], Tensor] | None = None,
        shorter_side: int | None = None,
    ) -> None:
        self.data, self.side, self.own, self.shorter_side = data, side, own, shorter_side

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        wanted = index if self.own is None else self.own(index)
        pixels = torch.empty(len(wanted), 3, self.side, self.side, dtype=torch.uint8)
        for row, i in zip(pixels, wanted.tolist(), strict=True):
            row.copy_(resize_and_crop(self.data.train.image(i), self.side, self.shorter_side))
        return pixels, self.data.train.labels[index]


def side_of_files(size: int, *, resized: bool) -> int:
    """Side that images of this size which do not fit memory have before they are cropped, with a resize or without."""
    # A resized crop keeps the detail of a somewhat larger image; every other crop keeps the side.
    return size * 8 // 7 if resized else size
