"""From a dataset yaml to images, labels and the identity later artefacts hash."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cvdd.support.lazy import exports

if TYPE_CHECKING:
    from cvdd.data.config import DatasetConfig, DigitsOptions
    from cvdd.data.dataset import Data, RawData, check_same_classes, class_hash, is_described
    from cvdd.data.load import READERS, load_data
    from cvdd.data.resize import resize_and_crop, to_eval_tensor
    from cvdd.data.source import FileSource, ImageSource, TensorSource, decode
else:
    __getattr__ = exports(
        __name__,
        {
            "check_same_classes": "cvdd.data.dataset",
            "class_hash": "cvdd.data.dataset",
            "Data": "cvdd.data.dataset",
            "DatasetConfig": "cvdd.data.config",
            "decode": "cvdd.data.source",
            "DigitsOptions": "cvdd.data.config",
            "FileSource": "cvdd.data.source",
            "is_described": "cvdd.data.dataset",
            "ImageSource": "cvdd.data.source",
            "load_data": "cvdd.data.load",
            "RawData": "cvdd.data.dataset",
            "READERS": "cvdd.data.load",
            "resize_and_crop": "cvdd.data.resize",
            "TensorSource": "cvdd.data.source",
            "to_eval_tensor": "cvdd.data.resize",
        },
    )

__all__ = [
    "READERS",
    "Data",
    "DatasetConfig",
    "DigitsOptions",
    "FileSource",
    "ImageSource",
    "RawData",
    "TensorSource",
    "check_same_classes",
    "class_hash",
    "decode",
    "is_described",
    "load_data",
    "resize_and_crop",
    "to_eval_tensor",
]
