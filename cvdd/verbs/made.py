"""What a verb has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cvdd.artifact import Artifact


@dataclass(frozen=True)
class Made:
    """What a verb has made.

    Attributes:
        metric: what a sweep optimises; None if the verb measures nothing.
        artifacts: by the names under which a dashboard shows them, such as ``cvdd/images``.
        results: a row of the table for each set of images and student, as in metrics.json.
    """

    metric: float | None = None
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    results: Sequence[Mapping[str, Any]] = ()
