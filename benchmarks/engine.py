"""The engine's side of every case: one adapter for each stage, to be changed when the engine changes, and nothing else.

Each does what its stage in ``cvdd/chain`` does, on given networks and images, and says how long the steady work took.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.timing import Stopwatch
from cvdd.artifact import Store
from cvdd.augmentation.augment import Views, pixel_bounds
from cvdd.chain.context import Context
from cvdd.computing.compiler import compiling
from cvdd.computing.passes import Passes, passes_of_labels, passes_of_members
from cvdd.labels.batches import SoftLabelDataset
from cvdd.labels.pool import LabelPool
from cvdd.labels.sources import ComputedLabels
from cvdd.labels.store import LabelLayout, StoredLabels, write_labels
from cvdd.labels.teachers import Teachers
from cvdd.schema import LabelConfig, MethodConfig, RunConfig
from cvdd.synthesis.distill_module import DistillModule
from cvdd.synthesis.engine import Engine, Work, choose_engine, ready_voter
from cvdd.synthesis.units import Stage, Unit, View, unit_matrices, unit_views
from cvdd.synthesis.voting import Voter
from cvdd.training.classifier import Positions, ShuffledBatches
from cvdd.training.measure import Accuracy
from cvdd.training.member import MemberModule
from cvdd.training.recorded_student import make_student_module

LEAD = 3
"""Epochs of students and members on a GPU before the clock starts: steps are recorded meanwhile, once per run."""


class _Clock(pl.Callback):
    """Measures what Lightning does to the end of training: all steps, and all overhead of each.

    Args:
        stopwatch: started and stopped.
        epoch: at whose start the clock starts.
        batch: of that epoch, at whose start the clock starts.
    """

    def __init__(self, stopwatch: Stopwatch, epoch: int, batch: int) -> None:
        self.stopwatch, self.epoch, self.batch, self.started = stopwatch, epoch, batch, False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.batch == 0:
            self._start(trainer, 0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start(trainer, batch_idx)

    def _start(self, trainer: pl.Trainer, batch: int) -> None:
        if not self.started and trainer.current_epoch == self.epoch and batch == self.batch:
            self.stopwatch.start()
            self.started = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stopwatch.stop()


def fit(
    config: RunConfig,
    module: pl.LightningModule,
    loader: DataLoader[Any] | None,
    epochs: int,
    folder: Path,
    device: torch.device,
    parts: int = 1,
    start: tuple[int, int] = (0, 0),
) -> float:
    """Run Lightning as every stage does; return the seconds that training took from a batch of an epoch on."""
    quieten()
    stopwatch = Stopwatch(device)
    module.configure_callbacks = lambda: [_Clock(stopwatch, *start)]  # type: ignore[method-assign]
    context = Context(config, Store(folder), device)
    context.fit(module, loader, epochs, folder / "training.ckpt.tmp", parts)
    return stopwatch.seconds


def quieten() -> None:
    """Keep Lightning from announcing the hardware in every repetition."""
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in ("does not have many workers", "number of training batches", "`srun` command", "LeafSpec"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def timed_method(config: RunConfig, steps: int) -> MethodConfig:
    """Return the method without ``log_agreement``: a diagnosis that the reference does not make.

    A few cosines at each log row, of gradients that are known anyhow.
    """
    return config.method.model_copy(update={"log_agreement": False, "log_every": min(config.method.log_every, steps)})


def engine_of(config: RunConfig, members: Sequence[str], images: Tensor, device: torch.device) -> Engine:
    """Decide as a real run of this configuration does, whose iterations are all that the method asks for.

    Args:
        config: the configuration.
        members: names of those that vote.
        images: [units, images, 3, size, size] of a stack.
        device: where they vote.
    """
    units, count = images.shape[:2]
    made = config.ipc.images_per_class * config.dataset.num_classes
    work = Work(
        tuple(config.committee.members[name].backbone for name in members),
        made * config.method.iterations,
        count,
        units,
        images.shape[-1],
        config.dataset.num_classes,
    )
    return choose_engine(config.engine, config.method, work, device)


def ready(networks: Sequence[nn.Module], engine: Engine) -> list[Voter]:
    """Bring members into the form in which they judge, as once for every draw."""
    return [ready_voter(f"member{index}", network, 1.0, engine) for index, network in enumerate(networks)]


def judge_once(config: RunConfig, voter: Voter, engine: Engine, units: Tensor, targets: Tensor) -> Tensor:
    """Let a member judge images [units, images, 3, size, size] as an iteration does; return their gradient."""
    method, shown = config.method, units.detach().requires_grad_()
    with compiling(engine.compile):
        judgement = engine.opinion(
            shown,
            targets,
            voter,
            ce=method.ce,
            r_bn=method.r_bn,
            first_bn_multiplier=method.first_bn_multiplier,
            statistics_of=method.statistics_of,
            across=None,
        )
        (gradient,) = torch.autograd.grad(judgement.value.sum(), shown)
    return gradient


def make_module(
    config: RunConfig,
    method: MethodConfig,
    voters: Sequence[Voter],
    images: Tensor,
    targets: Tensor,
    stage: Stage,
    views: Sequence[Views] | None = None,
    engine: Engine | None = None,
) -> DistillModule:
    """Return the module that optimises a stack [units, images, 3, size, size] whose members vote alike."""
    units = [Unit(slot, 0, 0, targets.shape[1]) for slot in range(len(images))]
    drawn = [unit_views(unit, method, stage) for unit in units] if views is None else views
    how = engine or Engine()
    return DistillModule(
        images,
        targets,
        drawn,
        voters,
        torch.full((len(voters), len(images)), 1 / len(voters)),
        method,
        pixel_bounds(config.dataset.mean, config.dataset.std),
        lambda row, current: None,
        stage,
        units_per_pass=how.units_per_pass,
        opinion=how.opinion,
        record=how.record,
    )


def recover(
    config: RunConfig,
    engine: Engine,
    voters: Sequence[Voter],
    images: Tensor,
    targets: Tensor,
    steps: int,
    folder: Path,
    device: torch.device,
) -> float:
    """Optimise a stack for so many iterations; return the seconds of the iterations.

    On a GPU as many iterations come before them, in which they are recorded.
    """
    method = timed_method(config, steps)
    lead = math.ceil(steps / method.log_every) if device.type == "cuda" else 0
    stage = Stage(0, 0, lead * method.log_every + steps, images.shape[-1])
    module = make_module(config, method, voters, images, targets, stage, engine=engine)
    assert module.epochs == 1
    with compiling(engine.compile):
        return fit(config, module, None, 1, folder, device, start=(0, lead))


def recover_gradient(
    config: RunConfig,
    members: Sequence[nn.Module],
    images: Tensor,
    targets: Tensor,
    views: Sequence[Views],
) -> tuple[float, Tensor]:
    """Loss of a stack, summed over its units, and its gradient, each unit seen through its own single view."""
    stage = Stage(0, 0, 1, images.shape[-1])
    module = make_module(config, config.method, ready(members, Engine()), images, targets, stage, views)
    rows, columns = unit_matrices(Views.cat(list(views)), images.shape[-1])
    module.to(images.device)
    # What a training step does up to the optimiser, which has no name of its own.
    seen = module._seen(View(rows.to(images), columns.to(images)))
    gradient, vote = module._vote(0, seen.detach(), False)
    seen.backward(gradient)
    assert module.images.grad is not None
    return float(vote.loss), module.images.grad


def recover_free(
    config: RunConfig,
    members: Sequence[nn.Module],
    images: Tensor,
    targets: Tensor,
    views: Sequence[Views],
    folder: Path,
    device: torch.device,
) -> Tensor:
    """Images of a stack after as many iterations as there are views, in full precision."""
    steps = len(views[0].flips)
    method = timed_method(config, steps)
    stage = Stage(0, 0, steps, images.shape[-1])
    module = make_module(config, method, ready(members, Engine()), images, targets, stage, views)
    fit(config, module, None, module.epochs, folder, device)
    return module.images.detach().cpu()


def real_passes_of_labels(config: RunConfig, members: Sequence[str], device: torch.device) -> Passes:
    """Decide as a real run of this configuration does, which labels all images for all epochs."""
    backbones = [config.committee.members[name].backbone for name in members]
    classes, size = config.dataset.num_classes, config.dataset.image_size
    samples = LabelPool.of(config.label, config.ipc.images_per_class * classes).samples
    return passes_of_labels(config.engine, config.label, backbones, samples, classes, size, device)


def make_labels(
    config: RunConfig, teachers: Sequence[nn.Module], pixels: Tensor, label: LabelConfig, passes: Passes
) -> ComputedLabels:
    """Return labels of images [count, 3, size, size] uint8 by teachers that count alike."""
    weights = [1 / len(teachers)] * len(teachers)
    voting = Teachers(teachers, weights, label, passes).to(pixels.device)
    return ComputedLabels(voting, pixels, label, 0, config.dataset.mean, config.dataset.std)


def relabel(config: RunConfig, labels: ComputedLabels, folder: Path, device: torch.device) -> float:
    """Compute all labels and write them into an empty folder; return the seconds."""
    layout = LabelLayout.of(labels.label, labels.count, config.dataset.num_classes)
    # The last epoch is kept where it was computed; a repetition must not find it there.
    labels = replace(labels)
    stopwatch = Stopwatch(device)
    with stopwatch.running():
        write_labels(folder, labels, layout, lambda epochs: None)
    return stopwatch.seconds


def stored_labels(config: RunConfig, label: LabelConfig, count: int, folder: Path) -> StoredLabels:
    """Open what :func:`relabel` wrote."""
    layout = LabelLayout.of(label, count, config.dataset.num_classes)
    return StoredLabels(folder, layout, label, config.dataset.image_size, 0)


def student(
    config: RunConfig,
    network: nn.Module,
    pixels: Tensor,
    labels: StoredLabels,
    folder: Path,
    device: torch.device,
    passes: Passes,
) -> float:
    """Train a student on all labelled epochs, without measuring it; return the seconds, on a GPU without the lead."""
    dataset = SoftLabelDataset(labels, device)
    module, loader = make_student_module(
        config.protocol,
        dataset,
        pixels,
        torch.arange(len(pixels)).remainder(config.dataset.num_classes),
        config.dataset.mean,
        config.dataset.std,
        passes,
        looks=config.label.randaugment,
        shared=False,
        **_unmeasured(network),
    )
    with compiling(passes.compile):
        start = (lead_of(device), 0)
        return fit(config, module, loader, labels.epochs, folder, device, config.protocol.accumulation, start)


def member(
    config: RunConfig,
    network: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    epochs: int,
    folder: Path,
    device: torch.device,
) -> float:
    """Train a member on images in memory for so many epochs, without measuring it; return the seconds.

    On a GPU the lead comes before them.
    """
    recipe, dataset = config.recipe, config.dataset
    passes = passes_of_members(config.engine, device)
    module = MemberModule(
        recipe,
        pixels,
        labels,
        dataset.mean,
        dataset.std,
        dataset.image_size,
        passes,
        **_unmeasured(network),
    )
    sampler = ShuffledBatches(len(pixels), recipe.batch_size, 0)
    loader: DataLoader[Any] = DataLoader(Positions(), sampler=sampler, batch_size=None)
    lead = lead_of(device)
    with compiling(passes.compile):
        return fit(config, module, loader, lead + epochs, folder, device, recipe.accumulation, (lead, 0))


def lead_of(device: torch.device) -> int:
    """Epochs before the clock starts."""
    return LEAD if device.type == "cuda" else 0


def _unmeasured(network: nn.Module) -> dict[str, Any]:
    return {
        "network": network,
        "name": "benchmark",
        "seed": 0,
        "measure": lambda measured: Accuracy(0.0, 0.0, 0.0),
        "measured_at": lambda epoch: False,
        "on_epoch": lambda epoch, row: None,
    }
