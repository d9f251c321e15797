"""Crops, flips, rolls and mixes of image batches, as parameters that are drawn apart from being applied.

A crop that is resized is two small matrices, one over rows and one over columns. Flip and circular shift permute the
rows of these matrices, so a whole view is two batched matrix products: vectorised over samples, differentiable, the
same on every device, and with ``rounding`` equal to what PIL does to 8-bit images.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

RATIO = (3 / 4, 4 / 3)
"""Aspect ratios of a random crop, as in every published program."""


@dataclass(frozen=True)
class Views:
    """Which part of each image is seen, and how.

    Attributes:
        boxes: [n, 4] integers or floats: top, left, height, width in pixels of the source.
        flips: [n] bool, horizontal flip after the crop.
        shifts: [n, 2] integers, circular shift (down, right) after the flip.
        cuts: [n, 2] integers, the middle of a square that is cut out of the view; None for none.
    """

    boxes: Tensor
    flips: Tensor
    shifts: Tensor
    cuts: Tensor | None = None

    @staticmethod
    def whole(count: int, height: int, width: int) -> Views:
        """Return views that change nothing."""
        box = torch.tensor([0, 0, height, width])
        return Views(
            box.repeat(count, 1), torch.zeros(count, dtype=torch.bool), torch.zeros(count, 2, dtype=torch.long)
        )

    def __getitem__(self, index: Tensor | slice) -> Views:
        cuts = None if self.cuts is None else self.cuts[index]
        return Views(self.boxes[index], self.flips[index], self.shifts[index], cuts)

    def to(self, device: torch.device) -> Views:
        """Copy to a device."""
        cuts = None if self.cuts is None else self.cuts.to(device)
        return Views(self.boxes.to(device), self.flips.to(device), self.shifts.to(device), cuts)

    @staticmethod
    def cat(views: Sequence[Views]) -> Views:
        """Join views of several groups of images."""
        cuts = [view.cuts for view in views if view.cuts is not None]
        return Views(
            torch.cat([view.boxes for view in views]),
            torch.cat([view.flips for view in views]),
            torch.cat([view.shifts for view in views]),
            torch.cat(cuts) if cuts else None,
        )


def draw_boxes(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    generator: torch.Generator,
    ratio: tuple[float, float] = RATIO,
) -> Tensor:
    """Draw boxes of random resized crops: up to ten tries each, then the largest central box with a legal ratio.

    Returns:
        [count, 4] integers: top, left, height, width.
    """
    tries = 10
    area = height * width * torch.empty(count, tries, dtype=torch.float64).uniform_(*scale, generator=generator)
    log_ratio = torch.empty(count, tries, dtype=torch.float64)
    aspect = log_ratio.uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator).exp()
    place = torch.rand(count, 2, dtype=torch.float64, generator=generator)
    widths = (area * aspect).sqrt().round()
    heights = (area / aspect).sqrt().round()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    w, h = widths.gather(1, first)[:, 0], heights.gather(1, first)[:, 0]
    top = (place[:, 0] * (height - h + 1)).floor()
    left = (place[:, 1] * (width - w + 1)).floor()
    drawn = torch.stack([top, left, h, w], dim=1).long()
    w_all, h_all = width, height
    if width / height < ratio[0]:
        h_all = round(width / ratio[0])
    elif width / height > ratio[1]:
        w_all = round(height * ratio[1])
    central = torch.tensor([(height - h_all) // 2, (width - w_all) // 2, h_all, w_all])
    return torch.where(fits.any(dim=1, keepdim=True), drawn, central)


def draw_views(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float] | None,
    flip: bool,
    jitter: int,
    generator: torch.Generator,
) -> Views:
    """Draw random resized crops (none if ``scale`` is None), flips and circular shifts in 0..jitter on both axes."""
    whole = Views.whole(count, height, width)
    boxes = whole.boxes if scale is None else draw_boxes(count, height, width, scale, generator)
    flips = torch.rand(count, generator=generator) < 0.5 if flip else whole.flips
    shifts = torch.randint(0, jitter + 1, (count, 2), generator=generator) if jitter else whole.shifts
    return Views(boxes, flips, shifts)


def enlarged_parts(images: Tensor, factor: int) -> Tensor:
    """Cut images into their parts and show each as large as the image was, bilinearly.

    Args:
        images: [units, images, c, size, size].
        factor: parts on a side.

    Returns:
        [units, images * factor^2, c, size, size]: of each image its parts, row by row.
    """
    units, _, channels, size, _ = images.shape
    side = size // factor
    parts = images.unflatten(-2, (factor, side)).unflatten(-1, (factor, side)).permute(0, 1, 3, 5, 2, 4, 6)
    shown = nn.functional.interpolate(parts.reshape(-1, channels, side, side), (size, size), mode="bilinear")
    return shown.view(units, -1, channels, size, size)


def in_cells(views: Views, factor: int, side: int, generator: torch.Generator) -> Views:
    """Move views of one cell of an image into drawn cells of images that have ``factor`` by ``factor`` of them.

    Args:
        views: n, drawn for images of the size of a cell.
        factor: cells on a side.
        side: of a cell in pixels.
        generator: of the draws.
    """
    cells = torch.randint(factor, (len(views.boxes), 2), generator=generator)
    places = views.boxes[:, :2] + cells * side
    return replace(views, boxes=torch.cat([places, views.boxes[:, 2:]], dim=1))


def cut_cells(images: Tensor, views: Views, factor: int) -> tuple[Tensor, Views]:
    """Cut the cell that is seen out of each of ``images``, so that nothing done to it knows of the others.

    Args:
        images: [n, c, size, size], ``size`` a multiple of ``factor``.
        views: n, of which each box is whole inside one cell, where :func:`in_cells` moves it.
        factor: cells on a side.

    Returns:
        the cells, [n, c, size / factor, size / factor], and the views of them: boxes count from a cell's own corner.
    """
    n, channels, size, _ = images.shape
    side = size // factor
    cells = (views.boxes[:, :2] // side).long()
    each = torch.arange(n, device=images.device)
    cut = images.reshape(n, channels, factor, side, factor, side)[each, :, cells[:, 0], :, cells[:, 1]]
    places = views.boxes[:, :2] - cells * side
    return cut, replace(views, boxes=torch.cat([places, views.boxes[:, 2:]], dim=1))


def resampling_matrices(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Return the matrices that cut ``[start, start + length)`` out of ``source`` pixels and resize it to ``size``.

    Bilinear; where the cut is larger than ``size`` the triangle widens with the scale, as PIL's does (antialiasing).

    Args:
        start: [n] first pixel.
        length: [n] pixels of the cut.
        source: pixels of the source axis.
        size: pixels of the result.

    Returns:
        [n, size, source] float32; every row sums to 1.
    """
    start, length = start.double()[:, None, None], length.double()[:, None, None]
    scale = length / size
    centre = (torch.arange(size, dtype=torch.float64, device=start.device)[None, :, None] + 0.5) * scale + start
    pixel = torch.arange(source, dtype=torch.float64, device=start.device)[None, None, :] + 0.5
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((pixel > start) & (pixel < start + length))
    return (weight / weight.sum(dim=2, keepdim=True)).float()


