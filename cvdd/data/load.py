"""From a dataset yaml to images, labels and the identity later artefacts hash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cvdd.data import cifar, digits, image_folder, imagenet1k, imagenette, tiny_imagenet
from cvdd.data.config import DatasetConfig
from cvdd.data.dataset import Data, RawData, class_hash
from cvdd.data.resize import views_to_measure
from cvdd.data.source import ImageSource, TensorSource
from cvdd.data.splits import keep_per_class, split_validation
from cvdd.support.config_base import ConfigError

if TYPE_CHECKING:
    from cvdd.artifact import Store

READERS: Mapping[str, Callable[[DatasetConfig, Store], RawData]] = MappingProxyType(
    {
        "digits_photo": digits.read,
        "cifar10": cifar.read_cifar10,
        "cifar100": cifar.read_cifar100,
        "tiny_imagenet": tiny_imagenet.read,
        "imagenette": imagenette.read,
        "imagewoof": imagenette.read,
        "imagenet1k": imagenet1k.read,
        "image_folder": image_folder.read,
    }
)
"""The reader of every value of ``dataset.source``."""


def load_data(config: DatasetConfig, store: Store) -> Data:
    """Load a dataset: the training part and the part to measure on.

    With ``evaluate_on=validation`` the latter is cut from the training data and the test set is not read at all.
    Subsets per class are drawn after that split.

    Args:
        config: the dataset.
        store: keeps what is made once, such as decoded small images.

    Raises:
        ConfigError: data is missing or does not fit the config; the message says what to type.
        ValueError: a file is damaged; the message names it.
    """
    raw = READERS[config.source](config, store)
    _check(config, raw.train, len(raw.classes), "training")
    if isinstance(raw.train, TensorSource) and raw.train.side != config.image_size:
        raise ValueError(
            f"the reader of dataset.source={config.source} returns training images of {raw.train.side} pixels, and "
            f"dataset.image_size={config.image_size}"
        )
    if config.classes_per_unit > len(raw.classes):
        raise ConfigError(
            f"dataset.classes_per_unit={config.classes_per_unit}: {config.name} has only {len(raw.classes)} classes; "
            f"use 1 to {len(raw.classes)}"
        )
    if config.evaluate_on == "validation":
        train, test = split_validation(raw.train, raw.classes, config.validation_fraction, config.split_seed)
        if isinstance(test, TensorSource):
            test = views_to_measure(test, config.test_resize)
    else:
        train, test = raw.train, raw.test()
        _check(config, test, len(raw.classes), "test")
    if config.train_per_class is not None:
        count, override = config.train_per_class, "dataset.train_per_class"
        train = keep_per_class(train, raw.classes, count, config.split_seed, override)
    if config.test_per_class is not None:
        count, override = config.test_per_class, "dataset.test_per_class"
        test = keep_per_class(test, raw.classes, count, config.split_seed, override)
    return Data(
        train=train,
        test=test,
        classes=raw.classes,
        mean=raw.mean,
        std=raw.std,
        image_size=config.image_size,
        name=config.name,
        identity=_identity(config, raw, train, test),
    )


def _check(config: DatasetConfig, source: ImageSource, classes: int, part: str) -> None:
    """Hold a reader to what everything else relies on."""
    found = source.labels
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < classes:
        raise ValueError(
            f"the reader of dataset.source={config.source} returns {part} labels from {int(found.min())} to "
            f"{int(found.max())}, and {classes} classes; labels are from 0 to {classes - 1}"
        )


def _identity(config: DatasetConfig, raw: RawData, train: ImageSource, test: ImageSource) -> dict[str, Any]:
    split: dict[str, Any] = {"evaluate_on": config.evaluate_on}
    if config.evaluate_on == "validation":
        split |= {"validation_fraction": config.validation_fraction, "split_seed": config.split_seed}
    parts: dict[str, dict[str, Any]] = {}
    for name, source, per_class in (("train", train, config.train_per_class), ("test", test, config.test_per_class)):
        parts[name] = {**split, "images": len(source), "per_class": per_class, "content": source.digest()}
        if per_class is not None:
            parts[name]["split_seed"] = config.split_seed
    parts["test"]["test_resize"] = config.test_resize
    return {
        "name": config.name,
        "source": config.source,
        "class_hash": class_hash(raw.classes),
        "image_size": config.image_size,
        "mean": list(raw.mean),
        "std": list(raw.std),
        **parts,
    }
