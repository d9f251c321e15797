"""Which code made a result."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import cvdd

SOURCES = ("cvdd", "conf")
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "timm")


@functools.cache
def code_version() -> dict[str, Any]:
    """Return versions of this package and of libraries, a hash of its source, and commit and changes, if known."""
    root = Path(__file__).parents[2]
    version: dict[str, Any] = {"cvdd": cvdd.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        version[package] = metadata.version(package)
    version["source"] = _source()
    commit = _git(root, "rev-parse", "HEAD")
    if commit is not None and (root / "pyproject.toml").exists():
        version["commit"] = commit.decode()
        version["changed"] = _changes(root)
    return version


def made_by_other_code(code: Mapping[str, Any]) -> bool:
    """Whether what a manifest says of the code is known not to be that of this process; older ones do not say it."""
    return code.get("source") not in (None, code_version()["source"])


def _source() -> str:
    """Hash of the Python files of this package, which is there without git too."""
    found, folder = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _changes(root: Path) -> str | None:
    """Hash of what differs from the commit in code and configuration, new files included; None if nothing does."""
    difference = _git(root, "diff", "HEAD", "--binary", "--", *SOURCES) or b""
    listed = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *SOURCES) or b""
    new = [name for name in listed.split(b"\0") if name]
    found = hashlib.sha256(difference)
    for name in new:
        path = root / os.fsdecode(name)
        # One that has gone meanwhile is no change.
        with contextlib.suppress(OSError):
            found.update(name + path.read_bytes())
    return found.hexdigest()[:12] if difference or new else None


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
