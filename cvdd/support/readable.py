"""Numbers as people read them: with an error, of bytes, of seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None of a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def with_error(mean: float, error: float | None, sign: str = "\u00b1", digits: int = 1) -> str:
    """Write a number with its standard error, if there is one.

    Args:
        mean: the number.
        error: its standard error; None with a single value.
        sign: between them.
        digits: after the point.
    """
    return f"{mean:.{digits}f}" if error is None else f"{mean:.{digits}f} {sign} {error:.{digits}f}"


def significant(number: float) -> str:
    """Write a number with three significant digits, zeros among them."""
    return f"{number:#.3g}".rstrip(".")


def readable_bytes(count: float | None) -> str:
    """Write a number of bytes for people."""
    if count is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def readable_seconds(seconds: float | None) -> str:
    """Write a duration for people."""
    if seconds is None:
        return "-"
    if seconds < 0.01:
        return "< 0.01 s"
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
