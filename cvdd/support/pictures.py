"""Pictures as files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torchvision.io import encode_png


def write_png(image: Tensor, path: Path) -> None:
    """Write an image [3, h, w] uint8 as a PNG file, or nothing.

    torchvision's function of this name does not look whether its writes succeed, and a full disk loses files.

    Raises:
        OSError: names the file.
    """
    try:
        path.write_bytes(encode_png(image).numpy().tobytes())
    except OSError as error:
        # A write into an open file names none.
        error.filename = str(path)
        path.unlink(missing_ok=True)
        raise
