"""RETA's choice of the real images that come back after a stage (arXiv 2602.24144, dynamic retrieval connection)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms import functional as vision

REACH = 3
"""Standard deviations of the Gaussian that its kernel reaches to either side."""


def complexity(images: Tensor, sigma: float) -> Tensor:
    """How much an image changes in some places and not in others: ``Var_u ||grad (G_sigma * o)(u)||^2``.

    Gradients are differences of neighbours, their squares summed over colours.

    Args:
        images: [n, 3, h, w], normalised.
        sigma: of the Gaussian, in pixels.

    Returns:
        [n].
    """
    height, width = images.shape[-2:]
    # What is reflected at the edges must be inside.
    reach = min(math.ceil(REACH * sigma), height - 1, width - 1)
    # Along one axis after the other, as it is separable.
    for kernel in ([2 * reach + 1, 1], [1, 2 * reach + 1]):
        images = vision.gaussian_blur(images, kernel, [sigma] * 2)
    down, right = torch.gradient(images, dim=(-2, -1))
    return (down.square() + right.square()).sum(dim=1).var(dim=(-2, -1), correction=0)


def best_fit(shown: Tensor, candidates: Tensor, complexities: Tensor, weight: float) -> Tensor:
    """Choose for each image the candidate with the least ``(1 - lambda) ||q - z||^2 + lambda c``.

    Args:
        shown: [n, k] features of the images, of any length; their directions count.
        candidates: [m, k] those of real images of the same class.
        complexities: [m] of the real images.
        weight: lambda.

    Returns:
        [n] positions among the candidates; the first of equals.
    """
    shown, candidates = (torch.nn.functional.normalize(features, dim=1) for features in (shown, candidates))
    # Of unit vectors.
    distance = 2 - 2 * shown @ candidates.T
    return ((1 - weight) * distance + weight * complexities).argmin(dim=1)
