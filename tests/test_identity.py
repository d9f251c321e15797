"""What each field is part of: the digests of what is made from it change, and no others do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import TINY, configure

from cvdd.chain.members import _told_otherwise
from cvdd.cost.plan import plan_pieces, planning
from cvdd.schema import RunConfig, with_overrides

STUDENTS = {"students"}
LABELS = {"labels", *STUDENTS}
IMAGES = {"images", *LABELS}
PATCHES = {"patches", *IMAGES}
MEMBERS = {"members", *PATCHES}

MEASURED = (
    "prior.source=measured prior.values={} prior.images_per_class=2 prior.iterations=2 prior.epochs=2 "
    "committee.voter=prior"
)
"""Priors are only looked at where they are measured."""

CHANGES: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    (
        MEMBERS,
        (
            "dataset.mean=[0.4,0.4,0.4]",
            "dataset.std=[0.3,0.3,0.3]",
            "dataset.train_per_class=20",
            "dataset.test_per_class=9",
            "dataset.split_seed=1",
            "dataset.evaluate_on=validation",
            "dataset.digits.seed=1",
            "recipe.epochs=3",
            "recipe.batch_size=40",
            "recipe.accumulation=2",
            "recipe.optimizer=adam",
            "recipe.lr=0.02",
            "recipe.optimizer=sgd recipe.momentum=0.8",
            "recipe.optimizer=sgd recipe.nesterov=true",
            "recipe.optimizer=muon",
            "recipe.weight_decay=0.1",
            "recipe.schedule=cosine",
            "recipe.schedule=cosine recipe.cosine_period=3",
            "recipe.label_smoothing=0.1",
            "recipe.crop=none",
            "recipe.pad=2",
            "recipe.crop=resized recipe.crop_scale=[0.5,1.0]",
            "recipe.flip=true",
            "committee.members.resnet18.backbone.arguments.width=6",
            "committee.members.resnet18.backbone.name=other",
            "engine.precision_members=bf16",
            "seed=1",
        ),
    ),
    # Each of its fields is looked at in tests/test_moco_chain.py.
    (MEMBERS | {"encoders"}, ('recipe.moco={"epochs":1,"batch_size":20,"groups":2,"lr":0.1}',)),
    (
        PATCHES,
        (
            "patches.observer=resnet50",
            "patches.factor=2",
            "patches.crops=3",
            "patches.candidates=9",
            "patches.crop_scale=[0.5,1.0]",
            "patches.difficulty=easy",
            "patches.images_per_class=3",
            "method.seed=1",
            "method.init=real",
            "method.init=noise",
        ),
    ),
    (PATCHES | {"herds"}, ("method.init=herding",)),
    (PATCHES | {"easiest"}, ("method.init=easiest",)),
    (PATCHES | {"medium"}, ("method.init=medium",)),
    (
        IMAGES | {"easiest"},
        (
            "method.init=easiest patches.observer=resnet50",
            "method.init=easiest method.seed=1",
            "method.init=easiest patches.candidates=9",
        ),
    ),
    (
        IMAGES | {"herds"},
        ("method.init=herding method.seed=1", "method.init=herding patches.candidates=9"),
    ),
    (
        IMAGES,
        (
            "label.batch_size=10 ipc.images_per_class=1",
            "committee.members.resnet18.bn_scale=0.5",
            "committee.size=1",
            "committee.draw=best",
            "committee.draw=random",
            "committee.voter=equal",
            "committee.voter=random",
            "prior.values.resnet18=50",
            "temperature.vote=2",
            "patches.factor=2 label.factor=2 method.factor=2",
            "method.composer=classes",
            "method.classes_per_unit=5",
            "method.composer=classes method.slots_per_unit=1",
            "method.units_per_stack=1",
            "method.voters=all",
            "method.voters=[resnet18]",
            "method.turns=in_turn",
            "method.turns=sampled",
            "method.iterations=8",
            "method.lr=0.1",
            "method.betas=[0.6,0.9]",
            "method.betas=[0.5,0.99]",
            "method.eps=1.0e-7",
            "method.stages=2",
            "method.stages=2 method.sizes=[16,32]",
            "method.stages=2 method.residual=0.5",
            "method.stages=2 method.early_late=true",
            "method.schedule=constant",
            "method.factor=2 label.factor=2 method.init=real method.anchors={}",
            'method.factor=2 label.factor=2 method.init=real method.anchors={"weight":2}',
            'method.factor=2 label.factor=2 method.init=real method.anchors={"layer":"layer2"}',
            'method.factor=2 label.factor=2 method.init=real method.anchors={"distance":"l2"}',
            "method.cutout=0.5",
            "method.ce=0.5",
            "method.r_bn=0.02",
            "method.first_bn_multiplier=1",
            "method.statistics_of=stack",
            "method.statistics.momentum=0.8",
            "method.statistics.momentum=0.8 method.statistics.start=zero",
            "method.statistics.layers=bn_and_conv method.statistics.drop_rate=0.5",
            "method.composer=classes method.density=0.1",
            "method.composer=classes method.density=0.1 method.density_scale=cosine",
            "method.crop_scale=null",
            "method.crop_scale=[0.2,1.0]",
            "method.crop_schedule=cosine",
            "method.crop_schedule=cosine method.crop_milestone=0.5",
            "method.crop_scale=null method.pad=2",
            "method.flip=true",
            "method.jitter=2",
            "method.jitter_both_ways=true",
            "method.jpeg_round_trip=true",
            "engine.precision=bf16",
        ),
    ),
    (
        IMAGES | {"statistics"},
        (
            "method.statistics.layers=bn_and_conv",
            "method.statistics.layers=bn_and_conv method.statistics.patch=2",
            "method.statistics.class_share=0.5",
            "method.statistics.class_share=0.5 method.statistics.class_statistics=total",
            "method.statistics.class_share=0.5 method.statistics.batch=32",
        ),
    ),
    (
        IMAGES | {"difficulty", "group_statistics"},
        (
            "method.difficulty={}",
            'method.difficulty={} method.difficulty={"variance_weight":0.5}',
        ),
    ),
    (IMAGES | {"group_statistics"}, ('method.difficulty={} method.difficulty={"forward_share":1.0}',)),
    (PATCHES, ("method.difficulty={} method.init=difficulty",)),
    (
        IMAGES | {"candidates"},
        (
            "method.stages=2 method.residual=0.5 method.retrieval={}",
            'method.stages=2 method.residual=0.5 method.retrieval={} method.retrieval={"candidates":20}',
            'method.stages=2 method.residual=0.5 method.retrieval={} method.retrieval={"sigma":2.0}',
        ),
    ),
    (
        IMAGES,
        (
            'method.stages=2 method.residual=0.5 method.retrieval={} method.retrieval={"complexity":0.5}',
            'method.stages=2 method.residual=0.5 method.retrieval={} method.retrieval={"shared":false}',
        ),
    ),
    (
        IMAGES,
        (
            'method.init=difficulty method.difficulty={} method.difficulty={"start":"front"}',
            "method.difficulty={} method.units_per_stack=1",
        ),
    ),
    (
        LABELS,
        (
            "temperature.label=2",
            "label.teachers=[resnet18]",
            "label.weights=equal",
            "label.weights=balanced",
            "label.weights=equal label.weights=balanced",
            "label.bn_mode=running",
            "label.halves=false",
            "label.dropout=true",
            "label.epochs=4",
            "label.batch_size=10",
            "label.crop_scale=[0.2,1.0]",
            "label.flip=true",
            "patches.factor=2 label.factor=2",
            "label.shuffle=2",
            "label.randaugment=true",
            "label.dsa=true",
            "label.mix=mixup",
            "label.mix=none",
            "label.mix_alpha=0.5",
            "label.dtype=float32",
            "label.keep=0.5",
            "label.top=1",
            "label.top=1 label.rest=nothing",
            "label.stack=4",
            "label.teachers=[resnet18] label.teachers=[resnet50]",
            "engine.precision_labels=bf16",
        ),
    ),
    (
        # A member that labels and does not vote.
        {"members", *LABELS},
        ("method.voters=[resnet18] committee.members.resnet50.backbone.arguments.width=6",),
    ),
    # Labels that are computed while a student learns are those that are stored.
    ({"labels"}, ("label.store=none", "label.parameters=seed")),
    (
        STUDENTS,
        (
            "protocol.epochs=2",
            "protocol.loss=mse",
            "protocol.temperature=4",
            "protocol.epochs=30 label.epochs=30 protocol.temperature_factor=0.7",
            "protocol.epochs=30 label.epochs=30 protocol.temperature_factor=0.7 protocol.temperature_epochs=9",
            "protocol.epochs=30 label.epochs=30 protocol.temperature_factor=0.7 protocol.temperature_least=1",
            "protocol.accumulation=1 protocol.student_temperature=calibrated",
            "protocol.temperature_squared=true",
            "protocol.loss=mse protocol.hard_label_weight=0.1",
            "protocol.loss=gift",
            "protocol.loss=gift protocol.hard_label_weight=0.1",
            "protocol.optimizer=sgd",
            "protocol.optimizer=muon",
            "protocol.lr=0.01",
            "protocol.betas=[0.8,0.999]",
            "protocol.betas=[0.9,0.99]",
            "protocol.optimizer=sgd protocol.momentum=0.8",
            "protocol.weight_decay=0.1",
            "protocol.decay=all",
            "protocol.schedule=linear",
            "protocol.eta=2",
            "protocol.warmup=1",
            "protocol.ema=0.9",
            "protocol.accumulation=1",
            "protocol.part_weights=by_size",
            "protocol.repeat_labels=true",
            "protocol.repeat_labels=true label.epochs=2 protocol.hard_share=0.34",
            "protocol.repeat_labels=true label.epochs=2 protocol.hard_share=0.34 protocol.label_smoothing=0.1",
            "protocol.eval_every=3",
            "protocol.seeds=[1]",
            "protocol.seeds=[0,1]",
            "students.tiny_resnet18.arguments.width=5",
            "students.tiny_resnet18.name=other",
            "engine.precision_students=bf16",
            f"{MEASURED} prior.measured_on=test",
            f"{MEASURED} prior.seeds=2",
            f"{MEASURED} prior.epochs=1",
            f"{MEASURED} prior.observer=resnet50",
        ),
    ),
    # Labels of the measurement are not stored.
    ({"images", *STUDENTS}, (f"{MEASURED} prior.iterations=1",)),
)
"""Kinds whose digests change with the last field of each line; the fields before it are what it is compared with."""

UNCHANGED = (
    "trainer.workers=0",
    "trainer.threads=1",
    "trainer.progress=lines",
    "trainer.assistants=1",
    "engine.compile=false",
    "engine.compile_labels=false",
    "engine.cuda_graphs=false",
    "engine.precision=fp32",
    "engine.units_per_pass=auto",
    "logger.wandb_mode=offline",
    "logger.project=other",
    "committee.name=other",
    "method.name=other",
    "label.name=other",
    "protocol.name=other",
    "method.log_every=1",
    "method.log_agreement=false",
    "method.grid_every=1",
    "method.checkpoint_every=4",
    "protocol.eval_batch=7",
    "ipc.label_batch=4",
    "prior.observer=resnet50",
    "prior.seeds=2",
    "cost=true",
)
"""What belongs to no artefact: where a run takes place, what it is called, and how often it tells of itself."""


def test_enough_fields_are_looked_at() -> None:
    assert sum(len(lines) for _, lines in CHANGES) > 100


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return configure(tmp_path_factory.mktemp("identity"), *TINY)


def overridden(config: RunConfig, words: Sequence[str]) -> RunConfig:
    pairs = [word.split("=", 1) for word in words]
    overrides: dict[str, Any] = {key: yaml.safe_load(value) for key, value in pairs}
    return with_overrides(config, overrides)


def digests(config: RunConfig) -> dict[str, set[str]]:
    """By kind, the digests of all that would be made."""
    found: dict[str, set[str]] = {}
    for piece in plan_pieces(planning(config, torch.device("cpu"))):
        found.setdefault(piece.artifact.kind, set()).add(piece.artifact.digest)
    return found


@pytest.fixture(scope="module")
def before(plain: RunConfig) -> Callable[..., dict[str, set[str]]]:
    """From fields to the digests that they give, each computed once."""

    @functools.cache
    def found(*words: str) -> dict[str, set[str]]:
        return digests(overridden(plain, words))

    return found


@pytest.mark.parametrize(
    ("line", "kinds"), [pytest.param(line, kinds, id=line) for kinds, lines in CHANGES for line in lines]
)
def test_a_field_changes_what_is_made_from_it_and_nothing_else(
    line: str, kinds: set[str], plain: RunConfig, before: Callable[..., dict[str, set[str]]]
) -> None:
    words = line.split()
    old, new = before(*words[:-1]), digests(overridden(plain, words))
    assert {kind for kind in old | new if old.get(kind) != new.get(kind)} == kinds


@pytest.mark.parametrize("line", UNCHANGED)
def test_a_field_of_the_surroundings_changes_nothing(
    line: str, plain: RunConfig, before: Callable[..., dict[str, set[str]]]
) -> None:
    assert digests(overridden(plain, [line])) == before()


def test_members_are_made_anew_one_by_one(plain: RunConfig, before: Callable[..., dict[str, set[str]]]) -> None:
    wider = digests(overridden(plain, ["committee.members.resnet50.backbone.arguments.width=6"]))
    assert len(wider["members"] & before()["members"]) == 2
    assert wider["patches"] == before()["patches"]


def test_rows_of_a_comparison_share_their_priors(plain: RunConfig) -> None:
    """A prior measured with another row's initial images would change the weights of the teachers."""
    rows = 'compare={"easy":{"patches.difficulty":"easy"}}'

    def measured(*more: str) -> set[str]:
        pieces = plan_pieces(planning(overridden(plain, [*MEASURED.split(), *more]), torch.device("cpu")))
        return {piece.name for piece in pieces if piece.stage == "priors"}

    assert measured(rows) == measured()
    assert measured("patches.difficulty=easy").isdisjoint(measured())


def test_an_undivided_recipe_keeps_its_hash(tmp_path: Path) -> None:
    """Members that were trained before batches could be divided are found again."""
    recipe = configure(tmp_path, *TINY).recipe
    assert "accumulation" not in recipe.model_dump(exclude=_told_otherwise(recipe))
    divided = recipe.model_copy(update={"accumulation": 2})
    assert divided.model_dump(exclude=_told_otherwise(divided))["accumulation"] == 2
