"""Numbers of parts into which a batch can be cut."""

from __future__ import annotations

from collections.abc import Iterator

from cvdd.support.batch_parts import part_size, parts_of


def parts_problems(accumulation: int, of: str, batch: int, batch_of: str, because: str = "") -> Iterator[str]:
    """Yield why a batch cannot be cut into so many parts, with the numbers that are possible.

    Args:
        accumulation: parts that are asked for.
        of: whose field this is, e.g. ``protocol``.
        batch: images in a full batch.
        batch_of: whose field that is, e.g. ``label``.
        because: what more parts than asked for would do, to end a clause.
    """
    if accumulation in _possible(batch):
        return
    found = parts_of(batch, part_size(batch, accumulation))
    parts = f"{len(found)} part{'s' * (len(found) > 1)}"
    smallest = min(part.stop - part.start for part in found)
    # BatchNorm cannot normalise a single image either.
    why = ", some of one image" if smallest == 1 else because * (len(found) > accumulation)
    yield (
        f"{of}.accumulation={accumulation} would cut {batch_of}.batch_size={batch} into {parts}{why}; set "
        f"{of}.accumulation to one of {', '.join(map(str, _possible(batch)))}"
    )


def _possible(batch: int) -> list[int]:
    """Numbers of parts of two images or more each, and no more parts than the number says; a whole batch is one."""
    numbers = range(2, batch // 2 + 1)
    return [1, *(number for number in numbers if len(parts_of(batch, part_size(batch, number))) <= number)]
