"""What is compared: names, sizes, and both programs of every case."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import engine, settings
from benchmarks.limits import Work, count_work
from benchmarks.reference import member as plain_member
from benchmarks.reference import recover as plain_recover
from benchmarks.reference import relabel as plain_relabel
from benchmarks.reference import student as plain_student
from benchmarks.timing import Program, timed
from cvdd.backbones import build_network
from cvdd.computing.passes import Passes, passes_of_students
from cvdd.schema import RunConfig
from cvdd.synthesis.engine import Engine
from cvdd.synthesis.voting import Voter

Kind = Literal["recover", "relabel", "student", "committee"]
Side = Literal["reference", "engine"]

FAMILIES = ("resnet18", "resnet50", "shufflenetv2", "mobilenetv2", "densenet121")
EPOCH = {"digits": 5188, "cifar": 50_000}
"""Images in an epoch of committee pretraining."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        kind: the stage.
        data: whose settings, networks and sizes are used.
        members: who votes or labels; of a student or a member, the network itself.
        images: of a unit, of the labelled set, or of the real data.
        steps: iterations, or epochs, in one repetition.
        units: in the engine's stack.
        reference_units: of these, made by the reference; one is as fast as another.
        reference_steps: iterations of the reference, of which one is as fast as another; None is as many.
        named: whether the name says who the members are.
        overrides: what else the configuration is told, such as how the engine computes.
    """

    kind: Kind
    data: str
    members: tuple[str, ...]
    images: int
    steps: int
    units: int = 1
    reference_units: int = 1
    reference_steps: int | None = None
    named: bool = True
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What ``--only`` takes."""
        size = [str(self.images)] if self.kind == "recover" else []
        half = ["bf16"] if any(override.endswith("=bf16") for override in self.overrides) else []
        return "_".join([self.kind, self.data, *size, *(self.members if self.named else []), *half])

    @property
    def config(self) -> RunConfig:
        """Settings of the stage, as published where there is something published."""
        return settings.configuration(self.data, self.overrides)

    @property
    def quantity(self) -> str:
        """What the two numbers of a row are."""
        return {
            "recover": "ms per image and iteration",
            "relabel": "labels per second",
            "student": "images per second",
            "committee": f"s per epoch of {EPOCH.get(self.data, 0):,} images",
        }[self.kind]

    def shown(self, seconds: float) -> float:
        """The time of one unit of work, in the case's quantity."""
        if self.kind == "recover":
            return 1e3 * seconds
        return seconds * EPOCH[self.data] if self.kind == "committee" else 1 / seconds

    def amount(self, side: Side) -> int:
        """Units of work in one repetition: images times iterations, labels, or images shown."""
        units = self.units if side == "engine" else self.reference_units
        return self.images * self.steps_of(side) * (units if self.kind == "recover" else 1)

    def steps_of(self, side: Side) -> int:
        """Iterations, or epochs, in one repetition."""
        return self.steps if side == "engine" else self.reference_steps or self.steps


def cpu_cases() -> list[Case]:
    """Cases that a small machine without a GPU gets through."""
    light, dense = ("resnet18", "mobilenetv2"), ("shufflenetv2", "densenet121")
    once, half = ("engine=compiled",), ("engine.precision=bf16",)
    relabel = Case("relabel", "cifar", (*light, *dense), images=100, steps=5, reference_steps=1, named=False)
    student = Case("student", "cifar", ("resnet18",), images=100, steps=3, reference_steps=2)
    return [
        Case("recover", "digits", light, images=10, steps=25, units=10, reference_units=10, overrides=once),
        Case("recover", "cifar", light, images=10, steps=2, units=10, reference_units=5),
        Case("recover", "cifar", light, images=10, steps=2, units=10, reference_units=5, overrides=half),
        Case("recover", "cifar", dense, images=10, steps=2, units=10, reference_units=5, overrides=half),
        Case("recover", "cifar", light, images=100, steps=2, overrides=half),
        Case("recover", "cifar", dense, images=100, steps=2, overrides=half),
        Case("recover", "imagenet", light, images=10, steps=3, overrides=half),
        relabel,
        replace(relabel, overrides=("engine.precision_labels=bf16",)),
        student,
        replace(student, overrides=("engine.precision_students=bf16",)),
        Case("committee", "digits", ("resnet18",), images=1280, steps=2),
        Case("committee", "cifar", ("mobilenetv2",), images=512, steps=1),
    ]


