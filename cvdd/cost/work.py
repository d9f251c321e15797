"""Of what steps an artefact's making consists: pure functions of what determines it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cvdd.artifact import Artifact
from cvdd.backbones.heads import require_head
from cvdd.chain.difficulty import RANKED_AT_ONCE
from cvdd.chain.members import MEASURED_AT_ONCE
from cvdd.chain.retrieval import SHOWN_AT_ONCE
from cvdd.chain.training import every, ten_times
from cvdd.cost.plan import Piece
from cvdd.cost.recovering import RecoverPlan, engine_of, plan_recover
from cvdd.cost.steps import (
    DecodeStep,
    MeasureStep,
    MocoStep,
    MoveStep,
    Network,
    Overhead,
    PatchStep,
    ReplayStep,
    ScoreStep,
    Step,
    StudentStep,
    TrainStep,
    VoteStep,
)
from cvdd.labels.pool import LabelPool
from cvdd.labels.replay import batch_bounds
from cvdd.labels.sources import samples_at_most
from cvdd.labels.store import LabelLayout
from cvdd.schema import LabelConfig
from cvdd.schema.anchors import BEGINNINGS
from cvdd.statistics.features import FEATURES_AT_ONCE
from cvdd.synthesis.engine import iteration_can_be_recorded
from cvdd.synthesis.patches import SCORED_AT_ONCE
from cvdd.synthesis.units import as_composed
from cvdd.training.classifier import ShuffledBatches


@dataclass
class Work:
    """What the making of an artefact costs, in steps.

    Attributes:
        uses: how often each step happens.
        steps: optimiser steps, or for labels forward passes, as people count them.
        parts: what it consists of, by name.
        together: groups of steps whose memory is held at once.
        held: bytes beside them: images that are optimised, the data set.
        image_bytes: pixels of the distilled set.
        label_bytes: of the stored labels.
        other_bytes: everything else that is stored.
        known: False where the cost model does not know how it is made.
    """

    uses: Counter[Step] = field(default_factory=Counter)
    steps: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    together: set[tuple[Step, ...]] = field(default_factory=set)
    held: int = 0
    image_bytes: int = 0
    label_bytes: int = 0
    other_bytes: int = 0
    known: bool = True

    def use(self, step: Step, times: float) -> None:
        """Add so many times a step, whose memory is held by itself."""
        if times:
            self.uses[step] += times  # type: ignore[assignment]
            if not isinstance(step, Overhead):
                self.together.add((step,))

    def around(self, **times: float) -> None:
        """Add what happens around steps, by name."""
        for name, count in times.items():
            self.uses[Overhead(name)] += count  # type: ignore[arg-type, assignment]


def work_of(piece: Piece) -> Work:
    """Count the steps of an artefact."""
    work = Work()
    _COUNTING.get(piece.artifact.kind, _unknown)(piece, work)
    if not work.known:
        return work
    megabytes = (work.image_bytes + work.label_bytes + work.other_bytes) / 1e6
    work.around(artifact=1, megabyte=megabytes)
    return work


def _unknown(piece: Piece, work: Work) -> None:
    work.known = False


def _member(piece: Piece, work: Work) -> None:
    config, data, identity = piece.config, piece.data, piece.identity
    network = _network(piece, identity)
    measured = 1
    if identity.get("recipe") is not None:
        recipe = config.recipe
        step = TrainStep.of(network, recipe, data.train.in_memory)
        batches = len(ShuffledBatches(len(data.train), recipe.batch_size, 0))
        measured += sum(map(ten_times(recipe.epochs), range(recipe.epochs)))
        work.steps = batches * recipe.epochs
        # A last batch that is not full costs less.
        work.use(step, recipe.epochs * min(len(data.train) / recipe.batch_size, batches))
        work.around(fit=1, epoch=recipe.epochs, batch=work.steps)
        work.parts["epochs"] = recipe.epochs
        _decode(piece, work, len(data.train) * recipe.epochs)
    _measure(piece, work, network, len(data.test) * measured, config.protocol.eval_batch)
    if data.train.in_memory:
        work.use(MeasureStep(network, MEASURED_AT_ONCE), len(data.train))
        work.held = _pixels(piece, len(data.train))


def _encoder(piece: Piece, work: Work) -> None:
    data, moco = piece.data, piece.config.recipe.moco
    assert moco is not None
    batches = len(data.train) // moco.batch_size
    work.steps = batches * moco.epochs
    network = _network(piece, piece.identity)
    work.use(MocoStep.of(network, piece.config.recipe, data.train.in_memory), work.steps)
    work.around(fit=1, epoch=moco.epochs, batch=work.steps)
    work.parts["epochs without labels"] = moco.epochs
    _decode(piece, work, work.steps * moco.batch_size)
    if data.train.in_memory:
        work.held = _pixels(piece, len(data.train))


def _student(piece: Piece, work: Work) -> None:
    config, data, identity = piece.config, piece.data, piece.identity
    if config.protocol.student == "method":
        work.known = False
        return
    protocol, label = config.protocol, config.label
    network = _network(piece, identity)
    images, *teachers = piece.parents
    pool = LabelPool.of(label, int(images.metrics["images"]))
    batches = len(batch_bounds(pool.shown, label.batch_size))
    work.steps = batches * protocol.epochs
    shown = protocol.soft_epochs * pool.shown + protocol.hard_epochs * pool.count
    work.use(StudentStep.of(network, protocol, label), shown / label.batch_size)
    work.around(fit=1, epoch=protocol.epochs, batch=work.steps)
    work.parts["epochs"] = protocol.epochs
    if identity.get("compiled"):
        work.around(compile=1)
    if label.store == "none" and label.given is None:
        _score(piece, work, label, teachers, pool.shown * protocol.soft_epochs)
    measured = len(data.test) if identity["measured_on"] == "test" else len(data.train)
    times = sum(map(every(protocol.eval_every, protocol.epochs), range(protocol.epochs)))
    _measure(piece, work, network, measured * times, protocol.eval_batch)
    work.held = _pixels(piece, int(images.metrics["images"]))


def _images(piece: Piece, work: Work) -> None:
    config, data, identity = piece.config, piece.data, piece.identity
    method = as_composed(config)
    if method.brings_students:
        work.known = False
        return
    count = int(piece.artifact.metrics["images"])
    work.image_bytes = _pixels(piece, count)
    if method.init == "all":
        work.parts["units"] = len(data.classes)
        work.around(part=len(data.classes))
        return
    plan = plan_recover(
        method,
        config.ipc.images_per_class,
        len(data.classes),
        data.image_size,
        identity.get("draws", []),
        identity.get("weights", []),
        engine_of(identity),
    )
    work.parts.update({"units": len(plan.units), "stacks": plan.stacks})
    work.around(part=plan.stacks)
    if method.init in (*BEGINNINGS, "difficulty"):
        # Anchors are decoded once more, stack by stack.
        often = 1 if method.anchored is None else 2
        _decode(piece, work, count * method.factor**2 * often, in_workers=False)
    if method.retrieves is not None:
        # What is blended in is chosen by what the observer sees, at the end of each stage but the last.
        observer = Network.of(
            config.committee.members[config.patches.observer].backbone, len(data.classes), data.image_size
        )
        blended = sum(stage.units * stage.images for stage in plan.work) - count
        work.use(MeasureStep(observer, SHOWN_AT_ONCE), blended)
        _decode(piece, work, blended, in_workers=False)
    _recover(piece, work, plan)


def _recover(piece: Piece, work: Work, plan: RecoverPlan) -> None:
    method, data = piece.config.method, piece.data
    matched, engine = method.r_bn > 0, engine_of(piece.identity)
    kinds = set[VoteStep]()
    side_by_side = piece.recorded and iteration_can_be_recorded(method, split=False)
    for stack in plan.work:
        held = dict[int, VoteStep]()
        move = MoveStep.of(stack.units, stack.images, stack.size, method)
        work.use(move, stack.iterations)
        for each in stack.passes:
            backbone = piece.parents[each.member].manifest["identity"]["backbone"]
            network = Network.of(backbone, len(data.classes), stack.size)
            shown = stack.images * method.parts_judged
            step = VoteStep(network, each.units, shown, matched, engine)
            work.uses[step] += each.times  # type: ignore[assignment]
            if method.anchored is not None:
                # Their features, forward alone.
                work.use(MeasureStep(network, each.units * shown), each.times * each.units * shown)
            work.together.add((move, step))
            kinds.add(step)
            if each.member not in held or held[each.member].units < each.units:
                held[each.member] = step
        if side_by_side:
            work.together.add((move, *held.values()))
        work.steps += stack.iterations
        work.around(fit=1, epoch=stack.epochs, batch=stack.rows)
    if engine.compile:
        # A second number of images is compiled for any.
        work.around(compile=sum(min(often, 2) for often in Counter(step.network for step in kinds).values()))


def _labels(piece: Piece, work: Work) -> None:
    label = piece.config.label
    images, *teachers = piece.parents
    layout = LabelLayout.of(label, int(images.metrics["images"]), len(piece.data.classes))
    work.label_bytes = layout.logits_bytes + layout.parameters_bytes
    work.steps = layout.pool.stored
    work.parts["epochs"] = layout.pool.labelled_epochs
    if piece.identity.get("compiled"):
        work.around(compile=len(teachers))
    work.around(part=len(layout.blocks))
    _score(piece, work, label, teachers, layout.pool.samples)


def _patches(piece: Piece, work: Work) -> None:
    data, patches = piece.data, piece.config.patches
    classes = len(data.classes)
    candidates = min(patches.candidates, len(data.train) // classes)
    network = _network(piece, piece.parents[0].manifest["identity"])
    work.use(PatchStep.of(network, patches), candidates * classes)
    work.other_bytes = _pixels(piece, patches.images_per_class * classes)
    work.parts["candidates"] = candidates * classes
    work.held = candidates * patches.crops * 3 * (data.image_size // patches.factor) ** 2 * 5
    _decode(piece, work, candidates * classes, in_workers=False)


def _herd(piece: Piece, work: Work) -> None:
    data = piece.data
    count = min(piece.config.patches.candidates * len(data.classes), len(data.train))
    for member in piece.parents:
        work.use(MeasureStep(_network(piece, member.manifest["identity"]), FEATURES_AT_ONCE), count)
    work.other_bytes = _pixels(piece, piece.config.ipc.images_per_class * len(data.classes))
    _decode(piece, work, count, in_workers=False)


def _ranked(piece: Piece, work: Work) -> None:
    data = piece.data
    count = min(piece.config.patches.candidates * len(data.classes), len(data.train))
    work.use(MeasureStep(_network(piece, piece.parents[0].manifest["identity"]), SCORED_AT_ONCE), count)
    _decode(piece, work, count, in_workers=False)


def _candidates(piece: Piece, work: Work) -> None:
    each = piece.identity["candidates"]
    count = sum(min(images, each or images) for images in Counter(piece.data.train.labels.tolist()).values())
    network = _network(piece, piece.parents[0].manifest["identity"])
    work.use(MeasureStep(network, SHOWN_AT_ONCE), count)
    # Features and complexity in float32, and a position.
    width = require_head(network.build(), "method.retrieval")[1].in_features
    work.other_bytes = (4 * (width + 1) + 8) * count
    work.parts["classes"] = len(piece.data.classes)
    work.around(part=len(piece.data.classes))
    _decode(piece, work, count, in_workers=False)


def _given(piece: Piece, work: Work) -> None:
    count = piece.config.ipc.images_per_class * len(piece.data.classes)
    work.other_bytes = _pixels(piece, count)
    work.use(DecodeStep(piece.data.image_size), count)


def _statistics(piece: Piece, work: Work) -> None:
    network = _network(piece, piece.parents[0].manifest["identity"])
    _measure(piece, work, network, len(piece.data.train), piece.config.method.statistics.batch)


def _difficulty(piece: Piece, work: Work) -> None:
    for member in piece.parents:
        step = MeasureStep(_network(piece, member.manifest["identity"]), RANKED_AT_ONCE)
        work.use(step, len(piece.data.train))
    _decode(piece, work, len(piece.data.train))


def _group_statistics(piece: Piece, work: Work) -> None:
    network, made = _network(piece, piece.parents[0].manifest["identity"]), len(piece.identity["slots"])
    images = len(piece.data.train) * made // piece.identity["groups"]
    work.use(MeasureStep(network, piece.identity["part"]), images * piece.identity["epochs"])
    # Once for all passes.
    _decode(piece, work, images)
    work.parts["groups"] = made
    work.around(part=made)


_COUNTING = {
    "members": _member,
    "encoders": _encoder,
    "students": _student,
    "images": _images,
    "labels": _labels,
    "patches": _patches,
    "herds": _herd,
    "easiest": _ranked,
    "medium": _ranked,
    "candidates": _candidates,
    "given": _given,
    "statistics": _statistics,
    "difficulty": _difficulty,
    "group_statistics": _group_statistics,
}


def _network(piece: Piece, identity: Mapping[str, Any]) -> Network:
    return Network.of(identity["backbone"], len(piece.data.classes), piece.data.image_size)


def _pixels(piece: Piece, images: int) -> int:
    return images * 3 * piece.data.image_size**2


def _measure(piece: Piece, work: Work, network: Network, images: int, batch: int) -> None:
    work.use(MeasureStep(network, batch), images)
    _decode(piece, work, images)


def _score(piece: Piece, work: Work, label: LabelConfig, teachers: list[Artifact], samples: int) -> None:
    images = piece.parents[0]
    together = samples_at_most(label, int(images.metrics["images"]), label.stack)
    steps: list[Step] = [ScoreStep.of(_network(piece, one.manifest["identity"]), label, together) for one in teachers]
    steps.append(ReplayStep.of(label, piece.data.image_size, together))
    for step in steps:
        work.use(step, samples)
    if piece.recorded:
        # Teachers label side by side.
        work.together.add(tuple(steps))


def _decode(piece: Piece, work: Work, images: int, *, in_workers: bool = True) -> None:
    if not piece.data.train.in_memory:
        workers = piece.config.trainer.workers if in_workers else 0
        work.use(DecodeStep(piece.data.image_size), images / max(workers, 1))
