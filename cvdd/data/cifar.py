"""CIFAR-10 and CIFAR-100, as published or (CIFAR-10) as folders of image files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from cvdd.data.config import DatasetConfig
from cvdd.data.dataset import RawData, check_same_classes
from cvdd.data.folders import data_root, missing_data, scan, sorted_classes
from cvdd.data.packing import pack, read_images
from cvdd.data.resize import views_to_measure
from cvdd.data.source import ImageSource, TensorSource
from cvdd.support.config_base import ConfigError

if TYPE_CHECKING:
    from cvdd.artifact import Store

_SIDE = 32


def read_cifar10(config: DatasetConfig, store: Store) -> RawData:
    """Read CIFAR-10 from the published batches or from ``{train,test}/<class>/`` folders, whichever is there.

    Raises:
        ConfigError: the data is missing, damaged, or has other classes than ``dataset.classes``.
    """
    root = data_root(config)
    if not (root / CIFAR10.base_folder).is_dir() and (root / "train").is_dir():
        return _read_folders(config, store, root)
    return _read_published(config, CIFAR10, f"{CIFAR10.base_folder}/data_batch_1 ... or {{train,test}}/<class>/*.jpg")


def read_cifar100(config: DatasetConfig, store: Store) -> RawData:
    """Read CIFAR-100, fine labels, from the published files.

    Raises:
        ConfigError: the data is missing, damaged, or has other classes than ``dataset.classes``.
    """
    return _read_published(config, CIFAR100, f"{CIFAR100.base_folder}/{{train,test,meta}}")


def _check_side(config: DatasetConfig) -> None:
    if config.image_size != _SIDE:
        raise ConfigError(f"dataset.image_size={config.image_size}: the images of {config.source} have {_SIDE} pixels")


def _read_published(config: DatasetConfig, reader: type[CIFAR10], layout: str) -> RawData:
    _check_side(config)
    root = data_root(config)
    if not (root / reader.base_folder).is_dir() and not config.download:
        raise missing_data(config, layout, downloadable=True)

    def load(train: bool) -> TensorSource:
        try:
            raw = reader(str(root), train=train, download=config.download)
        except (RuntimeError, OSError) as error:
            raise _unreadable(config, reader, root, error) from error
        check_same_classes(config.classes, raw.classes, f"label names in {root / reader.base_folder}")
        images = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
        return TensorSource(images, torch.tensor(raw.targets, dtype=torch.int64))

    return RawData(
        config.classes, load(True), lambda: views_to_measure(load(False), config.test_resize), config.mean, config.std
    )


def _unreadable(config: DatasetConfig, reader: type[CIFAR10], root: Path, error: Exception) -> ConfigError:
    folder = root / reader.base_folder
    expected = [*reader.train_list, *reader.test_list, [reader.meta["filename"], reader.meta["md5"]]]
    damaged = [name for name, checksum in expected if not check_integrity(str(folder / name), checksum)]
    if damaged and folder.is_dir():
        return ConfigError(
            f"{config.name}: {', '.join(damaged)} in {folder} is missing or damaged (checksum); delete {folder} and "
            "type dataset.download=true, or unpack the published archive again"
        )
    return ConfigError(
        f"{config.name}: could not download into dataset.root={root} ({error}); fetch {config.origin} elsewhere and "
        f"unpack it there, so that {folder} exists"
    )


def _read_folders(config: DatasetConfig, store: Store, root: Path) -> RawData:
    _check_side(config)

    def load(part: str, shorter_side: int | None) -> ImageSource:
        if not (root / part).is_dir():
            raise missing_data(config, f"{part}/<class>/*.jpg", downloadable=False)
        files = scan(root / part, sorted_classes(config, root / part))
        identity = {"source": config.source, "part": part}
        return read_images(pack(store, f"{config.name}-{part}", identity, files, _SIDE, shorter_side))

    return RawData(
        config.classes, load("train", None), lambda: load("test", config.test_resize), config.mean, config.std
    )
