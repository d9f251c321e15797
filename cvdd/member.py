"""The LightningModule that trains a committee member on real data."""

from __future__ import annotations

import math
from functools import partial

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cvdd.augment import Views, apply_views, draw_views, normalise
from cvdd.classifier import Classifier, parts_of
from cvdd.engine import Passes
from cvdd.schema import RecipeConfig
from cvdd.seeds import generator


class MemberModule(Classifier):
    """Trains a committee member on labelled real images.

    Args:
        recipe: optimiser, schedule and augmentation.
        pixels: [n, 3, size, size] uint8 training images on the device, or None if batches bring their own.
        labels: [n].
        mean: of the normalisation.
        std: of the normalisation.
        size: side of the network's input.
        passes: how the network computes; nothing of it is compiled.
        shared: arguments of :class:`Classifier`.
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
        super().__init__(**shared)  # type: ignore[arg-type]
        self.recipe, self.mean, self.std, self.size = recipe, mean, std, size
        self._pixels, self._labels = pixels, labels
        self._passes = passes or Passes()

    def on_fit_start(self) -> None:
        """Bring the images to the device."""
        self._labels = self._labels.to(self.device)
        if self._pixels is not None:
            self._pixels = self._pixels.to(self.device)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy of one augmented batch: indices into the images in memory, or (pixels, labels).

        Of a batch in parts, pixels are those of this rank's parts alone.
        """
        if self._pixels is not None:
            assert isinstance(batch, Tensor)
            indices, labels = batch, self._labels[batch]
        else:
            labels = batch[1]
        count = len(labels)
        if self.recipe.accumulation == 1:
            pixels = batch[0] if self._pixels is None else self._pixels[indices]
            return self._note(self._part_loss(pixels, labels, batch_index, slice(0, count)))
        parts = parts_of(count, part_size(self.recipe))
        pixels_of: dict[int, Tensor] = {}
        first = 0
        for index in self.own_parts(len(parts)):
            part = parts[index]
            length = part.stop - part.start
            if self._pixels is None:
                pixels_of[index] = batch[0][first : first + length]
            else:
                pixels_of[index] = self._pixels[indices[part]]
            first += length

        def loss(index: int) -> Tensor:
            part = parts[index]
            share = (part.stop - part.start) / count
            return self._part_loss(pixels_of[index], labels, batch_index, part).mul(share)

        return self._note(self.loss_in_parts([partial(loss, index) for index in range(len(parts))], batch_index))

    def _part_loss(self, pixels: Tensor, labels: Tensor, batch_index: int, part: slice) -> Tensor:
        source = generator(self.seed, "augment", self.current_epoch, batch_index)
        shown = augment(pixels, self.recipe, self.size, source, len(labels), part)
        with self._passes.around(shown.device):
            logits: Tensor = self.network(normalise(shown, self.mean, self.std))
        return nn.functional.cross_entropy(logits.float(), labels[part], label_smoothing=self.recipe.label_smoothing)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimiser and schedule of the recipe."""
        recipe = self.recipe
        parameters = self.network.parameters()
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(
                parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
            )
        else:
            kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
            optimizer = kind(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if recipe.schedule == "onecycle":
            steps = int(self.trainer.estimated_stepping_batches)
            # SGD keeps the recipe's momentum.
            cycled = recipe.optimizer != "sgd"
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, recipe.lr, total_steps=steps, cycle_momentum=cycled
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        period = recipe.cosine_period or recipe.epochs
        shape = (lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / period))) if recipe.schedule == "cosine" else _one
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def part_size(recipe: RecipeConfig) -> int:
    """Images in each part of a full batch."""
    return max(recipe.batch_size // recipe.accumulation, 1)


def own_images(index: Tensor, part: int, rank: int, ranks: int) -> Tensor:
    """Pick the images of a rank's parts from the indices of a batch.

    Args:
        index: [n] of the batch.
        part: images in a part.
        rank: whose parts.
        ranks: that share the batch.
    """
    return torch.cat([index[:0], *(index[rows] for rows in parts_of(len(index), part)[rank::ranks])])


def augment(
    pixels: Tensor,
    recipe: RecipeConfig,
    size: int,
    source: torch.Generator,
    count: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """Crop and flip each image by itself, as members are trained.

    Args:
        pixels: [n, 3, h, w] uint8.
        recipe: kind and range of the crops, and whether to flip.
        size: side of a resized crop.
        source: of the draws.
        count: images for which draws are made; None is n.
        part: of these the n that are shown here.

    Returns:
        [n, 3, size, size] float 0..255.
    """
    n, _, height, width = pixels.shape
    drawn = n if count is None else count
    if recipe.crop == "resized":
        views = draw_views(drawn, height, width, recipe.crop_scale, recipe.flip, 0, source)
        return apply_views(pixels.float(), views[part], size)
    views = draw_views(drawn, height, width, None, recipe.flip, 0, source)
    pad = recipe.pad if recipe.crop == "pad" else 0
    offsets = torch.randint(0, 2 * pad + 1, (drawn, 2), generator=source)[part].to(pixels.device)
    return _shifted(pixels, views[part], offsets, pad)


def _one(epoch: int) -> float:
    return 1.0


def _shifted(pixels: Tensor, views: Views, offsets: Tensor, pad: int) -> Tensor:
    n, _, height, width = pixels.shape
    device = pixels.device
    columns = torch.arange(width, device=device)
    columns = torch.where(views.flips.to(device)[:, None], width - 1 - columns, columns)
    rows = torch.arange(height, device=device)[None] + offsets[:, :1]
    columns = columns + offsets[:, 1:]
    padded = nn.functional.pad(pixels.float(), (pad, pad, pad, pad))
    sample = torch.arange(n, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
