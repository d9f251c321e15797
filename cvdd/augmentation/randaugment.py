"""RandAugment with its usual settings, as parameters that are drawn apart from being applied.

Two operations for each image, each with magnitude 9 of 0..30, as torchvision's class of that name has them. An
operation is a number: its place in :data:`OPERATIONS`, negative if the magnitude is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import functional as vision

PER_IMAGE = 2
"""Operations on each image."""


def _strength(largest: float) -> float:
    """Magnitude 9 of 0..30, in the precision that torchvision computes it in: rounded pixels depend on it."""
    return float(torch.linspace(0.0, largest, 31)[9])


SHEAR, ROTATION, CHANGE = _strength(0.3), _strength(30.0), _strength(0.9)


def _shear(images: Tensor, x: float, y: float) -> Tensor:
    degrees = [math.degrees(math.atan(share)) for share in (x, y)]
    return _tensor(vision.affine(images, 0.0, [0, 0], 1.0, degrees, center=[0, 0]))


def _translate(images: Tensor, x: float, y: float) -> Tensor:
    shift = [int(sign * _strength(150 / 331 * side)) for sign, side in ((x, images.shape[-1]), (y, images.shape[-2]))]
    return _tensor(vision.affine(images, 0.0, shift, 1.0, [0.0, 0.0]))


def _tensor(images: object) -> Tensor:
    assert isinstance(images, Tensor)
    return images


Operation = Callable[[Tensor, float], Tensor]

SIGNED: dict[str, Operation] = {
    "shear x": lambda images, sign: _shear(images, sign * SHEAR, 0.0),
    "shear y": lambda images, sign: _shear(images, 0.0, sign * SHEAR),
    "translate x": lambda images, sign: _translate(images, sign, 0.0),
    "translate y": lambda images, sign: _translate(images, 0.0, sign),
    "rotate": lambda images, sign: _tensor(vision.rotate(images, sign * ROTATION)),
    "brightness": lambda images, sign: _tensor(vision.adjust_brightness(images, 1 + sign * CHANGE)),
    "colour": lambda images, sign: _tensor(vision.adjust_saturation(images, 1 + sign * CHANGE)),
    "contrast": lambda images, sign: _tensor(vision.adjust_contrast(images, 1 + sign * CHANGE)),
    "sharpness": lambda images, sign: _tensor(vision.adjust_sharpness(images, 1 + sign * CHANGE)),
}
UNSIGNED: dict[str, Operation] = {
    "posterize": lambda images, _: _tensor(vision.posterize(images, 7)),
    "solarize": lambda images, _: _tensor(vision.solarize(images, 178.5)),
    "autocontrast": lambda images, _: _tensor(vision.autocontrast(images)),
    "equalize": lambda images, _: _tensor(vision.equalize(images)),
}
OPERATIONS: dict[str, Operation] = {"identity": lambda images, _: images, **SIGNED, **UNSIGNED}
"""By number, from 0."""


def draw_operations(count: int, generator: torch.Generator) -> Tensor:
    """Draw two operations for each image, all equally likely, with either sign where there is one.

    Returns:
        [count, 2] integers.
    """
    chosen = torch.randint(len(OPERATIONS), (count, PER_IMAGE), generator=generator)
    negative = torch.rand(count, PER_IMAGE, generator=generator) < 0.5
    return torch.where(negative & (chosen <= len(SIGNED)), -chosen, chosen)


def apply_operations(images: Tensor, operations: Tensor) -> Tensor:
    """Change each image by its own operations, one after the other.

    Args:
        images: [n, 3, h, w] uint8.
        operations: [n, k] of :func:`draw_operations`.
    """
    changes = list(OPERATIONS.values())
    for column in operations.unbind(dim=1):
        images = images.clone()
        for number in column.unique().tolist():
            chosen = column == number
            images[chosen] = changes[abs(number)](images[chosen], math.copysign(1, number))
    return images
