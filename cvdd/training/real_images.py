"""Real images that networks are trained on: in memory, or in files that are read batch by batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cvdd.augmentation.augment import normalise
from cvdd.computing.passes import Passes
from cvdd.data import Data, resize_and_crop
from cvdd.training.classifier import Classifier


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


class RealImagesModule(Classifier):
    """What trainings on real images share: where the images are, and how a network is shown them.

    Args:
        pixels: [n, 3, size, size] uint8 training images, or None if batches bring their own.
        mean: of the normalisation.
        std: of the normalisation.
        size: side of the network's input.
        passes: how the network computes.
        shared: arguments of :class:`cvdd.training.classifier.Classifier`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pixels: Tensor | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: int,
        passes: Passes | None,
        **shared: object,
    ) -> None:
        super().__init__(**shared)  # type: ignore[arg-type]
        self.size = size
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self._pixels = pixels
        self._passes = passes or Passes()
        self._compiled = self._passes.compiled(self.network)

    def on_fit_start(self) -> None:
        """Bring the images to the device, and the network into the form in which it computes there."""
        self._passes.prepare(self.network, self.device)
        if self._pixels is not None:
            self._pixels = self._pixels.to(self.device)

    def shown(self, images: Tensor) -> Tensor:
        """Return augmented images [n, 3, size, size], 0..255, as the network takes them."""
        return self._passes.laid_out(normalise(images, self.mean, self.std))
