"""The LightningModule that trains a committee member on real data."""

from __future__ import annotations

import math

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cvdd.augment import Views, apply_views, draw_views, normalise
from cvdd.classifier import Classifier
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
        **shared: object,
    ) -> None:
        super().__init__(**shared)  # type: ignore[arg-type]
        self.recipe, self.mean, self.std, self.size = recipe, mean, std, size
        self._pixels, self._labels = pixels, labels

    def on_fit_start(self) -> None:
        """Bring the images to the device."""
        self._labels = self._labels.to(self.device)
        if self._pixels is not None:
            self._pixels = self._pixels.to(self.device)

    def training_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Cross-entropy of one augmented batch: indices into the images in memory, or (pixels, labels)."""
        if self._pixels is not None:
            assert isinstance(batch, Tensor)
            pixels, labels = self._pixels[batch], self._labels[batch]
        else:
            pixels, labels = batch
        source = generator(self.seed, "augment", self.current_epoch, batch_index)
        images = normalise(augment(pixels, self.recipe, self.size, source), self.mean, self.std)
        loss = nn.functional.cross_entropy(self.network(images), labels, label_smoothing=self.recipe.label_smoothing)
        return self._note(loss)

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
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        period = recipe.cosine_period or recipe.epochs
        shape = (lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / period))) if recipe.schedule == "cosine" else _one
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


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
    if recipe.crop == "resized":
        views = draw_views(n, height, width, recipe.crop_scale, recipe.flip, 0, source)
        return apply_views(pixels.float(), views, size)
    views = draw_views(n, height, width, None, recipe.flip, 0, source)
    pad = recipe.pad if recipe.crop == "pad" else 0
    offsets = torch.randint(0, 2 * pad + 1, (n, 2), generator=source).to(pixels.device)
    return _shifted(pixels, views, offsets, pad)


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
