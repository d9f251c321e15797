"""Lightning around one training by SGD with DSA: networks of prediction matching and of trajectory matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cvdd.augmentation.dsa import augment, draw_augmentation
from cvdd.methods.mtt import draw_step, seen
from cvdd.support.seeds import generator
from cvdd.training.classifier import Classifier
from cvdd.training.schedules import optimizer_of
from cvdd.training.surrogate import Augment, Loss

Crop = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""From images, their targets and a source of randomness to crops of the images and the targets of these."""


class Sgd(Protocol):
    """Settings of SGD whose learning rate falls."""

    @property
    def lr(self) -> float:
        """First learning rate."""
        ...

    @property
    def momentum(self) -> float:
        """Of SGD."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of SGD, on all parameters."""
        ...

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        ...


@dataclass(frozen=True)
class SgdRecipe:
    """SGD as trajectory matching uses it.

    Attributes:
        epochs: passes over the images.
        lr: first learning rate.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        drop: divide the rate by 10 just past the middle, with a new optimiser.
        counts_from_zero: whether the middle is that of the last epoch's number, as the release has it for students.
    """

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    drop: bool
    counts_from_zero: bool = False

    @property
    def drop_epoch(self) -> int | None:
        """First epoch (counted from 0) with the lower rate, as released: 27 of 50, 502 of 1001; None for never."""
        return (self.epochs - self.counts_from_zero) // 2 + 2 if self.drop else None

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.lr if self.drop_epoch is None or epoch < self.drop_epoch else self.lr / 10


def dsa(families: Sequence[str]) -> Augment:
    """Return the augmentation that draws one of these families for each batch; with none it changes nothing."""

    def augmented(images: Tensor, source: torch.Generator) -> Tensor:
        return augment(images, draw_augmentation(families, len(images), images.shape[-1], source))

    return augmented


def canvas_crops(size: int, canvas: int, samples: int) -> Crop:
    """Return what cuts so many crops out of each canvas of a batch.

    Args:
        size: side of a crop.
        canvas: side of a canvas in ``size``; 1 for images that are seen whole.
        samples: crops of each canvas.
    """

    def crop(images: Tensor, targets: Tensor, source: torch.Generator) -> tuple[Tensor, Tensor]:
        return seen(images, targets, draw_step(torch.arange(len(images)), (), size, canvas, samples, source), size)

    return crop


class SgdModule(Classifier):
    """Trains a network on images with targets of any kind (specifications of APM, section 3, and MTT, 2.4 and 2.7).

    Args:
        sgd: learning rate and its drop.
        images: [n, 3, side, side] on the device, or None if batches bring their own.
        targets: [n, ...], whatever the loss takes.
        encode: from a batch of images to what the network sees.
        loss: of logits and targets; the targets stay those of the image without augmentation.
        augment: of what the network sees.
        draws: name of the seeds of crops and augmentation.
        crop: cuts what the network sees out of the images; None for images that are seen whole.
        forgets_at: epoch (counted from 0) at which what the optimiser remembers is forgotten; None for never.
        shared: arguments of :class:`cvdd.training.classifier.Classifier`.
    """

    def __init__(
        self,
        sgd: Sgd,
        images: Tensor | None,
        targets: Tensor,
        encode: Callable[[Tensor], Tensor],
        loss: Loss,
        augment: Augment,
        draws: Literal["augment", "dsa"] = "augment",
        crop: Crop | None = None,
        forgets_at: int | None = None,
        **shared: object,
    ) -> None:
        super().__init__(**shared)  # type: ignore[arg-type]
        self.sgd = sgd
        self._images, self._targets = images, targets
        self._encode, self._loss, self._augment, self._crop = encode, loss, augment, crop
        self._draws, self._forgets_at = draws, forgets_at

    def on_fit_start(self) -> None:
        """Bring the images to the device."""
        self._targets = self._targets.to(self.device)
        if self._images is not None:
            self._images = self._images.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Set the epoch's learning rate, and forget the momentum where that is asked for."""
        super().on_train_epoch_start()
        optimizer = optimizer_of(self)
        optimizer.param_groups[0]["lr"] = self.sgd.lr_at(self.current_epoch)
        if self.current_epoch == self._forgets_at:
            optimizer.state.clear()

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Loss of one augmented batch: indices into the images in memory, or (images, targets)."""
        if self._images is not None:
            assert isinstance(batch, Tensor)
            indices = batch.to(self.device)
            images, targets = self._images[indices], self._targets[indices]
        else:
            images, targets = batch
        images = self._encode(images)
        source = generator(self.seed, self._draws, self.current_epoch, batch_index)
        if self._crop is not None:
            images, targets = self._crop(images, targets, source)
        return self._note(self._loss(self.network(self._augment(images, source)), targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD; the learning rate is set at every epoch."""
        sgd = self.sgd
        return torch.optim.SGD(self.network.parameters(), sgd.lr, momentum=sgd.momentum, weight_decay=sgd.weight_decay)
