"""How many units, or label batches, are computed at once: as planned, or fewer where too little memory is free."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvdd.artifact import write_atomically
from cvdd.chain.context import Context
from cvdd.computing.footprint import SHARE, free_memory, profile_of, surely_fits
from cvdd.computing.passes import Passes
from cvdd.labels.sources import samples_at_most
from cvdd.synthesis.engine import Engine, judges_by_unit
from cvdd.synthesis.units import Stack

log = logging.getLogger(__name__)

LESS_MEMORY = "less_memory.tmp"
"""Written into an unfinished artefact where memory was short."""


def remembered(work: Path) -> dict[str, Any]:
    """Return what was chosen for an unfinished artefact because memory was short; nothing if it was not."""
    path = work / LESS_MEMORY
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def remember(work: Path, **chosen: Any) -> None:
    """Write down what was chosen, so that later parts, and a resumed run, need not find out again."""
    if chosen != remembered(work):
        write_atomically(work / LESS_MEMORY, json.dumps(chosen).encode())


def forget(work: Path) -> dict[str, Any]:
    """Return what was chosen for an artefact that is finished now, and remove it."""
    chosen = remembered(work)
    (work / LESS_MEMORY).unlink(missing_ok=True)
    return chosen


def fit_units(context: Context, engine: Engine, stacks: Sequence[Stack]) -> Engine:
    """Return how members judge in the memory that is free: as planned, or fewer units in a pass.

    An explicit ``engine.units_per_pass`` stays as it is.

    Args:
        context: the configuration and its surroundings.
        engine: as planned.
        stacks: all that will be made.
    """
    config = context.config
    if config.engine.units_per_pass != "auto" or not judges_by_unit(config.method):
        return engine
    data, members = context.data(), list(config.committee.members.values())
    images = max(len(unit.targets) for stack in stacks for unit in stack.units) * config.method.parts_judged
    units, voters = max(len(stack.units) for stack in stacks), max(len(stack.draw) for stack in stacks)
    if surely_fits(images * min(engine.units_per_pass or units, units), data.image_size, voters, context.device):
        return engine
    size, classes = data.image_size, len(data.classes)
    half = 0.5 if engine.precision == "bf16" else 1.0
    each = {
        index: half * profile_of(members[index].backbone, classes, size, "vote").activations
        for index in {index for stack in stacks for index in stack.draw}
    }

    def needed(how: Engine) -> float:
        # Recorded, all members' maps are held at once.
        together = sum if how.record else max
        image = max(together(each[index] for index in stack.draw) for stack in stacks)
        return image * images * min(how.units_per_pass or units, units)

    free, chosen = SHARE * free_memory(context.device), engine
    while needed(chosen) > free and (fewer := chosen.fewer(units)) is not None:
        chosen = fewer
    if chosen != engine:
        log.warning(
            "%.1f GB of memory are free, and %d units of %d images in a pass would take about %.1f GB: going on with "
            "%d in a pass%s",
            free / SHARE / 1e9,
            engine.units_per_pass or units,
            images,
            needed(engine) / 1e9,
            chosen.units_per_pass or units,
            " and members one after the other" if engine.record and not chosen.record else "",
        )
    return chosen


def fit_batches(context: Context, names: Sequence[str], passes: Passes, count: int) -> int:
    """Return how many label batches share a forward pass in the memory that is free: ``label.stack``, or fewer.

    Args:
        context: the configuration and its surroundings.
        names: of the teachers.
        passes: how they compute.
        count: images that are labelled.
    """
    config, data = context.config, context.data()
    label, size = config.label, data.image_size
    if surely_fits(samples_at_most(label, count, label.stack), size, len(names), context.device):
        return label.stack
    backbones = [config.committee.members[name].backbone for name in names]
    each = [profile_of(backbone, len(data.classes), size, "forward").activations for backbone in backbones]
    # Groups are normalised in copies, and recorded teachers label side by side.
    sample = 2 * (sum(each) if passes.record else max(each, default=0.0))
    free, stack = SHARE * free_memory(context.device), label.stack
    while stack > 1 and sample * samples_at_most(label, count, stack) > free:
        stack //= 2
    if stack < label.stack:
        log.warning(
            "%.1f GB of memory are free, and label.stack=%d would take about %.1f GB: going on with %d batches in "
            "a forward pass",
            free / SHARE / 1e9,
            label.stack,
            sample * samples_at_most(label, count, label.stack) / 1e9,
            stack,
        )
    return stack