def gpu_cases(more: bool = False) -> list[Case]:
    """Full sizes, with all ten pairs of the committee; the most telling come first, in case time runs out.

    Args:
        more: also those that do not fit into ten minutes beside the others, whose compilers take most of it.
    """
    light, dense = ("resnet18", "mobilenetv2"), ("shufflenetv2", "densenet121")
    # A run of 4,000 iterations is worth a compiler, even where IPC is so small that auto does without.
    once = ("engine.compile=true",)
    relabel = Case("relabel", "cifar", FAMILIES, images=100, steps=20, reference_steps=2, named=False)
    student = Case("student", "cifar", ("resnet18",), images=100, steps=20, reference_steps=10)
    half = ("engine.precision_members=bf16",)
    small, large = (
        [
            Case("recover", data, pair, images, steps, units, reference_steps=few, overrides=once)
            for pair in itertools.combinations(FAMILIES, 2)
        ]
        for data, images, steps, units, few in (("cifar", 10, 25, 10, 5), ("imagenet", 100, 10, 1, 2))
    )
    others = [
        *(
            Case("recover", "cifar", pair, images=100, steps=25, reference_steps=3, overrides=once)
            for pair in (light, dense)
        ),
        Case("recover", "digits", light, images=10, steps=25, units=10, reference_steps=10, overrides=once),
    ]
    return [
        student,
        relabel,
        *small,
        *large,
        *(
            Case("committee", "cifar", (name,), images=5_120, steps=2, reference_steps=1, overrides=half)
            for name in FAMILIES
        ),
        replace(student, overrides=("engine.precision_students=bf16",)),
        replace(relabel, overrides=("engine.precision_labels=bf16",)),
        *(others if more else []),
    ]


def chosen(cases: Sequence[Case], wanted: Sequence[str]) -> list[Case]:
    """Pick cases by name, or by the first words of their names; all if none is wanted.

    Raises:
        ValueError: nothing has such a name.
    """
    picked = []
    for words in wanted:
        found = [case for case in cases if f"{case.name}_".startswith(f"{words}_")]
        if not found:
            raise ValueError(f"no case is called {words}; there are {', '.join(case.name for case in cases)}")
        picked += [case for case in found if case not in picked]
    return picked if wanted else list(cases)


def make_program(case: Case, side: Side, device: torch.device, folder: Path) -> Program:
    """Prepare one side of a case: networks, images and files.

    Args:
        case: the sizes.
        side: whose program.
        device: where it computes.
        folder: an empty directory of its own.
    """
    makers: dict[Kind, Callable[[Case, Side, torch.device, Path], Program]] = {
        "recover": _recover,
        "relabel": _relabel,
        "student": _student,
        "committee": _member,
    }
    return makers[case.kind](case, side, device, folder)


def _recover(case: Case, side: Side, device: torch.device, folder: Path) -> Program:
    config = case.config
    images, targets = settings.random_units(config, case.units, case.images)
    if side == "engine":
        how = engine.engine_of(config, case.members, images, device)
        voters = [_voter(case, name, how, device) for name in case.members]

        @functools.cache
        def compiled() -> None:
            # As was done ahead; it takes a moment where that was so, and belongs to the warm-up.
            for name in case.members:
                compile_member(case, name, device)

        def program() -> float:
            compiled()
            return engine.recover(config, how, voters, images, targets, case.steps, folder, device)

        return program
    members = _members(case, device)
    committee = plain_recover.Committee(members, [1 / len(members)] * len(members))
    plain = settings.recover_settings(config, device)
    units = images[: case.reference_units].to(device), targets[: case.reference_units].to(device)
    return timed(lambda: plain_recover.recover(committee, *units, plain, case.steps_of(side)), device)


_VOTERS: dict[tuple[object, ...], dict[tuple[str, Engine], Voter]] = {}


def _voter(case: Case, name: str, how: Engine, device: torch.device) -> Voter:
    """A member in the form in which it judges, once for all pairs of the same size, as a run has it for all draws."""
    known = _VOTERS.setdefault((case.data, case.images, case.units, case.overrides, device), {})
    if (name, how) not in known:
        member = copy.deepcopy(_known_member(case.data, case.overrides, name, device))
        known[name, how] = engine.ready([member], how)[0]
    return known[name, how]


def compile_member(case: Case, name: str, device: torch.device) -> None:
    """Compile the judgement of one member in this process, which fills the cache of all."""
    config = case.config
    images, targets = (values.to(device) for values in settings.random_units(config, case.units, case.images))
    how = engine.engine_of(config, case.members, images, device)
    if how.compile:
        engine.judge_once(config, _voter(case, name, how, device), how, images, targets)


def prepare_member(case: Case, name: str, device: torch.device) -> None:
    """Make what all cases with a member need of it, so that it is there when they are measured."""
    compile_member(case, name, device)
    _work_of_member(replace(case, members=(name,)), device)


@functools.cache
def _known_member(data: str, overrides: tuple[str, ...], name: str, device: torch.device) -> nn.Module:
    return settings.random_member(settings.configuration(data, overrides), name, device)


def _members(case: Case, device: torch.device) -> list[nn.Module]:
    """Members of a case with random weights; copies, because a reference hooks into them."""
    return [copy.deepcopy(_known_member(case.data, case.overrides, name, device)) for name in case.members]


