"""Lightning around one training by SGD with DSA: the teachers of prediction matching and the students it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cvdd.classifier import Classifier
from cvdd.dsa import augment, draw_augmentation
from cvdd.schema.apm import SgdConfig
from cvdd.seeds import generator
from cvdd.surrogate import Augment, Loss


def dsa(families: Sequence[str]) -> Augment:
    """Return the augmentation that draws one of these families for each batch; with none it changes nothing."""

    def augmented(images: Tensor, source: torch.Generator) -> Tensor:
        return augment(images, draw_augmentation(families, len(images), images.shape[-1], source))

    return augmented


class SgdModule(Classifier):
    """Trains a network on images with targets of any kind (specification of APM, section 3, stages A and C).

    Args:
        config: batches, learning rate and its drop.
        images: [n, 3, size, size] on the device, or None if batches bring their own.
        targets: [n, ...], whatever the loss takes.
        encode: from a batch of images to what the network sees.
        loss: of logits and targets; the targets stay those of the image without augmentation.
        augment: of what the network sees.
        shared: arguments of :class:`cvdd.classifier.Classifier`.
    """

    def __init__(
        self,
        config: SgdConfig,
        images: Tensor | None,
        targets: Tensor,
        encode: Callable[[Tensor], Tensor],
        loss: Loss,
        augment: Augment,
        **shared: object,
    ) -> None:
        super().__init__(**shared)  # type: ignore[arg-type]
        self.config = config
        self._images, self._targets = images, targets
        self._encode, self._loss, self._augment = encode, loss, augment

    def on_fit_start(self) -> None:
        """Bring the images to the device."""
        self._targets = self._targets.to(self.device)
        if self._images is not None:
            self._images = self._images.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Set the epoch's learning rate."""
        super().on_train_epoch_start()
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        optimizer.param_groups[0]["lr"] = self.config.lr_at(self.current_epoch)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Loss of one augmented batch: indices into the images in memory, or (images, targets)."""
        if self._images is not None:
            assert isinstance(batch, Tensor)
            indices = batch.to(self.device)
            images, targets = self._images[indices], self._targets[indices]
        else:
            images, targets = batch
        source = generator(self.seed, "augment", self.current_epoch, batch_index)
        return self._note(self._loss(self.network(self._augment(self._encode(images), source)), targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD; the learning rate is set at every epoch."""
        config = self.config
        return torch.optim.SGD(
            self.network.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
