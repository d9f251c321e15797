"""Reading PyTorch's files from others without running any code in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cvdd.support.config_base import ConfigError


def load_without_code(path: Path, otherwise: str, allowed: Sequence[Any] = ()) -> Any:
    """Load tensors and plain containers from a file, after checking the archive's checksums.

    Args:
        path: the file.
        otherwise: what else may be wrong with it, for the message, after "damaged, truncated".
        allowed: types and functions that the pickle may name besides those of plain tensors.

    Raises:
        ConfigError: there is no such file, or it is damaged, or it names anything else.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    try:
        if zipfile.is_zipfile(path):
            # torch does not verify the checksums of the members; a flipped bit would load silently.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ConfigError(f"{path}: damaged, the checksum of {damaged} is wrong; fetch the file again")
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        # The first line says what is wrong; PyTorch's further ones advise to load the file unsafely.
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path}: damaged, truncated{otherwise}; fetch the file again ({detail})") from error
