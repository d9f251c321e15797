"""What a run cost, and what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvdd.artifact import Artifact
from cvdd.chain.compare import Distilled, Result
from cvdd.chain.given import kept_as_given
from cvdd.chain.priors import Priors
from cvdd.context import Context


@dataclass(frozen=True)
class Cost:
    """Cost of one stage for one row.

    Attributes:
        stage: members, patches, priors, images, labels or students.
        what: for which row, member or student.
        artifacts: number of artefacts.
        bytes: of all of them on disk.
        seconds: of all of them, one after another; processes that made one side by side count once.
        process_seconds: of all processes together.
        peak_memory: of the process that needed most.
    """

    stage: str
    what: str
    artifacts: int
    bytes: int
    seconds: float
    process_seconds: float
    peak_memory: int


def open_members(context: Context, summary: Mapping[str, Any]) -> dict[str, Artifact]:
    """Open the members that a summary names."""
    root = context.store.root / "members"
    return {name: context.store.open(root / member["artifact"]) for name, member in summary["members"].items()}


def open_patches(distilled: Sequence[Distilled]) -> list[Artifact]:
    """Open the patches that any set was made from, be it for the measurement of a prior, each once."""
    found: dict[str, Artifact] = {}
    for made in distilled:
        store = made.context.store
        # What given images were made from is not of this run, and may be in another store.
        own = [] if kept_as_given(made.context, made.images) is not None else made.all_images
        for images in (*own, *made.priors.images):
            for parent in images.manifest["parents"]:
                if parent["kind"] == "patches":
                    name = f"{parent['name']}-{parent['digest']}"
                    found[name] = store.open(store.root / "patches" / name)
    return list(found.values())


def measuring(priors: Priors) -> list[Artifact]:
    """List the artefacts by which priors were measured."""
    return [*priors.images, *priors.students]


def stage_costs(
    members: Mapping[str, Artifact],
    patches: Sequence[Artifact],
    distilled: Sequence[Distilled],
    results: Sequence[Result],
) -> list[Cost]:
    """List the cost of every stage in the order in which they run."""
    costs = [_cost("members", ", ".join(members), members.values())] if members else []
    costs += [_cost("patches", artifact.name, [artifact]) for artifact in patches]
    for priors in [made.priors for made in distilled if made.priors.images][:1]:
        # All rows share them; the labels of the measurement are computed while its students are trained.
        costs.append(_cost("priors", f"images and students for {', '.join(priors.values)}", measuring(priors)))
    costs += [_cost("images", made.row, made.all_images) for made in distilled]
    costs += [_cost("labels", made.row, made.all_labels) for made in distilled if made.all_labels]
    return costs + [_cost("students", f"{result.row}, {result.student}", result.students) for result in results]


def all_artifacts(
    members: Mapping[str, Artifact],
    patches: Sequence[Artifact],
    distilled: Sequence[Distilled],
    results: Sequence[Result],
) -> list[Artifact]:
    """List every artefact behind a run, each once."""
    found: dict[tuple[str, str], Artifact] = {}
    listed = [*members.values(), *patches]
    for made in distilled:
        listed += [*measuring(made.priors), *made.all_images, *made.all_labels]
    for result in results:
        listed += result.students
    for artifact in listed:
        found[artifact.kind, artifact.path.name] = artifact
    return list(found.values())


def machine_seconds(artifacts: Iterable[Artifact]) -> dict[str, float]:
    """Add up by processor or GPU what processes spent on artefacts; earlier versions did not note on what."""
    found: dict[str, float] = {}
    for artifact in artifacts:
        cost = artifact.manifest["cost"]
        noted = cost.get("machines") or {"machines that were not noted": cost["process_seconds"]}
        for machine, seconds in noted.items():
            found[machine] = found.get(machine, 0.0) + float(seconds)
    return found


def _cost(stage: str, what: str, artifacts: Iterable[Artifact]) -> Cost:
    made = list(artifacts)
    costs = [artifact.manifest["cost"] for artifact in made]
    return Cost(
        stage,
        what,
        len(made),
        sum(artifact.bytes for artifact in made),
        sum(float(cost["wall_seconds"]) for cost in costs),
        sum(float(cost["process_seconds"]) for cost in costs),
        max(int(cost["peak_memory_bytes"]) for cost in costs),
    )
