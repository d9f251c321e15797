"""The LightningModule that trains a committee member on real data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cvdd.augmentation.augment import Views, apply_views, draw_views
from cvdd.computing.passes import Passes
from cvdd.schema import RecipeConfig
from cvdd.support.batch_parts import part_size, parts_of
from cvdd.support.curves import cosine
from cvdd.support.seeds import generator
from cvdd.training.muon import muon
from cvdd.training.real_images import RealImagesModule


class MemberModule(RealImagesModule):
    """Trains a committee member, or what of it is not frozen, on labelled real images.

    Args:
        recipe: optimiser, schedule and augmentation.
        pixels: [n, 3, size, size] uint8 training images on the device, or None if batches bring their own.
        labels: [n].
        mean: of the normalisation.
        std: of the normalisation.
        size: side of the network's input.
        passes: how the network computes. Only passes of full batches, or of full parts, are compiled.
        shared: arguments of :class:`cvdd.training.classifier.Classifier`.
    """

    def __init__(
        self,
        recipe: RecipeConfig,
        pixels: Tensor | None,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: int,
        passes: Passes | None = None,
        **shared: object,
    ) -> None:
        super().__init__(pixels, mean, std, size, passes, **shared)
        self.recipe = recipe
        self.part = part_size(recipe.batch_size, recipe.accumulation)
        self._labels = labels

    def on_fit_start(self) -> None:
        """Bring the images to the device, and make ready to record steps there."""
        super().on_fit_start()
        self._labels = self._labels.to(self.device)
        if self._pixels is not None and self._passes.record:
            # Muon's step is a dozen small products for each matrix; the others' are a few launches.
            self.record(self._losses_of, self.recipe.accumulation > 1, step=self.recipe.optimizer == "muon")

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy of one augmented batch: indices into the images in memory, or (pixels, labels).

        Of a batch in parts, pixels are those of this rank's parts alone.
        """
        source = generator(self.seed, "augment", self.current_epoch, batch_index)
        count = len(batch) if isinstance(batch, Tensor) else len(batch[1])
        shape = self._pixels.shape[2:] if self._pixels is not None else batch[0].shape[2:]
        drawn = draw_augmentation(self.recipe, count, shape[0], shape[1], source)
        if isinstance(batch, Tensor) and self.is_recorded:
            tensors = (values.to(self.device, non_blocking=True) for values in drawn)
            return self._note(self.recorded_loss(batch, *tensors))
        losses = self._losses_by_part(batch, drawn)
        if self.recipe.accumulation == 1:
            return self._note(losses[0]())
        return self._note(self.loss_in_parts(losses, batch_index))

    def _losses_of(self, indices: Tensor, *drawn: Tensor) -> list[Callable[[], Tensor]]:
        return self._losses_by_part(indices, Augmentation(*drawn))

    def _losses_by_part(self, batch: Tensor | tuple[Tensor, Tensor], drawn: Augmentation) -> list[Callable[[], Tensor]]:
        """Share of each part of a batch in its loss; of those that other ranks forward nothing can be called."""
        labels = self._labels[batch] if isinstance(batch, Tensor) else batch[1]
        count = len(labels)
        undivided = self.recipe.accumulation == 1
        parts = [slice(0, count)] if undivided else parts_of(count, self.part)
        own = range(len(parts)) if undivided else self.own_parts(len(parts))
        pixels_of: dict[int, Tensor] = {}
        first = 0
        for index in own:
            part = parts[index]
            length = part.stop - part.start
            if isinstance(batch, Tensor):
                assert self._pixels is not None
                pixels_of[index] = self._pixels[batch[part]]
            else:
                pixels_of[index] = batch[0][first : first + length]
            first += length

        def loss(index: int) -> Tensor:
            part = parts[index]
            share = (part.stop - part.start) / count
            whole = self._part_loss(pixels_of[index], labels[part], drawn.of(part))
            return whole if undivided else whole.mul(share)

        return [partial(loss, index) for index in range(len(parts))]

    def _part_loss(self, pixels: Tensor, labels: Tensor, drawn: Augmentation) -> Tensor:
        shown = self.shown(apply_augmentation(pixels, self.recipe, self.size, drawn))
        full = len(shown) == self.part
        forward = self.network if self._compiled is None or not full else self._compiled
        with self._passes.around(shown.device):
            logits: Tensor = forward(shown)
        return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and schedule of the recipe."""
        recipe = self.recipe
        parameters = self.trained_parameters()
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "muon":
            decay, on_gpu = recipe.weight_decay, self.device.type == "cuda"
            optimizer = muon(self.network, recipe.lr, recipe.momentum, (0.9, 0.999), decay, decay, capturable=on_gpu)
        elif recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
            )
        else:
            kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
            optimizer = kind(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if recipe.schedule == "onecycle":
            steps = int(self.trainer.estimated_stepping_batches)
            # A momentum of the recipe stays as it is.
            cycled = recipe.optimizer not in ("sgd", "muon")
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, recipe.lr, total_steps=steps, cycle_momentum=cycled
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        period = recipe.cosine_period or recipe.epochs
        shape = partial(cosine, total=period) if recipe.schedule == "cosine" else _one
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def own_images(index: Tensor, part: int, rank: int, ranks: int) -> Tensor:
    """Pick the images of a rank's parts from the indices of a batch.

    Args:
        index: [n] of the batch.
        part: images in a part.
        rank: whose parts.
        ranks: that share the batch.
    """
    return torch.cat([index[:0], *(index[rows] for rows in parts_of(len(index), part)[rank::ranks])])


class Augmentation(NamedTuple):
    """How each image of a batch is shown.

    Attributes:
        boxes: [n, 4] of the crops that are resized: top, left, height, width in pixels.
        flips: [n] bool.
        offsets: [n, 2] of the crops of padded images: down, right.
    """

    boxes: Tensor
    flips: Tensor
    offsets: Tensor

    def of(self, part: slice) -> Augmentation:
        """That of some of the images."""
        return Augmentation(*(values[part] for values in self))


def draw_augmentation(
    recipe: RecipeConfig, count: int, height: int, width: int, source: torch.Generator
) -> Augmentation:
    """Draw crop and flip of each image, as members are trained.

    Args:
        recipe: kind and range of the crops, and whether to flip.
        count: images.
        height: of the images in pixels.
        width: of the images in pixels.
        source: of the draws.
    """
    if recipe.crop == "resized":
        views = draw_views(count, height, width, recipe.crop_scale, recipe.flip, 0, source)
        return Augmentation(views.boxes, views.flips, torch.zeros(count, 2, dtype=torch.long))
    views = draw_views(count, height, width, None, recipe.flip, 0, source)
    pad = recipe.pad if recipe.crop == "pad" else 0
    return Augmentation(views.boxes, views.flips, torch.randint(0, 2 * pad + 1, (count, 2), generator=source))


def apply_augmentation(pixels: Tensor, recipe: RecipeConfig, size: int, drawn: Augmentation) -> Tensor:
    """Show images as it was drawn.

    Args:
        pixels: [n, 3, h, w] uint8.
        recipe: kind of the crops.
        size: side of a resized crop.
        drawn: for the n images.

    Returns:
        [n, 3, size, size] float 0..255.
    """
    # Matrices that resize are made where the images are.
    boxes, flips, offsets = (values.to(pixels.device) for values in drawn)
    if recipe.crop == "resized":
        return apply_views(pixels.float(), Views(boxes, flips, torch.zeros_like(offsets)), size)
    return _shifted(pixels, flips, offsets, recipe.pad if recipe.crop == "pad" else 0)


def augment(pixels: Tensor, recipe: RecipeConfig, size: int, source: torch.Generator) -> Tensor:
    """Crop and flip each image by itself, as members are trained.

    Args:
        pixels: [n, 3, h, w] uint8.
        recipe: kind and range of the crops, and whether to flip.
        size: side of a resized crop.
        source: of the draws.

    Returns:
        [n, 3, size, size] float 0..255.
    """
    n, _, height, width = pixels.shape
    return apply_augmentation(pixels, recipe, size, draw_augmentation(recipe, n, height, width, source))


def _one(epoch: int) -> float:
    return 1.0


def _shifted(pixels: Tensor, flips: Tensor, offsets: Tensor, pad: int) -> Tensor:
    n, _, height, width = pixels.shape
    device = pixels.device
    columns = torch.arange(width, device=device)
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    rows = torch.arange(height, device=device)[None] + offsets[:, :1]
    columns = columns + offsets[:, 1:]
    padded = nn.functional.pad(pixels.float(), (pad, pad, pad, pad))
    sample = torch.arange(n, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
