"""A user's own images: one folder per class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cvdd.data.config import DatasetConfig
from cvdd.data.dataset import RawData, check_same_classes, class_hash
from cvdd.data.folders import class_folders, data_root, missing_data, scan, warn_of_left_out
from cvdd.data.packing import pack, read_images
from cvdd.data.source import FileSource, ImageSource
from cvdd.support.config_base import ConfigError

if TYPE_CHECKING:
    from cvdd.artifact import Artifact, Store

LARGEST_IN_MEMORY = 2 * 1024**3
"""A part (train or test) of at most this many bytes is held decoded in memory."""

_LAYOUT = "train/<class>/*.jpg and test/<class>/*.jpg (or val/<class>/*.jpg)"


def read(config: DatasetConfig, store: Store) -> RawData:
    """Read a folder of class folders; images that fit are resized, centre cropped and held in memory.

    Channel statistics are measured over the whole training folder, once, and kept in the store.

    Raises:
        ConfigError: a folder is missing or empty, the classes are not those of ``dataset.classes``, or a channel is the
            same in all images, so that nothing can be measured to normalise it by.
        ValueError: an image is damaged (it is named).
    """
    root = data_root(config)
    if not (root / "train").is_dir():
        raise missing_data(config, _LAYOUT, downloadable=False)
    classes = _classes(config, root / "train")
    files = scan(root / "train", classes)
    warn_of_left_out(root / "train", classes)
    train: ImageSource = files
    mean, std = config.mean, config.std
    if _fits(config, files) or not mean:
        packed = _pack(config, store, "train", classes, files, None)
        if not mean:
            mean, std = tuple(packed.metrics["mean"]), tuple(packed.metrics["std"])
            _refuse_constant_channels(config, mean, std)
        train = read_images(packed) if _fits(config, files) else files

    def test() -> ImageSource:
        part = _test_part(root)
        if part is None:
            raise ConfigError(
                f"{config.name}: no test folder in dataset.root={root}. Expected there: {_LAYOUT}; or type "
                "dataset.evaluate_on=validation to hold out a part of the training images"
            )
        check_same_classes(sorted(classes), class_folders(part), f"folders of {part} beside those of train")
        found = scan(part, classes)
        warn_of_left_out(part, classes)
        if not _fits(config, found):
            return found
        return read_images(_pack(config, store, "test", classes, found, config.test_resize))

    return RawData(classes, train, test, mean, std)


def _refuse_constant_channels(config: DatasetConfig, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    constant = [name for name, spread in zip(("red", "green", "blue"), std, strict=True) if spread == 0]
    if constant:
        middle = ",".join(f"{value:.4g}" for value in mean)
        raise ConfigError(
            f"dataset.root={config.root}: {' and '.join(constant)} is the same in all pixels of the training images "
            f"and cannot be normalised by its spread. If that is meant, set dataset.mean=[{middle}] and "
            f"dataset.std=[{','.join(f'{spread or 1:.4g}' for spread in std)}]"
        )


def count_images(config: DatasetConfig) -> tuple[int, int, int] | None:
    """Count what is there without decoding any image.

    Returns:
        classes, training images and test images; None if there is no such folder.
    """
    root = data_root(config)
    if not (root / "train").is_dir():
        return None
    classes = _classes(config, root / "train")
    part = _test_part(root)
    return len(classes), len(scan(root / "train", classes)), 0 if part is None else len(scan(part, classes))


def _test_part(root: Path) -> Path | None:
    return next((root / name for name in ("test", "val") if (root / name).is_dir()), None)


def _classes(config: DatasetConfig, part: Path) -> tuple[str, ...]:
    found = class_folders(part)
    if len(found) < 2:
        raise ConfigError(f"{config.name}: {part} holds {len(found)} class folders, at least 2 are needed: {_LAYOUT}")
    if config.num_classes not in (None, len(found)):
        raise ConfigError(
            f"dataset.num_classes={config.num_classes}: {part} holds {len(found)} class folders; "
            "use that number or null"
        )
    if not config.classes:
        return tuple(found)
    # A list in the yaml decides the order; folders carry none, so only the names are compared.
    check_same_classes(sorted(config.classes), found, f"folders of {part} (both lists sorted)")
    return config.classes


def _fits(config: DatasetConfig, files: FileSource) -> bool:
    return len(files) * 3 * config.image_size**2 <= LARGEST_IN_MEMORY


def _pack(
    config: DatasetConfig,
    store: Store,
    part: str,
    classes: tuple[str, ...],
    files: FileSource,
    shorter_side: int | None,
) -> Artifact:
    identity = {"source": config.source, "part": part, "class_hash": class_hash(classes)}
    name = f"{config.name}-{part}"
    return pack(store, name, identity, files, config.image_size, shorter_side, keep=_fits(config, files))
