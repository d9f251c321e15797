"""What images in files are known by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data_readers import WNIDS, make_config, make_wnid_folders

from cvdd.artifact import Store
from cvdd.data import load_data


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files that are decoded when needed."""
    root = tmp_path_factory.mktemp("photographs")
    make_wnid_folders(root)
    return root


def identity_of(root: Path, **changes: Any) -> dict[str, Any]:
    return load_data(
        make_config("imagenette", root, **{"classes": WNIDS, "num_classes": 3, **changes}), Store(root / "store")
    ).identity


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"image_size": 16},
        {"mean": [0.4, 0.5, 0.5]},
        {"std": [0.25, 0.25, 0.3]},
        {"test_resize": 40},
        {"train_per_class": 1},
        {"test_per_class": 1},
        {"evaluate_on": "validation", "validation_fraction": 0.5},
    ],
    ids=str,
)
def test_images_in_files_are_known_by_what_networks_see_of_them(changes: dict[str, Any], photographs: Path) -> None:
    assert identity_of(photographs, **changes) != identity_of(photographs)


@pytest.mark.parametrize(
    "changes", [{"origin": "elsewhere"}, {"jitter": 1}, {"mirror": False}, {"classes_per_unit": 1}], ids=str
)
def test_images_in_files_are_not_known_by_how_others_use_them(changes: dict[str, Any], photographs: Path) -> None:
    assert identity_of(photographs, **changes) == identity_of(photographs)
