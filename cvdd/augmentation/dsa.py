"""DSA: differentiable augmentation whose parameters are drawn apart from being applied (specification of MTT, 2.3).

One family is drawn for a batch and its parameters for every sample; the same draw can be applied to several batches.
IDC and CIM have several of them in each view of a student (:func:`draw_each`, :func:`augment_each`).
kornia's augmentations draw from PyTorch's global generator, which no run of this project may depend on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from cvdd.schema.types import side_of_cut

SHIFT = 0.125
"""Largest shift of a crop, as a share of the side."""
CUTOUT = 0.5
"""Side of the square that is cut out, as a share of the side."""
SCALE = 1.2
"""Largest stretch of either axis; the smallest is its inverse."""
DEGREES = 15.0
"""Largest rotation in either direction."""


@dataclass(frozen=True)
class SiameseAugmentation:
    """One family with its parameters.

    Attributes:
        family: key of :data:`FAMILIES`.
        values: [n, k] parameters of each sample, or [1, k] for one draw that all samples share.
    """

    family: str
    values: Tensor


def draw_augmentation(
    families: Sequence[str], count: int, size: int, source: torch.Generator, *, shared: bool = False
) -> SiameseAugmentation | None:
    """Draw a family uniformly, and its parameters.

    Args:
        families: keys of :data:`FAMILIES`; empty for no augmentation.
        count: samples of the batch.
        size: side of the images.
        source: of randomness.
        shared: draw one set of parameters for all samples, so that it fits batches of any size.

    Returns:
        The draw, or None if there are no families.
    """
    if not families:
        return None
    family = families[int(torch.randint(len(families), (), generator=source))]
    return SiameseAugmentation(family, FAMILIES[family].draw(1 if shared else count, size, source))


def augment(images: Tensor, augmentation: SiameseAugmentation | None) -> Tensor:
    """Apply a draw to images [n, c, size, size] around 0; differentiable with respect to the images."""
    if augmentation is None:
        return images
    values = augmentation.values.to(images.device)
    if values.is_floating_point():
        values = values.to(images.dtype)
    return FAMILIES[augmentation.family].apply(images, values.expand(len(images), -1))


@dataclass(frozen=True)
class Family:
    """How a family draws its parameters and applies them.

    Attributes:
        draw: from count, side and generator to parameters [count, k].
        apply: from images and parameters to images.
    """

    draw: Callable[[int, int, torch.Generator], Tensor]
    apply: Callable[[Tensor, Tensor], Tensor]


def _draw_color(count: int, size: int, source: torch.Generator) -> Tensor:
    return torch.rand(count, 3, generator=source)


def _color(images: Tensor, values: Tensor) -> Tensor:
    brightness, saturation, contrast = (value.view(-1, 1, 1, 1) for value in values.unbind(dim=1))
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    level = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - level) * (contrast + 0.5) + level


def _draw_crop(count: int, size: int, source: torch.Generator) -> Tensor:
    largest = int(size * SHIFT + 0.5)
    return torch.randint(-largest, largest + 1, (count, 2), generator=source)


def _crop(images: Tensor, values: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)[None] + values[:, :1]
    columns = torch.arange(width, device=images.device)[None] + values[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images.permute(0, 2, 3, 1)[
        sample, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    return moved.permute(0, 3, 1, 2) * inside[:, None]


def draw_cuts(count: int, size: int, source: torch.Generator, share: float = CUTOUT) -> Tensor:
    """Draw the middles [n, 2] of squares that are cut out of images; a square may lie partly outside.

    Args:
        count: n.
        size: side of the images.
        source: of randomness.
        share: of that side, the side of the square.
    """
    side = side_of_cut(size, share)
    return torch.randint(0, size + 1 - side % 2, (count, 2), generator=source)


def left_by_cuts(cuts: Tensor, size: int, share: float = CUTOUT) -> Tensor:
    """Return what is left [n, size, size] bool where squares are cut out around ``cuts`` [n, 2]."""
    side = side_of_cut(size, share)
    place = torch.arange(size, device=cuts.device) - (cuts[:, :, None] - side // 2)
    rows, columns = ((place >= 0) & (place < side)).unbind(dim=1)
    return ~(rows[:, :, None] & columns[:, None, :])


def _cutout(images: Tensor, values: Tensor) -> Tensor:
    return images * left_by_cuts(values, images.shape[-1])[:, None]


def _draw_flip(count: int, size: int, source: torch.Generator) -> Tensor:
    return torch.rand(count, 1, generator=source) < 0.5


def _flip(images: Tensor, values: Tensor) -> Tensor:
    return torch.where(values[:, :, None, None], images.flip(-1), images)


def _draw_scale(count: int, size: int, source: torch.Generator) -> Tensor:
    return torch.rand(count, 2, generator=source) * (SCALE - 1 / SCALE) + 1 / SCALE


def _scale(images: Tensor, values: Tensor) -> Tensor:
    return _warp(images, torch.diag_embed(values))


def _draw_rotate(count: int, size: int, source: torch.Generator) -> Tensor:
    return (torch.rand(count, 1, generator=source) * 2 - 1) * math.radians(DEGREES)


def _rotate(images: Tensor, values: Tensor) -> Tensor:
    return _warp(images, _rotations(values[:, 0]))


def _rotations(radians: Tensor) -> Tensor:
    cosine, sine = radians.cos(), radians.sin()
    return torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)


def _warp(images: Tensor, matrices: Tensor, align_corners: bool = True) -> Tensor:
    """Sample bilinearly at the places that ``matrices`` [n, 2, 2] map each pixel to; black is 0 outside."""
    grid = functional.affine_grid(functional.pad(matrices, (0, 1)), list(images.shape), align_corners=align_corners)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=align_corners)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "color": Family(_draw_color, _color),
        "crop": Family(_draw_crop, _crop),
        "cutout": Family(draw_cuts, _cutout),
        "flip": Family(_draw_flip, _flip),
        "scale": Family(_draw_scale, _scale),
        "rotate": Family(_draw_rotate, _rotate),
    }
)
"""The six families of the strategy color_crop_cutout_flip_scale_rotate."""

MOVES = ("crop", "scale", "rotate")
"""Families of which one is drawn for each batch of a student."""

EACH = 8
"""Numbers that :func:`draw_each` draws for a sample: colours (3), family (1), its parameters (2), cutout (2)."""


def draw_each(batches: Sequence[tuple[int, int]], size: int, source: torch.Generator) -> Tensor:
    """Draw what every view of a student goes through: colours, one of :data:`MOVES` for its batch, and a cutout.

    As IDC has it, and CIM after it: the parameters are of each sample.

    Args:
        batches: first and last-plus-one sample of each batch, in order.
        size: side of the views.
        source: of randomness.

    Returns:
        [n, 8] float32, n being the samples of all batches.
    """
    drawn = []
    for start, stop in batches:
        count, family = stop - start, int(torch.randint(len(MOVES), (), generator=source))
        colours = FAMILIES["color"].draw(count, size, source)
        places = FAMILIES[MOVES[family]].draw(count, size, source).float()
        cuts = FAMILIES["cutout"].draw(count, size, source).float()
        places = functional.pad(places, (0, 2 - places.shape[1]))
        drawn.append(torch.cat([colours, torch.full((count, 1), float(family)), places, cuts], dim=1))
    return torch.cat(drawn)


def augment_each(images: Tensor, values: Tensor) -> Tensor:
    """Change the colours of each view, move it, and cut a square out of it; what is brought in or cut out is 0.

    Args:
        images: [n, c, size, size] around 0.
        values: [n, 8] of :func:`draw_each`.
    """
    colours, family, places, cuts = values.split([3, 1, 2, 2], dim=1)
    images = _color(images, colours)
    crops, rotates = (family == MOVES.index(name) for name in ("crop", "rotate"))
    matrices = torch.where(rotates[:, :, None], _rotations(places[:, 0]), torch.diag_embed(places))
    # As released, which leaves align_corners at its default; MTT's own augmentation has the older one.
    warped = _warp(images, matrices, align_corners=False)
    moved = torch.where(crops[:, :, None, None], _crop(images, places.long()), warped)
    return _cutout(moved, cuts)
