"""The evaluation view of an image: shorter side resized, centre cropped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from cvdd.data.source import ImageSource, TensorSource


def resize_and_crop(image: Tensor, image_size: int, shorter_side: int | None = None) -> Tensor:
    """Resize the shorter side (bilinear, antialiased) and cut the centre square.

    Args:
        image: uint8 ``[..., 3, height, width]``.
        image_size: side of the square, in pixels.
        shorter_side: length of the shorter side after the resize, in pixels; by default ``image_size``.

    Returns:
        uint8 ``[..., 3, image_size, image_size]``.
    """
    target = image_size if shorter_side is None else shorter_side
    if min(image.shape[-2:]) != target:
        image = functional.resize(image, [target], antialias=True)
    square: Tensor = functional.center_crop(image, [image_size, image_size])
    return square


def views_to_measure(source: TensorSource, shorter_side: int | None) -> TensorSource:
    """Return images to measure on, of which a larger ``dataset.test_resize`` leaves only the centre.

    Args:
        source: images of the size that networks see.
        shorter_side: before the centre crop, in pixels; None leaves the images as they are.
    """
    images = source.stacked()
    if shorter_side is None or shorter_side == images.shape[-1]:
        return source
    return TensorSource(resize_and_crop(images, images.shape[-1], shorter_side), source.labels, source.groups)


def to_eval_tensor(
    source: ImageSource, image_size: int, test_resize: int | None, indices: Sequence[int] | Tensor
) -> Tensor:
    """Return the evaluation views of some images.

    Images held in memory at ``image_size`` are returned as they are: whatever resize they need has been done when they
    were read, and a second one would zoom in twice.

    Args:
        source: where the images are.
        image_size: side of the result, in pixels.
        test_resize: shorter side before the centre crop, in pixels; None means ``image_size``.
        indices: n positions in ``source``.

    Returns:
        uint8 ``[n, 3, image_size, image_size]``, not normalised.

    Raises:
        ValueError: a file is damaged (it is named).
    """
    chosen = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
    if source.in_memory:
        images = source.stacked()
        if images.shape[-1] == image_size:
            return images[chosen]
    views = torch.empty((len(chosen), 3, image_size, image_size), dtype=torch.uint8)
    for position, index in enumerate(chosen.tolist()):
        views[position] = resize_and_crop(source.image(index), image_size, test_resize)
    return views
