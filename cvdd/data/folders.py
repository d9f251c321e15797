"""Datasets laid out as one folder per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from cvdd.data.config import DatasetConfig
from cvdd.data.dataset import check_same_classes
from cvdd.data.source import FileSource
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)


def data_root(config: DatasetConfig) -> Path:
    """Return the raw data's folder, which need not exist."""
    return Path(config.root or ".").expanduser().resolve()


def missing_data(config: DatasetConfig, layout: str, downloadable: bool) -> ConfigError:
    """Return the error for raw data that is not there; it says what to type and what is expected."""
    choices = "type dataset.root=FOLDER for data you have" + (
        ", or dataset.download=true to fetch it" if downloadable else ""
    )
    return ConfigError(
        f"{config.name}: no data in dataset.root={data_root(config)}; {choices}. Expected in that folder: {layout}"
    )


def class_folders(part: Path) -> list[str]:
    """Return the names of the class folders of ``part``, sorted; hidden ones are left out."""
    return sorted(entry.name for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def is_image_name(path: str) -> bool:
    """Whether a file name is that of an image; hidden files such as ``._x.jpg`` are not."""
    return path.lower().endswith(IMG_EXTENSIONS) and not Path(path).name.startswith(".")


def warn_of_left_out(part: Path, classes: Sequence[str]) -> None:
    """Say which files and folders of a user's own images look like images or classes and are not read.

    Args:
        part: folder of one part of the data.
        classes: folder names that are read.
    """
    Image.init()
    others = {suffix for suffix in Image.registered_extensions() if suffix not in IMG_EXTENSIONS} | {".heic", ".heif"}
    found = sorted(
        Path(folder, file).relative_to(part)
        for name in classes
        for folder, _, files in os.walk(part / name, followlinks=True)
        for file in files
        if Path(file).suffix.lower() in others and file[0] != "."
    )
    if found:
        log.warning(
            "%s: %d files are left out, because %s is none of %s; convert them to have them read: %s%s",
            part,
            len(found),
            ", ".join(sorted({path.suffix.lower() for path in found})),
            ", ".join(IMG_EXTENSIONS),
            ", ".join(path.as_posix() for path in found[:3]),
            ", ..." * (len(found) > 3),
        )
    for entry in sorted(part.iterdir()):
        hidden = entry.name.startswith(".") and entry.is_dir()
        if hidden and any(path.name.lower().endswith(IMG_EXTENSIONS) for path in entry.iterdir()):
            log.warning("%s: class folder %s is left out, because its name begins with a dot", part, entry.name)


def scan(part: Path, classes: Sequence[str], field: str = "dataset.root") -> FileSource:
    """List the images of every class folder of ``part``, sub-folders included, in class order, then by name.

    Args:
        part: folder of one part of the data, e.g. ``root/train``.
        classes: folder names in label order.
        field: that names the folder, or one above it, for messages.

    Raises:
        ConfigError: a class folder is missing or holds no image (the class is named).
    """
    absent = [name for name in classes if not (part / name).is_dir()]
    if absent:
        raise ConfigError(f"class {absent[0]!r} has no folder in {part}; correct dataset.classes or {field}")
    found = make_dataset(
        str(part), {name: label for label, name in enumerate(classes)}, is_valid_file=is_image_name, allow_empty=True
    )
    prefix = len(str(part)) + 1
    # torchvision walks the classes by name; labels follow the order of `classes`.
    found.sort(key=lambda sample: sample[1])
    labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(classes))
    if (counts == 0).any():
        empty = classes[int((counts == 0).nonzero()[0])]
        raise ConfigError(
            f"class {empty!r} has no image in {part / empty} (looked for {', '.join(IMG_EXTENSIONS)}); "
            f"add images or correct {field}"
        )
    return FileSource(part, [path[prefix:] for path, _ in found], labels)


def sorted_classes(config: DatasetConfig, part: Path, expected: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the class folders of ``part`` in sorted order after checking them.

    Args:
        config: gives the expected number and, unless empty, the expected names.
        part: folder with one folder per class.
        expected: names to expect when ``config.classes`` is empty; empty = any.

    Raises:
        ConfigError: the number or a name is not the expected one.
    """
    found = class_folders(part)
    if config.num_classes is not None and len(found) != config.num_classes:
        raise ConfigError(
            f"{config.name}: {part} holds {len(found)} class folders, expected {config.num_classes}; "
            "correct dataset.root (or dataset.num_classes and dataset.classes for another selection)"
        )
    names = config.classes or tuple(expected) or tuple(found)
    check_same_classes(names, found, f"folders of {part}")
    return tuple(names)
