"""What the tests of given images and labels type, and how they look at what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import tiny_context

from cvdd.artifact import Artifact
from cvdd.artifact.manifest import read_manifest
from cvdd.chain.preflight import check_before_work
from cvdd.support.config_base import ConfigError

HARD = ("label=hard", "protocol=hard_tiny", "protocol.epochs=3", "protocol.eval_every=1")
"""Students that need no committee."""


def given(folder: Path) -> tuple[str, ...]:
    # The tiny configuration types as many iterations as it needs.
    return ("method=given", f"method.given={folder}", "method.iterations=0")


def labels(folder: Path) -> tuple[str, ...]:
    # What the tiny configuration types of labels is what these are.
    return ("label=given", f"label.given={folder}")


def cvdd_images(theirs: Path) -> Artifact:
    return read_manifest(one(theirs / "images"))


def one(folder: Path) -> Path:
    (found,) = folder.glob("[!.]*")
    return found


def refused(tmp_path: Path, *overrides: str) -> str:
    """What a command says before it does anything."""
    with pytest.raises(ConfigError) as error:
        check_before_work(tiny_context(tmp_path, *overrides))
    assert not (tmp_path / "store" / "members").exists()
    return str(error.value)
