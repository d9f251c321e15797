"""Tiny-ImageNet: 200 classes of 64-pixel images, in the layout of its zip archive."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torchvision.datasets.utils import download_and_extract_archive

from cvdd.data.config import DatasetConfig
from cvdd.data.dataset import RawData
from cvdd.data.folders import data_root, missing_data, scan, sorted_classes
from cvdd.data.packing import pack, read_images
from cvdd.data.source import FileSource, TensorSource
from cvdd.support.config_base import ConfigError

if TYPE_CHECKING:
    from cvdd.artifact import Store

_FOLDER = "tiny-imagenet-200"
_LAYOUT = (
    f"train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt (the archive's {_FOLDER} folder, or "
    "its parent)"
)


def read(config: DatasetConfig, store: Store) -> RawData:
    """Read Tiny-ImageNet; its validation part, the only labelled one besides training, is the test set.

    Raises:
        ConfigError: the data is missing or has other classes than expected, or the annotation file is damaged.
        ValueError: an image is damaged.
    """
    root = _find(config)
    classes = sorted_classes(config, root / "train")

    def load(part: str, files: FileSource, shorter_side: int | None = None) -> TensorSource:
        identity = {"source": config.source, "part": part}
        packed = pack(store, f"{config.name}-{part}", identity, files, config.image_size, shorter_side)
        return read_images(packed)

    return RawData(
        classes,
        load("train", scan(root / "train", classes)),
        lambda: load("test", annotated_files(root / "val", classes), config.test_resize),
        config.mean,
        config.std,
    )


def annotated_files(part: Path, classes: Sequence[str]) -> FileSource:
    """List the images of ``part/images`` with the labels of ``part/val_annotations.txt``.

    Only plain file names are accepted: a line of a file must not lead out of its folder.

    Raises:
        ConfigError: the annotations or an image are missing, a line is damaged, or a class has no image.
    """
    annotations = part / "val_annotations.txt"
    if not annotations.is_file():
        raise ConfigError(f"{annotations} is missing; correct dataset.root. Expected there: {_LAYOUT}")
    numbers = {name: label for label, name in enumerate(classes)}
    labelled: dict[str, int] = {}
    # Bytes that are no text become a mark, so that the line which has them is named like other damaged ones.
    text = annotations.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("\t")
        name = fields[0]
        plain = name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", "\N{REPLACEMENT CHARACTER}"}
        if len(fields) < 2 or not plain:
            raise ConfigError(
                f"{annotations}, line {number}: expected a plain file name, a tab and a class, found {line[:60]!r}; "
                "unpack the archive again"
            )
        if fields[1] not in numbers:
            raise ConfigError(
                f"{annotations}, line {number}: class {fields[1]!r} has no folder among the training data; unpack the "
                "archive again"
            )
        labelled[name] = numbers[fields[1]]
    present = {entry.name for entry in (part / "images").iterdir()} if (part / "images").is_dir() else set()
    absent = sorted(labelled.keys() - present)
    if absent:
        raise ConfigError(f"{part / 'images' / absent[0]} is missing ({len(absent)} in all); unpack the archive again")
    unseen = sorted(numbers.keys() - {classes[label] for label in labelled.values()})
    if unseen:
        raise ConfigError(f"class {unseen[0]!r} has no image in {part}; unpack the archive again")
    order = sorted(labelled, key=lambda name: (labelled[name], name))
    return FileSource(part / "images", order, torch.tensor([labelled[name] for name in order], dtype=torch.int64))


def _find(config: DatasetConfig) -> Path:
    root = data_root(config)
    candidates = [root, root / _FOLDER]
    if config.download and not any((folder / "train").is_dir() for folder in candidates):
        try:
            download_and_extract_archive(config.origin, str(root), md5=config.checksum.removeprefix("md5:") or None)
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"{config.name}: could not download into dataset.root={root} ({error}); fetch {config.origin} "
                "elsewhere and unpack it there"
            ) from error
    for folder in candidates:
        if (folder / "train").is_dir():
            return folder
    raise missing_data(config, _LAYOUT, downloadable=True)
