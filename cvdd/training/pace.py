"""Iterations in epochs, at whose ends Lightning resumes exactly."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from cvdd.support.config_base import ConfigError

KEY = "checkpoint_every"


class Ranges(list[tuple[int, int]]):
    """The batches of an epoch that nobody but Lightning counts in epochs: from one iteration up to another."""


def ranges_of_epoch(epoch: int, first: int, last: int, every: int, step: int) -> DataLoader[tuple[int, int]]:
    """Return the batches of an epoch of iterations: ranges up to the next log row.

    Args:
        epoch: counted from 0.
        first: iteration of the first epoch.
        last: the iteration after the last epoch's.
        every: iterations of an epoch.
        step: iterations of a range.
    """
    first += epoch * every
    last = min(first + every, last)
    ranges = Ranges((begin, min(begin + step, last)) for begin in range(first, last, step))
    return DataLoader(ranges, batch_size=None)  # type: ignore[arg-type]


def note_pace(checkpoint: dict[str, Any], every: int) -> None:
    """Write into a checkpoint how many iterations its epochs have."""
    checkpoint[KEY] = every


def require_pace(checkpoint: dict[str, Any], every: int) -> None:
    """Refuse to go on from a checkpoint whose epochs are not those of the configuration.

    Raises:
        ConfigError: they are not, so that iterations would be left out or repeated.
    """
    before = checkpoint.get(KEY, every)
    if before != every:
        raise ConfigError(
            f"method.checkpoint_every={every}: the interrupted run counted its iterations in steps of {before}; set "
            f"method.checkpoint_every={before} to go on with it"
        )
