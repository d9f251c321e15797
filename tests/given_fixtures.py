"""A distilled set as somebody else may have it: files, or a store without what it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import cvdd
from cvdd.chain.compare import Distilled, Result


@pytest.fixture
def row(made: tuple[Distilled, Result]) -> Distilled:
    return made[0]


@pytest.fixture
def files(row: Distilled, tmp_path: Path) -> Path:
    """Its images as files."""
    cvdd.load(row.images.path).save_images(tmp_path / "files")
    return tmp_path / "files"


@pytest.fixture
def theirs(row: Distilled, tmp_path: Path) -> Path:
    """Somebody else's store, which has images and their labels, and nothing of what these were made from."""
    assert row.labels.artifact is not None
    for artifact in (row.images, row.labels.artifact):
        shutil.copytree(artifact.path, tmp_path / "theirs" / artifact.kind / artifact.path.name)
    return tmp_path / "theirs"
