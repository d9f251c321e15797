"""``digits_photo``: handwritten digits on photographs, made from what scikit-learn carries; nothing to download."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import interpolate

from cvdd.data.config import DatasetConfig, DigitsOptions
from cvdd.data.dataset import RawData, check_same_classes
from cvdd.data.packing import ARTIFACT_KIND, read_images, write_images
from cvdd.data.resize import views_to_measure
from cvdd.data.source import TensorSource
from cvdd.support.seeds import generator

if TYPE_CHECKING:
    from cvdd.artifact import Store

Part = Literal["train", "test"]
CLASSES = tuple(str(digit) for digit in range(10))


def split_digits(labels: Tensor, options: DigitsOptions) -> dict[Part, Tensor]:
    """Divide the digits into a training and a test part, the same number of test digits per class.

    Args:
        labels: int64 ``[digits]``.
        options: number of test digits and the seed.

    Returns:
        For each part the sorted positions of its digits, int64.
    """
    per_class = options.test_digits // len(CLASSES)
    train, test = [], []
    for label in range(len(CLASSES)):
        members = (labels == label).nonzero().flatten()
        order = members[torch.randperm(len(members), generator=generator(options.seed, "digits split", label))]
        test.append(order[:per_class])
        train.append(order[per_class:])
    return {"train": torch.cat(train).sort().values, "test": torch.cat(test).sort().values}


def draw_images(part: Part, options: DigitsOptions, image_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Place every digit of a part on random crops of the photographs.

    The digit is enlarged (bilinear) to a random size, put at a random place, and blended by absolute difference, so it
    stays visible on bright and on dark ground and its colour is never a clue.

    Args:
        part: which digits; the two parts share none, but the photographs are the same.
        options: sizes, placements and the seed.
        image_size: side of the images, in pixels.

    Returns:
        Images uint8 ``[n, 3, image_size, image_size]``, labels int64 ``[n]`` and digit positions int64 ``[n]``.
    """
    digits = load_digits()
    shapes = torch.from_numpy(digits.images).float() / 16  # scikit-learn counts ink from 0 to 16
    labels = torch.from_numpy(digits.target).long()
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1).float() / 255 for photo in load_sample_images().images]
    placements = options.train_placements if part == "train" else options.test_placements
    groups = split_digits(labels, options)[part].repeat_interleave(placements)
    random = generator(options.seed, "digits placement", part)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=random))

    images = torch.empty((len(groups), 3, image_size, image_size), dtype=torch.uint8)
    for position, group in enumerate(groups.tolist()):
        photo = photos[between(0, len(photos) - 1)]
        side = between(*options.crop_range)
        top, left = between(0, photo.shape[1] - side), between(0, photo.shape[2] - side)
        crop = photo[None, :, top : top + side, left : left + side]
        ground = interpolate(crop, size=(image_size, image_size), mode="bilinear", antialias=True)[0]
        size = between(*options.size_range)
        digit = interpolate(shapes[group][None, None], size=(size, size), mode="bilinear")[0, 0]
        ink = torch.zeros(image_size, image_size)
        row, column = between(0, image_size - size), between(0, image_size - size)
        ink[row : row + size, column : column + size] = digit
        images[position] = ((ground - ink).abs() * 255).round().clamp(0, 255).to(torch.uint8)
    return images, labels[groups], groups


def read(config: DatasetConfig, store: Store) -> RawData:
    """Make (once) and load the dataset.

    Raises:
        ConfigError: ``dataset.classes`` is not the ten digits in order.
    """
    check_same_classes(config.classes, CLASSES, "digits_photo")
    options = config.digits or DigitsOptions()

    def load(part: Part) -> TensorSource:
        identity = {"source": "digits_photo", "part": part, "image_size": config.image_size, **options.model_dump()}

        def build(directory: Path) -> Mapping[str, Any]:
            return write_images(directory, *draw_images(part, options, config.image_size))

        return read_images(store.make(ARTIFACT_KIND, f"{config.name}-{part}", identity, [], build))

    return RawData(
        config.classes,
        load("train"),
        lambda: views_to_measure(load("test"), config.test_resize),
        config.mean,
        config.std,
    )
