"""Which parts of a configuration say where and how a command runs, and not what it makes."""

from __future__ import annotations

SURROUNDINGS = ("paths", "trainer", "logger")
"""No artefact depends on these."""

FULL_DATA = "protocol.full_data"
"""Adds one row of all real data to a comparison, or none; the protocol of another row has no say."""
FULL_DATA_ROW = "full_data"
"""Its name."""

_PRESENTATION = frozenset(
    {
        *(f"{section}.name" for section in ("committee", "method", "label", "protocol", "recipe")),
        "method.log_every",
        "method.log_agreement",
        "method.grid_every",
        "method.checkpoint_every",
        "protocol.eval_batch",
    }
)

_SHARED_BY_ROWS = ("verb", *SURROUNDINGS, "cost", "students", "compare", "expected", "hydra")


def is_shared_by_rows(key: str) -> bool:
    """Whether a field, or a section, is what a comparison has once, whatever its rows are.

    Args:
        key: dotted.
    """
    return key.partition(".")[0] in _SHARED_BY_ROWS or key == FULL_DATA


def is_presentation(key: str) -> bool:
    """Whether a field is a name, or says how often a run tells of itself; no artefact depends on it.

    Args:
        key: dotted.
    """
    return key in _PRESENTATION
