"""Real training images in batches, as members see them when nobody is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cvdd.augment import normalise
from cvdd.chain.members import RealImages, side_of_files
from cvdd.context import Context
from cvdd.member import augment


def plain_batches(context: Context, order: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield training images as they are: normalised [n, 3, size, size], on the device.

    Args:
        context: the configuration and its surroundings.
        order: of each batch, the positions of its images.
    """
    data = context.data()
    for pixels, _ in _pixels(context, order, data.image_size):
        yield normalise(pixels.to(context.device), data.mean, data.std)


def augmented_batches(
    context: Context, order: Sequence[Tensor], source: Callable[[int], torch.Generator]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield training images with the crops and flips of the recipe: normalised [n, 3, size, size] and labels [n].

    Args:
        context: the configuration and its surroundings.
        order: of each batch, the positions of its images.
        source: of the draws of a batch, by its number.
    """
    data, recipe, device = context.data(), context.config.recipe, context.device
    side = side_of_files(data.image_size, recipe)
    for index, (pixels, labels) in enumerate(_pixels(context, order, side)):
        seen = augment(pixels.to(device), recipe, data.image_size, source(index))
        yield normalise(seen, data.mean, data.std), labels.to(device)


def drawn_by_augmentation(context: Context) -> dict[str, Any]:
    """What of the recipe determines crops and flips, for identities."""
    recipe = context.config.recipe
    used = {"crop", "flip"} | ({"pad": {"pad"}, "resized": {"crop_scale"}}.get(recipe.crop) or set())
    settings: dict[str, Any] = recipe.model_dump(mode="json", include=used)
    return settings


def _pixels(context: Context, order: Sequence[Tensor], side: int) -> Iterator[tuple[Tensor, Tensor]]:
    data = context.data()
    if data.train.in_memory:
        for chosen in order:
            yield data.train.stacked()[chosen], data.train.labels[chosen]
        return
    loader: DataLoader[Any] = DataLoader(
        RealImages(data, side), sampler=list(order), batch_size=None, num_workers=context.config.trainer.workers
    )
    yield from loader