def view_matrices(views: Views, height: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the row matrices [n, size, height] and the column matrices [n, size, width] of views."""
    boxes = views.boxes
    rows = resampling_matrices(boxes[:, 0], boxes[:, 2], height, size)
    columns = resampling_matrices(boxes[:, 1], boxes[:, 3], width, size)
    columns = torch.where(views.flips[:, None, None], columns.flip(1), columns)
    place = torch.arange(size, device=boxes.device)
    rows = _permute_rows(rows, (place[None] - views.shifts[:, :1]) % size)
    columns = _permute_rows(columns, (place[None] - views.shifts[:, 1:]) % size)
    return rows, columns


def _permute_rows(matrices: Tensor, index: Tensor) -> Tensor:
    return matrices.gather(1, index[:, :, None].expand_as(matrices))


def apply_matrices(images: Tensor, rows: Tensor, columns: Tensor, rounding: bool = False) -> Tensor:
    """Resample groups of images, each group with its own matrices.

    Args:
        images: [g, b, c, height, width]; with ``rounding`` on the scale 0..255.
        rows: [g, size, height].
        columns: [g, size, width].
        rounding: round to whole numbers after each of the two passes, as PIL does with 8-bit images.

    Returns:
        [g, b, c, size, size].
    """
    g, b, c, height, width = images.shape
    size = rows.shape[1]
    wide = images.reshape(g, b * c * height, width) @ columns.transpose(1, 2)
    if rounding:
        wide = _round(wide)
    tall = wide.reshape(g, b * c, height, size).transpose(2, 3).reshape(g, b * c * size, height)
    out = tall @ rows.transpose(1, 2)
    if rounding:
        out = _round(out)
    return out.reshape(g, b, c, size, size).transpose(3, 4).contiguous()


@contextlib.contextmanager
def rounded_products(allowed: bool) -> Iterator[None]:
    """Let a GPU multiply float32 matrices with 10 bits of mantissa inside, which takes an eighth of the time.

    Args:
        allowed: whether that is enough, as it is for what becomes bfloat16, with 7 bits.
    """
    if not allowed:
        yield
        return
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def _round(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)


def apply_views(images: Tensor, views: Views, size: int, rounding: bool = False) -> Tensor:
    """Show each of ``images`` [n, c, height, width] through its own view: [n, c, size, size]."""
    rows, columns = view_matrices(views, images.shape[-2], images.shape[-1], size)
    rows, columns = rows.to(images.device), columns.to(images.device)
    return apply_matrices(images[:, None], rows, columns, rounding)[:, 0]


@dataclass(frozen=True)
class Mix:
    """How the images of one batch are mixed.

    Attributes:
        permutation: [n] the partner of each image.
        box: (top, left, bottom, right) pasted from the partner (CutMix), empty where nothing is.
        weight: share of the image itself (Mixup); 1 with CutMix.
    """

    permutation: Tensor
    box: tuple[int, int, int, int]
    weight: float


def draw_mix(kind: str, alpha: float, count: int, size: int, generator: torch.Generator) -> Mix:
    """Draw the mix of a batch (section 2.3 of the family's specification).

    Args:
        kind: ``cutmix``, ``mixup`` or ``none``.
        alpha: both parameters of the Beta distribution.
        count: images in the batch.
        size: side of the images.
        generator: source of randomness.
    """
    nothing = (0, 0, 0, 0)
    if kind == "none":
        return Mix(torch.arange(count), nothing, 1.0)
    share = _draw_beta(alpha, generator)
    permutation = torch.randperm(count, generator=generator)
    if kind == "mixup":
        return Mix(permutation, nothing, share)
    side = int(size * math.sqrt(1 - share))
    top_centre, left_centre = torch.randint(0, size, (2,), generator=generator).tolist()
    top, bottom = max(top_centre - side // 2, 0), min(top_centre + side // 2, size)
    left, right = max(left_centre - side // 2, 0), min(left_centre + side // 2, size)
    return Mix(permutation, (top, left, bottom, right), 1.0)


def _draw_beta(alpha: float, generator: torch.Generator) -> float:
    # torch.distributions draws from the global generator; two gamma variables from ours give the same law.
    pair = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator)
    return float(pair[0] / pair.sum())


def draw_swaps(count: int, generator: torch.Generator) -> Tensor:
    """Draw which images have their halves swapped, top with bottom and left with right: [count, 2] bool."""
    return torch.rand(count, 2, generator=generator) < 0.5


def swap_halves(images: Tensor, swap: Tensor) -> Tensor:
    """Shuffle four patches as RDED does: columns change places together, and so do rows.

    Args:
        images: [n, c, size, size] with an even side.
        swap: [n, 2] bool: top with bottom, left with right.
    """
    for axis, chosen in zip((2, 3), swap.unbind(dim=1), strict=True):
        rolled = images.roll(images.shape[axis] // 2, dims=axis)
        images = torch.where(chosen[:, None, None, None], rolled, images)
    return images


def normalise(pixels: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Map uint8 or 0..255 pixels [..., c, h, w] to normalised float32 values."""
    shape = (-1, 1, 1)
    mean_t = torch.as_tensor(mean, device=pixels.device).view(shape)
    std_t = torch.as_tensor(std, device=pixels.device).view(shape)
    return (pixels.float() / 255 - mean_t) / std_t


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float], truncate: bool = False) -> Tensor:
    """Map normalised images [..., c, h, w] to uint8 pixels, rounded to the nearest, or down with ``truncate``."""
    shape = (-1, 1, 1)
    mean_t = torch.tensor(mean, device=images.device).view(shape)
    std_t = torch.tensor(std, device=images.device).view(shape)
    scaled = (images * std_t + mean_t).clamp(0, 1) * 255
    return (scaled if truncate else scaled.round()).to(torch.uint8)


def pixel_bounds(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Normalised values of black and white: two tensors [3, 1, 1]."""
    mean_t, std_t = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    return -mean_t / std_t, (1 - mean_t) / std_t
