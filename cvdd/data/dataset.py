"""A loaded dataset and the identity by which later artefacts know it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from cvdd.data.source import ImageSource
from cvdd.support.config_base import ConfigError

DESCRIBED = "described"
"""In the identity of a data set that is not there."""


@dataclass(frozen=True)
class RawData:
    """What a reader finds, before any split.

    Attributes:
        classes: class names in label order.
        train: all training images.
        test: reads the test images; a function, so that a run on validation data never touches them.
        mean: channel means of pixels in [0, 1].
        std: channel standard deviations of pixels in [0, 1].
    """

    classes: tuple[str, ...]
    train: ImageSource
    test: Callable[[], ImageSource]
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Data:
    """A dataset ready for use.

    Attributes:
        train: training images.
        test: images to measure on; with ``evaluate_on=validation`` a part of the training data.
        classes: class names in label order.
        mean: channel means of pixels in [0, 1], RGB.
        std: channel standard deviations of pixels in [0, 1], RGB.
        image_size: side of the images that networks see, in pixels.
        name: the dataset's readable name.
        identity: JSON description of everything that changes the content; ``identity["train"]`` and
            ``identity["test"]`` describe the two parts, the other keys hold for both.
    """

    train: ImageSource
    test: ImageSource
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    name: str
    identity: dict[str, Any]

    @property
    def class_hash(self) -> str:
        """Hash of the class names in order, 16 hexadecimal digits."""
        return class_hash(self.classes)


def is_described(data: Data) -> bool:
    """Whether nothing is known of a data set but its size, because it is not there (:mod:`cvdd.cost.sizes`)."""
    return DESCRIBED in data.identity


def class_hash(classes: Sequence[str]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the JSON list of class names."""
    return hashlib.sha256(json.dumps(list(classes)).encode()).hexdigest()[:16]


def check_same_classes(expected: Sequence[str], found: Sequence[str], what: str) -> None:
    """Refuse two class lists that differ in a name, in length or in order.

    A network whose outputs are in another class order than the labels trains without an error and scores near chance,
    so every place where two lists meet calls this.

    Args:
        expected: class names in the order of the dataset.
        found: class names in the order of the other party.
        what: the other party, for the message, e.g. ``"teacher resnet18"``.

    Raises:
        ConfigError: naming the first index where the lists differ, and both names.
    """
    for index, (ours, theirs) in enumerate(zip_longest(expected, found)):
        if ours != theirs:
            raise ConfigError(
                f"{what}: the class lists differ first at index {index}: expected "
                f"{'no class' if ours is None else repr(ours)}, found {'no class' if theirs is None else repr(theirs)} "
                f"({len(expected)} classes expected, {len(found)} found); correct dataset.classes or the data, "
                "order included"
            )
