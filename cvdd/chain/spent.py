"""What artefacts took to make, from their manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cvdd.artifact import Artifact, parents_of


@dataclass(frozen=True)
class Spent:
    """What artefacts took.

    Attributes:
        seconds: of all of them, one after another; processes that made one side by side count once.
        process_seconds: of all processes together.
        peak_memory: in bytes, of the process that needed most.
    """

    seconds: float
    process_seconds: float
    peak_memory: int


def spent_on_all(artifacts: Sequence[Artifact]) -> Spent:
    """Add up what artefacts took, of which there is at least one."""
    costs = [artifact.manifest["cost"] for artifact in artifacts]
    return Spent(
        sum(float(cost["wall_seconds"]) for cost in costs),
        sum(float(cost["process_seconds"]) for cost in costs),
        max(int(cost["peak_memory_bytes"]) for cost in costs),
    )


def spent_on(artifact: Artifact) -> Spent:
    """Return what an artefact took, images with what is made for them alone: parts, ranks and statistics of groups."""
    beside = (one for kind in ("image_parts", "difficulty", "group_statistics") for one in parents_of(artifact, kind))
    return spent_on_all([artifact, *beside])
