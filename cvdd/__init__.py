"""Dataset distillation that people can run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvdd.distilled import DistilledSet

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def load(path: str | Path) -> DistilledSet:
    """Read a distilled set from a store; see :func:`cvdd.distilled.load`.

    Args:
        path: ``STORE/labels/NAME-HASH`` or ``STORE/images/NAME-HASH``.
    """
    # The commands import this package before they know that there is something to do, and PyTorch takes seconds.
    from cvdd.distilled import load as read

    return read(path)
