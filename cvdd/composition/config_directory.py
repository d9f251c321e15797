"""Where the files of the configuration are."""

from __future__ import annotations

from pathlib import Path


def config_directory() -> Path:
    """Folder of the configuration: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"
