"""How batches are cut into parts that are forwarded, and normalised, by themselves."""

from __future__ import annotations


def part_size(batch: int, accumulation: int) -> int:
    """Images in each part of a full batch."""
    return max(batch // accumulation, 1)


def parts_of(count: int, part: int) -> list[slice]:
    """Cut a batch of ``count`` samples into parts; a single sample at the end joins the part before it."""
    starts = list(range(0, count, part))
    if len(starts) > 1 and count - starts[-1] == 1:
        # BatchNorm cannot normalise a single sample.
        starts.pop()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]
