"""Images that somebody else distilled: a folder for each class, under whichever name the field gives them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cvdd.artifact.manifest import file_checksum
from cvdd.config_base import ConfigError
from cvdd.data.folders import class_folders, scan, warn_of_left_out
from cvdd.data.source import FileSource


def scan_given(folder: Path, classes: Sequence[str], field: str) -> FileSource:
    """List the images of a distilled set, class by class, then by name.

    Class folders bear the names of the classes, or numbers from 0 in their order: ``0_airplane`` as
    ``python -m cvdd.distilled`` writes them, ``new000`` as the published programs do, or ``00000``.

    Args:
        folder: of the class folders.
        classes: names in label order.
        field: that names the folder, for messages.

    Raises:
        ConfigError: there is no such folder, or its folders are not one for each class.
    """
    if not folder.is_dir():
        raise ConfigError(f"{field}={folder}: there is no such directory")
    names = _in_order(folder, classes, field)
    warn_of_left_out(folder, names)
    return scan(folder, names, field)


def _in_order(folder: Path, classes: Sequence[str], field: str) -> list[str]:
    found = class_folders(folder)
    if found == sorted(classes):
        return list(classes)
    numbered = {int(number[0]): name for name in found if (number := re.search(r"\d+", name))}
    if len(found) != len(classes) or sorted(numbered) != list(range(len(classes))):
        raise ConfigError(
            f"{field}={folder} holds {len(found)} class folders ({', '.join(found[:3])}{', ...' * (len(found) > 3)}); "
            f"needed are {len(classes)}, named as the classes ({', '.join(classes[:3])}, ...) or numbered in their "
            f"order (0_{classes[0]}, new000 or 00000, ...)"
        )
    names = [numbered[index] for index in range(len(classes))]
    for index, name in enumerate(names):
        said = re.sub(r"^\D*\d+[_ -]*", "", name)
        if said in classes and said != classes[index]:
            raise ConfigError(
                f"{field}={folder}: folder {name} is of class {said}, which is number {list(classes).index(said)} of "
                "dataset.classes; the set was made with the classes in another order. Rename its folders, or correct "
                "dataset.classes"
            )
    return names


def checksum_of(source: FileSource) -> str:
    """Return the SHA-256 of what all files hold, with their classes; their names only put them in order."""
    content = hashlib.sha256()
    for index, label in enumerate(source.labels.tolist()):
        content.update(f"{label} {file_checksum(source.path(index))}\n".encode())
    return content.hexdigest()


def read_given(source: FileSource, classes: int, count: int, side: int, field: str) -> Tensor:
    """Decode the first images of each class.

    Args:
        source: of :func:`scan_given`.
        classes: number of classes, each with at least so many images.
        count: images of each class.
        side: that they must have in pixels.
        field: that names the folder, for messages.

    Returns:
        [classes, count, 3, side, side] uint8.

    Raises:
        ConfigError: an image has another size.
        DamagedImage: a file cannot be decoded.
    """
    pixels = torch.empty(classes, count, 3, side, side, dtype=torch.uint8)
    for label in range(classes):
        for place, index in enumerate((source.labels == label).nonzero()[:count, 0].tolist()):
            image = source.image(index)
            if image.shape[1:] != (side, side):
                raise ConfigError(
                    f"{field}: {source.path(index)} has {image.shape[2]}x{image.shape[1]} pixels, and "
                    f"dataset.image_size={side}. Type the size of these images, or choose others: none are resized"
                )
            pixels[label, place] = image
    return pixels
