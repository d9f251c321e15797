"""Real training images in batches, as members see them when nobody is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cvdd.augmentation.augment import normalise
from cvdd.chain.context import Context
from cvdd.computing.footprint import free_memory
from cvdd.training.member import augment
from cvdd.training.real_images import RealImages, side_of_files

DECODED_AT_ONCE = 256
"""Images in a batch that is decoded to be kept."""


def plain_batches(context: Context, order: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield training images as they are tested: normalised [n, 3, size, size], on the device.

    Args:
        context: the configuration and its surroundings.
        order: of each batch, the positions of its images.
    """
    data = context.data()
    for pixels, _ in _pixels(context, order, data.image_size, context.config.dataset.test_resize):
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
    side = side_of_files(context.data().image_size, resized=context.config.recipe.crop == "resized")
    for index, (pixels, labels) in enumerate(_pixels(context, order, side)):
        yield augmented(context, pixels, source(index)), labels.to(context.device)


def augmented(context: Context, pixels: Tensor, source: torch.Generator) -> Tensor:
    """Show images with the crops and flips of the recipe: normalised [n, 3, size, size], on the device.

    Args:
        context: the configuration and its surroundings.
        pixels: [n, 3, h, w] uint8.
        source: of the draws.
    """
    data = context.data()
    seen = augment(pixels.to(context.device), context.config.recipe, data.image_size, source)
    return normalise(seen, data.mean, data.std)


def decoded(context: Context, chosen: Tensor) -> Tensor | None:
    """Return images before their augmentation, [n, 3, h, w] uint8, where they fit into half of the free memory.

    Files are decoded once, for many passes over them.

    Args:
        context: the configuration and its surroundings.
        chosen: [n] positions.
    """
    data = context.data()
    if data.train.in_memory:
        return data.train.stacked()[chosen]
    side = side_of_files(data.image_size, resized=context.config.recipe.crop == "resized")
    if len(chosen) * 3 * side**2 > free_memory(torch.device("cpu")) / 2:
        return None
    held = torch.empty(len(chosen), 3, side, side, dtype=torch.uint8)
    first = 0
    for pixels, _ in _pixels(context, chosen.split(DECODED_AT_ONCE), side):
        held[first : first + len(pixels)] = pixels
        first += len(pixels)
    return held


def drawn_by_augmentation(context: Context) -> dict[str, Any]:
    """What of the recipe determines crops and flips, for identities."""
    recipe = context.config.recipe
    used = {"crop", "flip"} | ({"pad": {"pad"}, "resized": {"crop_scale"}}.get(recipe.crop) or set())
    settings: dict[str, Any] = recipe.model_dump(mode="json", include=used)
    return settings


def _pixels(
    context: Context, order: Sequence[Tensor], side: int, shorter_side: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    data = context.data()
    if data.train.in_memory:
        for chosen in order:
            yield data.train.stacked()[chosen], data.train.labels[chosen]
        return
    images = RealImages(data, side, shorter_side=shorter_side)
    loader: DataLoader[Any] = DataLoader(
        images, sampler=list(order), batch_size=None, num_workers=context.config.trainer.workers
    )
    yield from loader
