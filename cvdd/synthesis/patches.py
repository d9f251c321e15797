"""Patches: the best-recognised crops of real images, as initial images (specification of RDED, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cvdd.augmentation.augment import Views, apply_views, draw_boxes, normalise
from cvdd.data import Data, ImageSource
from cvdd.methods.selection import outward
from cvdd.schema import PatchesConfig
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import generator

SQUARE = (1.0, 1.0)

SCORED_AT_ONCE = 500
"""Crops that the observer is shown in one forward pass."""


def make_patches(
    data: Data, observer: nn.Module, config: PatchesConfig, label: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Cut, score, select and stitch the patches of one class.

    Args:
        data: the data set.
        observer: scores crops; in evaluation mode.
        config: how.
        label: the class.
        seed: of the choice of candidates and of the crops.

    Returns:
        images [images_per_class, 3, size, size] uint8, and the observer's loss of each patch
        [images_per_class, factor^2].

    Raises:
        ConfigError: the class has fewer images than patches are needed.
    """
    size, count = data.image_size, config.images_per_class
    needed = count * config.factor**2
    members = (data.train.labels == label).nonzero()[:, 0]
    require_candidates(data.classes[label], len(members), config)
    source = generator(seed, "patches", label)
    chosen = members[torch.randperm(len(members), generator=source)[: config.candidates]]
    crops = cut_crops(data.train, chosen, config.crops, size // config.factor, config.crop_scale, source)
    losses = score_crops(observer, crops.flatten(0, 1), label, data).view(len(chosen), config.crops)
    best = losses.argmin(dim=1)
    row = torch.arange(len(chosen))
    patches, loss = crops[row, best], losses[row, best]
    ranked = select(loss, needed, config.difficulty)
    return stitch(patches[ranked], count, config.factor, size), loss[ranked].view(-1, count).T.contiguous()


def require_candidates(name: str, images: int, config: PatchesConfig, field: str = "ipc.images_per_class") -> None:
    """Refuse more patches of a class than it has candidates.

    Args:
        name: of the class.
        images: its real images.
        config: how patches are made.
        field: that says, beside ``patches.images_per_class``, how many are needed.

    Raises:
        ConfigError: there are too few.
    """
    needed, offered = config.images_per_class * config.factor**2, min(images, config.candidates)
    if offered < needed:
        more = f", or raise patches.candidates={config.candidates}" if images > config.candidates else ""
        raise ConfigError(
            f"class {name} has {images} images and offers {offered} candidates for {needed} patches, one per real "
            f"image. Lower {field}, and patches.images_per_class where it is set{more}"
        )


def cut_crops(
    source: ImageSource, chosen: Tensor, crops: int, side: int, scale: tuple[float, float], random: torch.Generator
) -> Tensor:
    """Cut square crops at native resolution and resize them.

    Returns:
        [images, crops, 3, side, side] uint8.
    """
    if source.in_memory:
        images = source.stacked()[chosen].repeat_interleave(crops, dim=0)
        return _cut(images, side, scale, random).view(len(chosen), crops, 3, side, side)
    cut = [_cut(source.image(int(i)).expand(crops, -1, -1, -1), side, scale, random) for i in chosen]
    return torch.stack(cut)


def _cut(images: Tensor, side: int, scale: tuple[float, float], random: torch.Generator) -> Tensor:
    n, _, height, width = images.shape
    whole = Views.whole(n, height, width)
    boxes = draw_boxes(n, height, width, scale, random, SQUARE)
    return apply_views(images.float(), Views(boxes, whole.flips, whole.shifts), side, rounding=True).to(torch.uint8)


@torch.no_grad()
def score_crops(observer: nn.Module, crops: Tensor, label: int, data: Data, batch: int = SCORED_AT_ONCE) -> Tensor:
    """Cross-entropy of the true class for each crop [n, 3, s, s], padded with the mean colour to the image's size."""
    device = next(observer.parameters()).device
    before = (data.image_size - crops.shape[-1] + 1) // 2
    after = data.image_size - crops.shape[-1] - before
    losses = []
    for part in crops.split(batch):
        padded = nn.functional.pad(normalise(part.to(device), data.mean, data.std), (before, after, before, after))
        target = torch.full((len(part),), label, device=device)
        losses.append(nn.functional.cross_entropy(observer(padded), target, reduction="none").cpu())
    return torch.cat(losses)


def select(losses: Tensor, count: int, difficulty: str) -> Tensor:
    """Choose ``count`` patches by their losses [n] and return their indices, in rank order.

    ``easy`` takes the lowest, ``hard`` the highest; ``medium`` starts at the median and goes outward, upward first
    (section 2.3; the published programs do not define the word, so this is an assumption).
    """
    order = losses.argsort(stable=True)
    if difficulty == "easy":
        return order[:count]
    if difficulty == "hard":
        return order.flip(0)[:count]
    return order[outward(len(order), len(order) // 2)[:count]]


def stitch(patches: Tensor, count: int, factor: int, size: int) -> Tensor:
    """Tile patches into images: rank ``q * count + t`` is cell q, row by row, of image t.

    Args:
        patches: [count * factor^2, 3, size // factor, size // factor] uint8, in rank order.
        count: number of images.
        factor: cells per side.
        size: side of an image.

    Returns:
        [count, 3, size, size] uint8.
    """
    side = size // factor
    cells = patches.view(factor, factor, count, 3, side, side)
    tiled = cells.permute(2, 3, 0, 4, 1, 5).reshape(count, 3, factor * side, factor * side)
    if factor * side == size:
        return tiled
    return nn.functional.interpolate(tiled.float(), (size, size), mode="nearest").to(torch.uint8)
