"""Dataset distillation that people can run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cvdd.calls import Run
    from cvdd.distilled import DistilledSet

__all__ = ["__version__", "distill", "evaluate", "load", "relabel", "train"]
__version__ = "0.1.0"

# The commands import this package before they know that there is something to do, and PyTorch takes seconds. So what is
# behind these functions is imported when they are called.


def load(path: str | Path) -> DistilledSet:
    """Read a distilled set from a store; see :func:`cvdd.distilled.load`.

    Args:
        path: ``STORE/labels/NAME-HASH`` or ``STORE/images/NAME-HASH``.
    """
    from cvdd.distilled import load as read

    return read(path)


def train(*overrides: str, config_dir: str | Path | None = None) -> Run:
    """Train the committee, as ``python train.py OVERRIDES`` does; see :func:`cvdd.calls.call`."""
    return _call("train", overrides, config_dir)


def distill(*overrides: str, config_dir: str | Path | None = None) -> Run:
    """Make synthetic images, as ``python distill.py OVERRIDES`` does; see :func:`cvdd.calls.call`."""
    return _call("distill", overrides, config_dir)


def relabel(*overrides: str, config_dir: str | Path | None = None) -> Run:
    """Make soft labels, as ``python relabel.py OVERRIDES`` does; see :func:`cvdd.calls.call`."""
    return _call("relabel", overrides, config_dir)


def evaluate(*overrides: str, config_dir: str | Path | None = None) -> Run:
    """Train students and measure them, as ``python evaluate.py OVERRIDES`` does; see :func:`cvdd.calls.call`."""
    return _call("evaluate", overrides, config_dir)


def _call(verb: str, overrides: tuple[str, ...], config_dir: str | Path | None) -> Run:
    from cvdd.calls import call

    return call(verb, overrides, config_dir)
