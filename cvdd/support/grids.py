"""Images beside each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.utils import make_grid

ENLARGED = 64
"""Side in pixels to which small images are enlarged."""


def image_grid(images: Tensor, columns: int | None = None, enlarge_to: int = ENLARGED) -> Tensor:
    """Tile images [n, 3, h, w] uint8 into one [3, H, W] uint8; small ones are enlarged without smoothing."""
    factor = max(1, round(enlarge_to / images.shape[-1]))
    large = images.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
    grid: Tensor = make_grid(large.cpu(), nrow=columns or min(len(images), 10), padding=2, pad_value=255)
    return grid.to(torch.uint8)
