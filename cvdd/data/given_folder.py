"""Images that somebody else distilled: a folder for each class, under whichever name the field gives them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cvdd.artifact.manifest import file_checksum
from cvdd.data.folders import class_folders, scan, warn_of_left_out
from cvdd.data.source import DamagedImage, FileSource
from cvdd.support.config_base import ConfigError

_OF_NO_FILE = re.compile(r"[^\w. -]")
"""What the name of a class may have and that of a folder should not."""
_BETWEEN = "_ -"
"""What may stand between the number and the name of a class."""


def class_folder(index: int, name: str, classes: int) -> str:
    """Name the folder of a class, so that folders sorted by name are in the order of the classes: ``0_airplane``."""
    return f"{index:0{len(str(classes - 1))}d}_{_in_a_path(name)}"


def _in_a_path(name: str) -> str:
    return _OF_NO_FILE.sub("_", name)


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
        named = set(found) & set(classes)
        missing = [name for name in classes if name not in found] if named else []
        missing = missing or [f"number {index}" for index in range(len(classes)) if numbered and index not in numbered]
        raise ConfigError(
            f"{field}={folder} holds {len(found)} class folders ({_some(found)}); needed are {len(classes)}, named as "
            f"the classes ({_some(classes)}) or numbered from 0 in their order "
            f"({class_folder(0, classes[0], len(classes))}, new000 or 00000, and so on)"
            + (f". There is none for {missing[0]}" if missing else "")
        )
    names = [numbered[index] for index in range(len(classes))]
    for index, name in enumerate(names):
        said = re.sub(r"^\D*\d+", "", name).lstrip(_BETWEEN)
        # The order of the classes is the likeliest mistake, and shows in nothing else. A class, too, may begin with
        # what stands between it and its number.
        if said and said != _in_a_path(classes[index]).lstrip(_BETWEEN):
            raise ConfigError(
                f"{field}={folder}: folder {name} should be of class {index} of dataset.classes, which is "
                f"{classes[index]}; is the set of other classes, or of another order? If it is not, name the folder "
                f"{class_folder(index, classes[index], len(classes))} or {index:05d}"
            )
    return names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def checksum_of(source: FileSource) -> str:
    """Return the SHA-256 of what all files hold, with their classes; their names only put them in order."""
    content = hashlib.sha256()
    for index, label in enumerate(source.labels.tolist()):
        content.update(f"{label} {file_checksum(source.path(index))}\n".encode())
    return content.hexdigest()


def check_sizes(source: FileSource, side: int, field: str) -> None:
    """Look at the size of every image, which is at its file's beginning.

    Raises:
        ConfigError: an image has another side, or is none.
    """
    for index in range(len(source)):
        try:
            with Image.open(source.path(index)) as image:
                width, height = image.size
        except (OSError, SyntaxError, ValueError) as error:
            raise ConfigError(f"{field}: {source.path(index)} cannot be read as an image ({error})") from error
        if (width, height) != (side, side):
            raise ConfigError(
                f"{field}: {source.path(index)} has {width}x{height} pixels, and dataset.image_size={side}. Type the "
                "size of these images, or choose others: none are resized"
            )


def read_given(source: FileSource, classes: int, side: int) -> Tensor:
    """Decode images whose sizes were looked at.

    Args:
        source: the same number of images of each class, class by class.
        classes: number of classes.
        side: of the images in pixels.

    Returns:
        [classes, images of each, 3, side, side] uint8.

    Raises:
        DamagedImage: files cannot be decoded, all of which were looked at.
    """
    pixels, damaged = torch.empty(len(source), 3, side, side, dtype=torch.uint8), list[str]()
    for index, image in enumerate(pixels):
        try:
            image.copy_(source.image(index))
        except DamagedImage as error:
            damaged.append(str(error))
    if damaged:
        raise DamagedImage.of_all(damaged, len(source))
    return pixels.view(classes, -1, 3, side, side)
