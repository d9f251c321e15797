"""FADRM: between stages the synthetic images get some of their real ones back (specification of FADRM, section 2)."""

from __future__ import annotations

from torch import Tensor, nn


def adjustable_residual(images: Tensor, real: Tensor, kept: float, size: int) -> Tensor:
    """Blend images with real ones, both at the next stage's size (specification, section 2).

    Args:
        images: [units, images, 3, h, w] as the stage left them.
        real: [units, images, 3, h', w'] what comes back; in FADRM the images as they were before the first stage.
        kept: share of ``images``; the rest is ``real``.
        size: side in the next stage.

    Returns:
        [units, images, 3, size, size].
    """
    if kept == 1:
        return resized(images, size)
    return kept * resized(images, size) + (1 - kept) * resized(real, size)


def resized(images: Tensor, size: int) -> Tensor:
    """Resize images [units, images, 3, h, w] bilinearly to a side of ``size``; as they are where it is theirs."""
    if images.shape[-1] == size:
        return images
    units = len(images)
    changed: Tensor = nn.functional.interpolate(
        images.flatten(0, 1), (size, size), mode="bilinear", align_corners=False
    )
    return changed.view(units, -1, *changed.shape[1:])
