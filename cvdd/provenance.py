"""Which code made a result."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import cvdd

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "timm")


@functools.cache
def code_version() -> dict[str, Any]:
    """Return version, commit, whether the checkout differs from it, and the versions of the main libraries."""
    root = Path(__file__).parent.parent
    version: dict[str, Any] = {"cvdd": cvdd.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        version[package] = metadata.version(package)
    commit = _git(root, "rev-parse", "HEAD")
    if commit is not None and (root / "pyproject.toml").exists():
        difference = _git(root, "diff", "HEAD", "--", "cvdd", "conf") or ""
        version["commit"] = commit
        version["changed"] = hashlib.sha256(difference.encode()).hexdigest()[:12] if difference else None
    return version


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
