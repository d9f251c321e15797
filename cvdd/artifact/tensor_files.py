"""Files of tensors that are either complete or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cvdd.artifact.files import fsync


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file so that after any interruption, of the machine too, it is absent (or the old one) or complete.

    Args:
        path: of the file.
        tensors: contiguous, on any device.
        metadata: words beside them.
    """
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=None if metadata is None else dict(metadata))
    fsync(temporary)
    temporary.replace(path)


def is_whole(path: Path) -> bool:
    """Whether a file of tensors is there and as long as its header says; the tensors are not read."""
    try:
        with safe_open(path, "pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False
