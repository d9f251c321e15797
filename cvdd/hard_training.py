"""Training by SGD on labelled images with DSA: the experts of trajectory matching and the students on its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cvdd.classifier import Classifier
from cvdd.methods.mtt import cross_entropy, draw_step, seen
from cvdd.seeds import generator


@dataclass(frozen=True)
class SgdRecipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the images.
        lr: of SGD.
        momentum: of SGD.
        weight_decay: of SGD, on all parameters.
        drop: divide the rate by 10 just past the middle, with a new optimiser.
        families: of DSA.
        size: side of what the network sees.
        canvas: side of an image in ``size``.
        samples: crops of each canvas.
    """

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    drop: bool
    families: Sequence[str]
    size: int
    canvas: int = 1
    samples: int = 1

    @property
    def drop_epoch(self) -> int:
        """First epoch (counted from 0) with the lower rate, as released: 27 of 50, 502 of 1001."""
        return self.epochs // 2 + 2


class HardTrainingModule(Classifier):
    """Cross-entropy on augmented images.

    Args:
        recipe: optimiser and augmentation.
        images: [n, 3, side, side] float, as the network sees them, or None if batches bring their own.
        targets: [n, classes] probabilities, or the same as class indices [n].
        encode: from the pixels of batches that bring their own to what the network sees.
        classes: number of classes.
        on_snapshot: called after every epoch with the number of finished epochs; None for nothing.
        shared: arguments of :class:`cvdd.classifier.Classifier`.
    """

    def __init__(
        self,
        recipe: SgdRecipe,
        images: Tensor | None,
        targets: Tensor,
        encode: Callable[[Tensor], Tensor],
        classes: int,
        on_snapshot: Callable[[int], None] | None = None,
        **shared: object,
    ) -> None:
        super().__init__(**shared)  # type: ignore[arg-type]
        self.recipe, self.classes = recipe, classes
        self._images, self._targets, self._encode = images, targets, encode
        self._on_snapshot = on_snapshot

    def on_fit_start(self) -> None:
        """Bring the images to the device."""
        self._targets = self._targets.to(self.device)
        if self._images is not None:
            self._images = self._images.to(self.device)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy of one augmented batch: indices into the images in memory, or (pixels, labels)."""
        recipe = self.recipe
        if self._images is not None:
            assert isinstance(batch, Tensor)
            indices = batch.to(self.device)
            images, targets = self._images[indices], self._targets[indices]
        else:
            pixels, targets = batch
            images = self._encode(pixels)
        if not targets.is_floating_point():
            targets = torch.nn.functional.one_hot(targets, self.classes).float()
        source = generator(self.seed, "dsa", self.current_epoch, batch_index)
        step = draw_step(torch.arange(len(images)), recipe.families, recipe.size, recipe.canvas, recipe.samples, source)
        images, targets = seen(images, targets, step, recipe.size)
        return self._note(cross_entropy(self.network(images), targets))

    def on_train_epoch_start(self) -> None:
        """Lower the rate where it falls; what the optimiser remembers is forgotten there."""
        super().on_train_epoch_start()
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        if self.recipe.drop and self.current_epoch == self.recipe.drop_epoch:
            optimizer.param_groups[0]["lr"] = self.recipe.lr / 10
            optimizer.state.clear()

    def on_train_epoch_end(self) -> None:
        """Add a row to the curve, and let the parameters be copied."""
        super().on_train_epoch_end()
        if self._on_snapshot is not None:
            self._on_snapshot(self.current_epoch + 1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        recipe = self.recipe
        return torch.optim.SGD(
            self.network.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
