"""ImageNet-1K (ILSVRC 2012) as two folders of class folders, decoded when needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.data.imagenet_info import ImageNetInfo

from cvdd.data.config import DatasetConfig
from cvdd.data.dataset import RawData
from cvdd.data.folders import data_root, missing_data, scan, sorted_classes
from cvdd.data.source import ImageSource

if TYPE_CHECKING:
    from cvdd.artifact import Store

_LAYOUT = "{train,val}/<wnid>/*.JPEG, 1000 class folders in each (val sorted into class folders, too)"


def read(config: DatasetConfig, store: Store) -> RawData:
    """Read ImageNet-1K; its ``val`` folder is the test set.

    The classes are the folder's own names in sorted order, exactly ``dataset.num_classes`` (1000). With an empty
    ``dataset.classes`` they are compared with the 1000 published ones, because ready-made networks rely on that order.

    Raises:
        ConfigError: the data is missing or has other classes than expected.
    """
    root = data_root(config)
    for part in ("train", "val"):
        if not (root / part).is_dir() and not (part == "val" and config.evaluate_on == "validation"):
            raise missing_data(config, _LAYOUT, downloadable=False)
    published: Any = ImageNetInfo("imagenet-1k")
    classes = sorted_classes(config, root / "train", sorted(published.label_names()))

    def test() -> ImageSource:
        return scan(root / "val", sorted_classes(config, root / "val", classes))

    return RawData(classes, scan(root / "train", classes), test, config.mean, config.std)
