"""ImageNette and ImageWoof: ten easy and ten hard ImageNet classes at full size, decoded when needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torchvision.datasets import Imagenette

from cvdd.data.config import NOT_DOWNLOADED, DatasetConfig
from cvdd.data.dataset import RawData
from cvdd.data.folders import data_root, missing_data, scan, sorted_classes
from cvdd.data.source import ImageSource
from cvdd.support.config_base import ConfigError

if TYPE_CHECKING:
    from cvdd.artifact import Store


def read(config: DatasetConfig, store: Store) -> RawData:
    """Read one of the two; its ``val`` folder is the test set.

    Raises:
        ConfigError: the data is missing or has other classes than ``dataset.classes``.
    """
    root = _find(config)
    classes = sorted_classes(config, root / "train")

    def test() -> ImageSource:
        if not (root / "val").is_dir():
            raise missing_data(config, _layout(config), downloadable=False)
        return scan(root / "val", sorted_classes(config, root / "val", classes))

    return RawData(classes, scan(root / "train", classes), test, config.mean, config.std)


def _folder(config: DatasetConfig) -> str:
    """What the archive unpacks to."""
    return f"{config.source}2"


def _layout(config: DatasetConfig) -> str:
    return f"{{train,val}}/<wnid>/*.JPEG (the archive's {_folder(config)} folder, or its parent)"


def _find(config: DatasetConfig) -> Path:
    root = data_root(config)
    candidates = [root, root / _folder(config)]
    if config.download and not any((folder / "train").is_dir() for folder in candidates):
        try:
            Imagenette(str(root), split="train", size="full", download=True)
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"{config.name}: could not download into dataset.root={root} ({error}); fetch {config.origin} "
                f"elsewhere and unpack it there, so that {root / _folder(config)} exists"
            ) from error
    for folder in candidates:
        if (folder / "train").is_dir():
            return folder
    raise missing_data(config, _layout(config), downloadable=config.source not in NOT_DOWNLOADED)
