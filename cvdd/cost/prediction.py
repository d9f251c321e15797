"""What a run is predicted to cost, stage by stage; it can be written down and found again by an equal configuration."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cvdd.artifact import digest_of, write_atomically
from cvdd.artifact.files import store_errors
from cvdd.artifact.peak import highest_resident
from cvdd.chain.stages import STAGES
from cvdd.composition.portable import what_is_made
from cvdd.cost.fakes import scale_of
from cvdd.cost.plan import Piece
from cvdd.cost.steps import MocoStep, Network, Step, TrainStep
from cvdd.cost.work import Work
from cvdd.schema import RunConfig

FOLDER = "predictions"
"""Of the store. What lies there is no artefact, and can be deleted at any time."""


@dataclass(frozen=True)
class StageCost:
    """Predicted cost of a stage: of what is missing, but for the bytes and parts, which are those of all.

    Attributes:
        stage: members, patches, priors, images, labels or students.
        artifacts: number of artefacts.
        made: names of those that the store holds already.
        parts: how many artefacts there are of what kind, and what they consist of, by name.
        steps: optimiser steps, or for labels forward passes of a batch.
        flops: floating-point operations.
        seconds: predicted; None where the way in which something is made is not known to the cost model.
        peak_memory: bytes of the largest step, with what the process holds anyway; 0 if nothing is missing.
        image_bytes: pixels of distilled sets.
        label_bytes: of stored labels.
        other_bytes: of weights and patches.
    """

    stage: str
    artifacts: int
    made: list[str]
    parts: dict[str, int]
    steps: int
    flops: float
    seconds: float | None
    peak_memory: float
    image_bytes: int
    label_bytes: int
    other_bytes: int

    @property
    def all_made(self) -> bool:
        """Whether nothing is missing."""
        return len(self.made) == self.artifacts


Counted = tuple[Piece, Work]
"""An artefact and what its making costs."""


def needed_steps(works: Sequence[Counted]) -> list[Step]:
    """List the distinct steps of what is missing."""
    return list(dict.fromkeys(step for piece, work in works if not piece.made for step in work.uses))


def predict(
    works: Sequence[Counted],
    times: Mapping[Step, float],
    profiles: Callable[[Network, str], Any],
    baseline: int,
) -> list[StageCost]:
    """Add up the cost of every stage.

    Args:
        works: of all artefacts of the plan.
        times: seconds of each step.
        profiles: what one image costs in a network.
        baseline: bytes that the process holds anyway.
    """
    costs = []
    for stage in STAGES:
        of_stage = [(piece, work) for piece, work in works if piece.stage == stage]
        if of_stage:
            costs.append(_stage_cost(stage, of_stage, times, profiles, baseline))
    return costs


def _stage_cost(
    stage: str,
    works: Sequence[Counted],
    times: Mapping[Step, float],
    profiles: Callable[[Network, str], Any],
    baseline: int,
) -> StageCost:
    missing = [work for piece, work in works if not piece.made]
    parts: Counter[str] = Counter()
    for piece, work in works:
        parts[_noun(piece)] += 1
        parts.update(work.parts)
    known = all(work.known for work in missing)
    sizes = {step: scale_of(step, profiles) for work in missing for step in work.uses}
    return StageCost(
        stage,
        len(works),
        [piece.name for piece, _ in works if piece.made],
        dict(parts),
        sum(work.steps for work in missing),
        sum(sizes[step].flops * count for work in missing for step, count in work.uses.items()),
        sum(times[step] * count for work in missing for step, count in work.uses.items()) if known else None,
        max((baseline + _memory(work, profiles) for work in missing), default=0),
        sum(work.image_bytes for _, work in works),
        sum(work.label_bytes for _, work in works),
        sum(work.other_bytes + _weights(work, profiles) for _, work in works),
    )


def _memory(work: Work, profiles: Callable[[Network, str], Any]) -> float:
    groups = [sum(scale_of(step, profiles).bytes for step in group) for group in work.together]
    return work.held + max(groups, default=0.0)


def _weights(work: Work, profiles: Callable[[Network, str], Any]) -> int:
    """Bytes of what a member's training leaves."""
    trained = [step for step in work.uses if isinstance(step, TrainStep | MocoStep)]
    return sum(int(profiles(step.network, "train").weights) for step in trained)


def held_now(device: torch.device) -> int:
    """Bytes that the process holds before any work: the libraries, on a CPU."""
    return 0 if device.type == "cuda" else highest_resident()


def prediction_path(config: RunConfig) -> Path:
    """Return where the prediction of a configuration lies, whatever machine and loggers it runs with."""
    return config.paths.store / FOLDER / f"{digest_of('prediction', what_is_made(config), [])}.json"


def save_prediction(config: RunConfig, stages: Sequence[StageCost], machine: str, notes: Sequence[str]) -> Path:
    """Write a prediction where :func:`load_prediction` finds it; return where that is."""
    path = prediction_path(config)
    content = {"machine": machine, "notes": list(notes), "stages": [asdict(stage) for stage in stages]}
    with store_errors(config.paths.store):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def load_prediction(config: RunConfig) -> tuple[str, list[StageCost]] | None:
    """Return the machine and the stages of the last prediction of an equal configuration, if there was one."""
    try:
        content = json.loads(prediction_path(config).read_text())
        return str(content["machine"]), [StageCost(**stage) for stage in content["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        # Written by another version, or never: the page can do without.
        return None


def measured_seconds(pieces: Sequence[Piece], stage: StageCost) -> float:
    """Seconds that processes took, all together, for what of a stage was missing when it was predicted for one."""
    return sum(
        _process_seconds(piece.artifact.manifest["cost"])
        for piece in pieces
        if piece.stage == stage.stage and piece.made and piece.name not in stage.made
    )


def _process_seconds(cost: Mapping[str, Any]) -> float:
    # Artefacts of earlier versions have but one time, which is this.
    return float(cost.get("process_seconds", cost["wall_seconds"]))


def _noun(piece: Piece) -> str:
    if piece.stage == "students":
        return "students"
    kind = piece.artifact.kind
    nouns = {
        "images": "images",
        "labels": "labels",
        "patches": "patches",
        "easiest": "easiest images",
        "medium": "images of middling difficulty",
        "candidates": "real images to choose from",
    }
    return f"sets of {nouns[kind]}" if kind in nouns else kind
