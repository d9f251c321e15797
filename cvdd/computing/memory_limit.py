"""The memory that a job's or a container's limit leaves, which the machine's own count of free memory does not know.

Linux keeps such limits in control groups: of version 2 in one tree, of version 1 in a tree of memory alone. A group may
take what it and all groups above it are allowed; who goes beyond is killed without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")

_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By version: the limit, what is taken, and what of it is a cache of files that goes when it is needed."""


def left_to_process(groups: Path = GROUPS, own: Path = OWN) -> float:
    """Bytes that this process may still take; infinite without a limit.

    Args:
        groups: where control groups are mounted.
        own: names the groups of this process.
    """
    return min((_left_in(folder, version) for folder, version in _memory_groups(groups, own)), default=math.inf)


def _memory_groups(groups: Path, own: Path) -> Iterator[tuple[Path, int]]:
    """Yield the groups of this process that may limit its memory, each with those above it, and their version."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version = 1 if "memory" in controllers.split(",") else 2
        if controllers and version == 2:
            continue
        root = groups / "memory" if version == 1 else groups
        inside = root / path.lstrip("/")
        yield root, version
        # In a container the path may be that of the machine, which is not to be seen.
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(root) and folder != root and folder.is_dir():
                yield folder, version


def _left_in(group: Path, version: int) -> float:
    limit, taken, cache = _FILES[version]
    try:
        allowed = (group / limit).read_text().strip()
        if allowed == "max":
            return math.inf
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / taken).read_text()) - int(rows.get(cache, 0))
        return max(int(allowed) - used, 0)
    except (OSError, ValueError):
        # The group at the top has no limit, and whoever may not read knows of none.
        return math.inf
