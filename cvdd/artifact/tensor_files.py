"""Files of tensors that are either complete or not there."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cvdd.artifact.files import fsync


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file of tensors that may be read by whoever may read other new files.

    safetensors makes files that are for their owner alone, and a store may be several people's.

    Args:
        path: of the file.
        tensors: contiguous, on any device.
        metadata: words beside them.
    """
    path.touch()
    permissions = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=None if metadata is None else dict(metadata))
    path.chmod(permissions)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file so that after any interruption, of the machine too, it is absent (or the old one) or complete.

    Args:
        path: of the file.
        tensors: contiguous, on any device.
        metadata: words beside them.
    """
    temporary = path.with_name(path.name + ".tmp")
    write_tensors(temporary, tensors, metadata)
    fsync(temporary)
    temporary.replace(path)


def is_whole(path: Path) -> bool:
    """Whether a file of tensors is there and as long as its header says; the tensors are not read."""
    try:
        with safe_open(path, "pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False
