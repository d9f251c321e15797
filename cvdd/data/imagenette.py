"""ImageNette: ten easy ImageNet classes at full size, decoded when needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torchvision.datasets import Imagenette

from cvdd.config_base import ConfigError
from cvdd.data.config import DatasetConfig
from cvdd.data.dataset import RawData
from cvdd.data.folders import data_root, missing_data, scan, sorted_classes
from cvdd.data.source import ImageSource

if TYPE_CHECKING:
    from cvdd.artifact import Store

_FOLDER = "imagenette2"
_LAYOUT = f"{{train,val}}/<wnid>/*.JPEG (the archive's {_FOLDER} folder, or its parent)"


def read(config: DatasetConfig, store: Store) -> RawData:
    """Read ImageNette; its ``val`` folder is the test set.

    Raises:
        ConfigError: the data is missing or has other classes than ``dataset.classes``.
    """
    root = _find(config)
    classes = sorted_classes(config, root / "train")

    def test() -> ImageSource:
        if not (root / "val").is_dir():
            raise missing_data(config, _LAYOUT, downloadable=False)
        return scan(root / "val", sorted_classes(config, root / "val", classes))

    return RawData(classes, scan(root / "train", classes), test, config.mean, config.std)


def _find(config: DatasetConfig) -> Path:
    root = data_root(config)
    candidates = [root, root / _FOLDER]
    if config.download and not any((folder / "train").is_dir() for folder in candidates):
        try:
            Imagenette(str(root), split="train", size="full", download=True)
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"{config.name}: could not download into dataset.root={root} ({error}); fetch {config.origin} "
                f"elsewhere and unpack it there, so that {root / _FOLDER} exists"
            ) from error
    for folder in candidates:
        if (folder / "train").is_dir():
            return folder
    raise missing_data(config, _LAYOUT, downloadable=True)
