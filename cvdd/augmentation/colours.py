"""Changes of colour and sharpness of image batches, as parameters that are drawn apart from being applied.

They are those of torchvision's ``ColorJitter``, ``RandomGrayscale`` and ``GaussianBlur``, with parameters of each
image's own, for a whole batch at once: torchvision has one set for all images of a batch, and draws from PyTorch's
global generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SIGMAS = (0.1, 2.0)
"""Standard deviations of a blur in pixels: the least and the largest (SimCLR; MoCo v2)."""
_UNCHANGED = (1.0, 1.0, 1.0, 0.0)
"""Factors of brightness, contrast and saturation, and the turn of the hue."""
_LUMA = (0.2989, 0.587, 0.114)
"""Shares of red, green and blue in grey, as torchvision has them."""


class Colours(NamedTuple):
    """How each image of a batch is changed.

    Attributes:
        amounts: [n, 4]: factors of brightness, contrast and saturation, 1 for none, and the turn of the hue in
            rotations, 0 for none.
        orders: [n, 4], in which order these four are applied.
        grey: [n] bool, whether only grey is left.
        sigmas: [n] of the blur in pixels, 0 for none.
    """

    amounts: Tensor
    orders: Tensor
    grey: Tensor
    sigmas: Tensor


def draw_colours(
    count: int,
    changes: tuple[float, float, float, float],
    changed: float,
    grey: float,
    blurred: float,
    source: torch.Generator,
) -> Colours:
    """Draw how each image is changed.

    Args:
        count: images.
        changes: largest change of brightness, contrast, saturation and hue.
        changed: share of images that are changed so.
        grey: share of images without colours.
        blurred: share of images that are blurred.
        source: of the draws.
    """
    largest = torch.tensor(changes)
    none = torch.tensor(_UNCHANGED)
    amounts = none + (2 * torch.rand(count, 4, generator=source) - 1) * largest
    orders = torch.rand(count, 4, generator=source).argsort(dim=1)
    chosen = torch.rand(count, 3, generator=source) < torch.tensor([changed, grey, blurred])
    sigmas = torch.empty(count).uniform_(*SIGMAS, generator=source)
    return Colours(
        torch.where(chosen[:, :1], amounts, none), orders, chosen[:, 1], torch.where(chosen[:, 2], sigmas, 0.0)
    )


def apply_colours(images: Tensor, drawn: Colours) -> Tensor:
    """Change images as it was drawn.

    Args:
        images: [n, 3, h, w] float 0..255.
        drawn: for the n images, on the CPU.

    Returns:
        [n, 3, h, w] float 0..255.
    """
    device = images.device
    changed = (drawn.amounts != torch.tensor(_UNCHANGED)).any(dim=1)
    # Positions are found where they were drawn, because a device would have to be waited for.
    images = images / 255
    for place in range(4):
        for kind, change in enumerate((_brighter, _more_contrast, _more_saturated, _turned)):
            (rows,) = ((drawn.orders[:, place] == kind) & changed).nonzero(as_tuple=True)
            if len(rows):
                amount = drawn.amounts[rows, kind].to(device, non_blocking=True)[:, None, None, None]
                rows = rows.to(device, non_blocking=True)
                images[rows] = change(images[rows], amount)
    grey = drawn.grey.to(device, non_blocking=True)[:, None, None, None]
    images = torch.where(grey, _grey(images), images)
    (rows,) = drawn.sigmas.nonzero(as_tuple=True)
    if len(rows):
        sigmas, rows = (values.to(device, non_blocking=True) for values in (drawn.sigmas[rows], rows))
        height, width = images.shape[-2:]
        down, across = blur_matrices(sigmas, height), blur_matrices(sigmas, width)
        images[rows] = down[:, None] @ images[rows] @ across[:, None].transpose(-1, -2)
    return images * 255


def blur_matrices(sigmas: Tensor, size: int) -> Tensor:
    """Return the matrices that blur an axis: what lies outside of the image has no weight.

    Args:
        sigmas: [n] standard deviations in pixels.
        size: pixels of the axis.

    Returns:
        [n, size, size]; every row sums to 1.
    """
    place = torch.arange(size, device=sigmas.device)
    apart = (place[:, None] - place[None]) / sigmas[:, None, None]
    weights = torch.exp(-0.5 * apart**2)
    return weights / weights.sum(dim=2, keepdim=True)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = _LUMA
    return (red * images[:, 0] + green * images[:, 1] + blue * images[:, 2])[:, None].expand_as(images)


def _blend(images: Tensor, other: Tensor | float, amount: Tensor) -> Tensor:
    return (amount * images + (1 - amount) * other).clamp(0, 1)


def _brighter(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, 0.0, amount)


def _more_contrast(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), amount)


def _more_saturated(images: Tensor, amount: Tensor) -> Tensor:
    return _blend(images, _grey(images), amount)


def _turned(images: Tensor, amount: Tensor) -> Tensor:
    """Turn the hue: a colour keeps its largest and its least part, and which is which moves on around the circle."""
    largest, least = images.amax(dim=1), images.amin(dim=1)
    spread = largest - least
    red, green, blue = images.unbind(dim=1)
    safe = torch.where(spread > 0, spread, 1.0)
    sextant = torch.where(
        largest == red,
        (green - blue) / safe,
        torch.where(largest == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sextant + 6 * amount[:, 0]
    # How far each colour is from the middle of its third of the circle decides how much of the spread it gets.
    centres = 2 * torch.arange(3, device=images.device)[:, None, None]
    away = ((turned[:, None] - centres + 3) % 6 - 3).abs()
    return least[:, None] + spread[:, None] * (2 - away).clamp(0, 1)
