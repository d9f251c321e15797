"""What a run cost, and what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvdd.artifact import Artifact, parents_of
from cvdd.chain.compare import Distilled, Result
from cvdd.chain.context import Context
from cvdd.chain.given import kept_as_given
from cvdd.chain.priors import Priors
from cvdd.chain.spent import spent_on_all
from cvdd.chain.stages import STAGES, stage_of


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


def measuring(priors: Priors) -> list[Artifact]:
    """List the artefacts by which priors were measured."""
    return [*priors.images, *priors.students]


def all_artifacts(
    members: Mapping[str, Artifact], distilled: Sequence[Distilled], results: Sequence[Result]
) -> list[Artifact]:
    """List every artefact behind a run that its store holds, each once: what was made, and what that was made from.

    What given images were made from is not of this run.
    """
    listed = [*members.values()]
    given = set[Path]()
    for made in distilled:
        listed += [*measuring(made.priors), *made.all_images, *made.all_labels]
        given |= {made.images.path} if kept_as_given(made.context, made.images) is not None else set()
    listed += [student for result in results for student in result.students]
    found: dict[tuple[str, str], Artifact] = {}
    while listed:
        artifact = listed.pop(0)
        if (artifact.kind, artifact.path.name) in found:
            continue
        found[artifact.kind, artifact.path.name] = artifact
        if artifact.path not in given:
            listed += parents_of(artifact)
    return list(found.values())


def stage_costs(
    members: Mapping[str, Artifact],
    artifacts: Sequence[Artifact],
    distilled: Sequence[Distilled],
    results: Sequence[Result],
) -> list[Cost]:
    """List the cost of every stage in the order in which they run; an artefact is in one line only.

    Args:
        members: of the committee, by name.
        artifacts: everything behind the run (:func:`all_artifacts`).
        distilled: the distilled sets.
        results: the accuracies.
    """
    lines: list[tuple[str, str, list[Artifact]]] = []
    if members:
        lines.append(("members", ", ".join(members), list(members.values())))
    # The labels of the measurement are computed while its students are trained.
    of_priors = (
        (measuring(made.priors), f"images and students for {', '.join(made.priors.values)}") for made in distilled
    )
    lines += [("priors", members_measured, made) for made, members_measured in _shared(of_priors)]
    lines += [("images", rows, made) for made, rows in _shared((made.all_images, made.row) for made in distilled)]
    lines += [("labels", rows, made) for made, rows in _shared((made.all_labels, made.row) for made in distilled)]
    of_students = ((list(result.students), f"{result.row}, {result.student}") for result in results)
    lines += [("students", rows, made) for made, rows in _shared(of_students)]
    named = {artifact.path for _, _, made in lines for artifact in made}
    # Patches, and whatever else networks and images were made from; each seed may have its own.
    others: dict[tuple[str, str], list[Artifact]] = {}
    for artifact in artifacts:
        if artifact.path not in named:
            others.setdefault((stage_of(artifact.kind), f"{artifact.kind}: {artifact.name}"), []).append(artifact)
    lines += [(*line, made) for line, made in others.items()]
    lines.sort(key=lambda line: STAGES.index(line[0]))
    return [_cost(*line) for line in lines]


def _shared(made: Iterable[tuple[list[Artifact], str]]) -> list[tuple[list[Artifact], str]]:
    """Name what several rows share once, with all of them; what only a part of a row shares is that of the first."""
    lines: dict[tuple[Path, ...], tuple[list[Artifact], list[str]]] = {}
    seen = set[Path]()
    for artifacts, row in made:
        key = tuple(artifact.path for artifact in artifacts)
        own = [artifact for artifact in artifacts if artifact.path not in seen]
        if own:
            lines[key] = (own, [])
        if key in lines:
            lines[key][1].append(row)
        seen.update(key)
    return [(artifacts, "; ".join(dict.fromkeys(names))) for artifacts, names in lines.values()]


def machine_seconds(artifacts: Iterable[Artifact]) -> dict[str, float]:
    """Add up by processor or GPU what processes spent on artefacts; earlier versions did not note on what."""
    found: dict[str, float] = {}
    for artifact in artifacts:
        cost = artifact.manifest["cost"]
        noted = cost.get("machines") or {"machines that were not noted": cost["process_seconds"]}
        for machine, seconds in noted.items():
            found[machine] = found.get(machine, 0.0) + float(seconds)
    return found


def _cost(stage: str, what: str, made: Sequence[Artifact]) -> Cost:
    spent, size = spent_on_all(made), sum(artifact.bytes for artifact in made)
    return Cost(stage, what, len(made), size, spent.seconds, spent.process_seconds, spent.peak_memory)