def _relabel(case: Case, side: Side, device: torch.device, folder: Path) -> Program:
    config = case.config
    teachers = settings.random_members(config, case.members, device)
    pixels = settings.random_pixels(config, case.images).to(device)
    numbers = itertools.count()

    def fresh() -> Path:
        made = folder / f"labels{next(numbers)}"
        made.mkdir()
        return made

    if side == "engine":
        label = config.label.model_copy(update={"epochs": case.steps})
        passes = engine.real_passes_of_labels(config, case.members, device)
        labels = engine.make_labels(config, teachers, pixels, label, passes)
        return lambda: engine.relabel(config, labels, fresh(), device)
    for teacher in teachers:
        plain_relabel.use_batch_statistics(teacher)
    weights, plain = [1 / len(teachers)] * len(teachers), settings.relabel_settings(config)
    return timed(
        lambda: plain_relabel.relabel(teachers, weights, pixels, plain, case.steps_of(side), fresh()),
        device,
    )


class _Flat(nn.Module):
    """A teacher that costs nothing: students take as long whoever labelled."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(images).square().mean(dim=(2, 3)))
        return logits


def _student(case: Case, side: Side, device: torch.device, folder: Path) -> Program:
    config, files = case.config, folder / "labels"
    files.mkdir()
    start = _network(case, device)
    pixels, teacher = settings.random_pixels(config, case.images), _Flat(config.dataset.num_classes)
    if side == "engine":
        label = config.label.model_copy(update={"epochs": engine.lead_of(device) + case.steps})
        engine.relabel(
            config, engine.make_labels(config, [teacher], pixels, label, Passes()), files, torch.device("cpu")
        )
        labels = engine.stored_labels(config, label, case.images, files)
        passes = passes_of_students(config.engine, device)
        return lambda: engine.student(config, copy.deepcopy(start), pixels, labels, folder, device, passes)
    plain = settings.student_settings(config)
    networks = [plain_relabel.use_batch_statistics(teacher)]
    plain_relabel.relabel(networks, [1.0], pixels, settings.relabel_settings(config), case.steps_of(side), files)
    per_epoch = len(list(files.glob("epoch0_*")))
    names = [f"epoch{epoch}_batch{batch}.pt" for epoch in range(case.steps_of(side)) for batch in range(per_epoch)]
    records = [plain_relabel.Record(**torch.load(files / name)) for name in names]
    loader = plain_student.make_loader(plain_student.save_images(pixels, folder), records, plain)

    def train() -> None:
        network = copy.deepcopy(start)
        optimizer = plain_student.make_optimizer(network, plain)
        plain_student.train(network, optimizer, loader, records, plain, device)

    return timed(train, device)


def _member(case: Case, side: Side, device: torch.device, folder: Path) -> Program:
    config, start = case.config, _network(case, device)
    pixels = settings.random_pixels(config, case.images)
    labels = torch.arange(case.images).remainder(config.dataset.num_classes)
    if side == "engine":
        return lambda: engine.member(config, copy.deepcopy(start), pixels, labels, case.steps, folder, device)
    recipe, dataset = config.recipe, config.dataset
    images = plain_member.Images(pixels, labels, tuple(dataset.mean), tuple(dataset.std), recipe.pad, recipe.flip)
    loader = plain_member.make_loader(images, recipe.batch_size)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW

    def train() -> None:
        network = copy.deepcopy(start)
        optimizer = kind(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
        for _ in range(case.steps_of(side)):
            plain_member.train_epoch(network, optimizer, loader, device)

    return timed(train, device)


def _network(case: Case, device: torch.device) -> nn.Module:
    backbone = case.config.committee.members[case.members[0]].backbone.model_copy(update={"pretrained": False})
    return build_network(backbone, case.config.dataset.num_classes, 0).to(device)


def work_of(case: Case, device: torch.device) -> Work:
    """Count what one unit of work needs: an image in an iteration, a label, or an image in an epoch."""
    config = case.config
    if case.kind == "recover":
        return Work.sum([_work_of_member(replace(case, members=(name,)), device) for name in case.members])
    count = config.label.batch_size
    samples = torch.randn(count, 3, config.dataset.image_size, config.dataset.image_size, device=device)
    if case.kind == "relabel":
        teachers = settings.random_members(config, case.members, device)
        return count_work(lambda: [teacher(samples) for teacher in teachers]).scaled(1 / count)
    network = _network(case, device)
    targets = torch.zeros(count, dtype=torch.long, device=device)
    return count_work(lambda: F.cross_entropy(network(samples), targets).backward()).scaled(1 / count)


@functools.cache
def _work_of_member(case: Case, device: torch.device) -> Work:
    """What one image in an iteration needs of a single member."""
    config = case.config
    committee = plain_recover.Committee(_members(case, device), [1.0])
    plain = settings.recover_settings(config, device)
    images, targets = settings.random_units(config, 1, case.images)
    unit = plain_recover.Recovery(committee, images[0].to(device), targets[0].to(device), plain)
    return count_work(unit.step).scaled(1 / case.images)
