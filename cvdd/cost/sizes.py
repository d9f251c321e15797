"""What a data set is before it is there: as many images and classes as its configuration or its publication says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from cvdd.artifact import Store
from cvdd.data import Data, DatasetConfig, DigitsOptions, load_data
from cvdd.data.dataset import DESCRIBED
from cvdd.data.image_folder import LARGEST_IN_MEMORY, count_images
from cvdd.support.config_base import ConfigError

PUBLISHED: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "cifar10": (50_000, 10_000, 10),
        "cifar100": (50_000, 10_000, 100),
        "tiny_imagenet": (100_000, 10_000, 200),
        "imagenette": (9_469, 3_925, 10),
        "imagewoof": (9_025, 3_929, 10),
        "imagenet1k": (1_281_167, 50_000, 1000),
    }
)
"""Training images, test images and classes of the published data sets, by source."""

DIGITS = 1797
"""Handwritten digits that scikit-learn carries."""

_FROM_FILES = ("imagenette", "imagewoof", "imagenet1k")


class NotMade(Exception):
    """Something is asked for that the store does not hold."""


class CountedImages:
    """Images of which nothing is known but their number; each class has equally many.

    Args:
        count: number of images.
        classes: number of classes.
        in_memory: whether the real ones would be held decoded.
    """

    def __init__(self, count: int, classes: int, in_memory: bool) -> None:
        self._in_memory = in_memory
        self.labels = torch.arange(count) * classes // max(count, 1)
        self.groups = torch.arange(count)

    @property
    def in_memory(self) -> bool:
        """Whether the real ones would be held decoded."""
        return self._in_memory

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        """Refuse: there are no pixels."""
        raise NotMade(f"image {index}")

    def stacked(self) -> Tensor:
        """Refuse: there are no pixels."""
        raise NotMade("images")

    def subset(self, indices: Sequence[int] | Tensor) -> CountedImages:
        """Return as many images as there are indices."""
        return CountedImages(len(indices), int(self.labels.max()) + 1, self._in_memory)

    def digest(self) -> str:
        """Return what no real images have."""
        return f"{len(self)} images"


def sized_data(config: DatasetConfig, store: Store) -> tuple[Data, str | None]:
    """Load a data set if that makes and fetches nothing, describe it otherwise.

    Args:
        config: the data set.
        store: from which decoded images are read; it raises :class:`NotMade` for those that it does not hold.

    Returns:
        the data set, and, where it is only described, why.

    Raises:
        ConfigError: it is not there, and its size is nowhere written.
    """
    try:
        return load_data(config.model_copy(update={"download": False}), store), None
    except NotMade:
        return _described(config), f"{config.name} is not decoded yet; sizes are those of its configuration, or counted"
    except ConfigError as error:
        sizes = "the published ones" if config.source in PUBLISHED else "those of its configuration"
        return _described(config), f"{config.name} is not there, so sizes are {sizes} ({error})"


def _described(config: DatasetConfig) -> Data:
    counted = count_images(config) if config.source == "image_folder" else None
    classes = len(config.classes) or config.num_classes or (counted and counted[0])
    if classes is None:
        raise _unknown(config, "number of classes")
    train, test = _counts(config, classes, counted and counted[1:])
    images = train + test
    in_memory = config.source not in _FROM_FILES
    if config.source == "image_folder":
        in_memory = images * 3 * config.image_size**2 <= LARGEST_IN_MEMORY
    # A described data set is none that anything was made of: its identity is no other's.
    identity = {DESCRIBED: json.loads(config.model_dump_json()), "train": train, "test": test}
    return Data(
        train=CountedImages(train, classes, in_memory),
        test=CountedImages(test, classes, in_memory),
        classes=config.classes or tuple(f"class {index}" for index in range(classes)),
        mean=config.mean or (0.5, 0.5, 0.5),
        std=config.std or (0.25, 0.25, 0.25),
        image_size=config.image_size,
        name=config.name,
        identity=identity,
    )


def _counts(config: DatasetConfig, classes: int, counted: tuple[int, int] | None) -> tuple[int, int]:
    """Training images, and images to measure on; some may have been counted."""
    whole = counted or _whole(config, classes)
    train: int | None = None
    test: int | None = None
    if whole is not None:
        train, test = whole
        if config.evaluate_on == "validation":
            test = round(train * config.validation_fraction)
            train -= test
    if config.train_per_class is not None:
        wanted = config.train_per_class * classes
        train = wanted if train is None else min(train, wanted)
    if config.test_per_class is not None:
        wanted = config.test_per_class * classes
        test = wanted if test is None else min(test, wanted)
    if train is None:
        raise _unknown(config, "number of training images")
    if test is None:
        raise _unknown(config, "number of images to measure on")
    return train, test


def _whole(config: DatasetConfig, classes: int) -> tuple[int, int] | None:
    if config.source == "digits_photo":
        options = config.digits or DigitsOptions()
        return (DIGITS - options.test_digits) * options.train_placements, options.test_digits * options.test_placements
    if config.source not in PUBLISHED:
        return None
    train, test, published = PUBLISHED[config.source]
    # Some use a few of the published classes.
    return train * classes // published, test * classes // published


def _unknown(config: DatasetConfig, what: str) -> ConfigError:
    return ConfigError(
        f"cost=true needs the {what} of {config.name}, and its images are not in dataset.root={config.root}. Type "
        "dataset.root=FOLDER, where they can be counted, or dataset.num_classes=N dataset.train_per_class=N "
        "dataset.test_per_class=N"
    )
