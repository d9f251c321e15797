"""Stages ``distill`` and ``evaluate`` of trajectory matching."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.artifact import Artifact
from cvdd.artifact.tensor_files import save_tensors
from cvdd.backbones import BackboneConfig, build_network
from cvdd.chain.context import Context
from cvdd.chain.initial import initial_images
from cvdd.chain.space import WHITENING, families_of, input_space, measured_in, whitening_of
from cvdd.chain.training import every, log_epochs, save_student
from cvdd.chain.trajectories import flat_network, make_trajectories, mtt_of, open_trajectories
from cvdd.chain.unit_files import UNITS, write_unit
from cvdd.methods.mtt import cross_entropy
from cvdd.support.grids import image_grid
from cvdd.support.seeds import derive_seed, generator
from cvdd.synthesis.trajectory_matching import ExplodingGradients, MatchingModule, MatchRow
from cvdd.synthesis.units import Unit
from cvdd.synthesis.zca import InputSpace
from cvdd.training.classifier import Positions, ShuffledBatches, smallest_batch
from cvdd.training.sgd_training import SgdModule, SgdRecipe, canvas_crops, dsa

log = logging.getLogger(__name__)

MATCHED = "matched.safetensors"
LAST_GOOD = "last_good.safetensors"

LABEL_CONFIDENCE = 0.9
"""Probability of its own class in a learned label, at first."""

WITHOUT_ITERATIONS = ("whitening", "whitening_eps", "canvas", "labels", "labels_start", "step_size")
"""Settings that change the set even if nothing is optimised."""


@dataclass(frozen=True)
class MatchedSet:
    """What trajectory matching makes: the artefact of a publication, with the step size that belongs to it.

    Attributes:
        images: [n, 3, side, side] float32, as networks see them, class by class; side is larger for canvases.
        targets: [n, classes] probabilities; one-hot unless they are learned.
        step_size: learning rate of students.
    """

    images: Tensor
    targets: Tensor
    step_size: float

    def save(self, path: Path) -> None:
        """Write it to a file."""
        tensors = {"images": self.images, "targets": self.targets, "step_size": torch.tensor(self.step_size)}
        save_tensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})

    @staticmethod
    def load(path: Path) -> MatchedSet:
        """Read what :meth:`save` wrote."""
        tensors = load_file(path)
        return MatchedSet(tensors["images"], tensors["targets"], float(tensors["step_size"]))


def make_mtt_images(context: Context) -> Artifact:
    """Return the images that trajectory matching makes, of kind ``images``.

    Besides the 8-bit units that every method writes, the artefact has the exact images, their labels and the step size
    (``matched.safetensors``) and the whitening (``whitening.safetensors``), which students need. With
    ``method.iterations=0`` it has the initial images, and no expert is trained.

    Raises:
        ConfigError: see :func:`cvdd.chain.trajectories.make_trajectories`.
        ExplodingGradients: an update is impossible; the set before it is in the run's directory.
    """
    config, data, settings = context.config, context.data(), mtt_of(context)
    method, ipc = config.method, config.ipc.images_per_class
    whitening = whitening_of(context)
    experts = method.iterations > 0 or settings.labels_start == "expert"
    trajectories = make_trajectories(context) if experts else None
    identity: dict[str, Any] = {
        "data": data.identity,
        "classes": list(data.classes),
        "ipc": ipc,
        "init": method.init,
        "iterations": method.iterations,
        "seed": method.seed,
    }
    if method.iterations:
        identity["mtt"] = settings.model_dump(mode="json", exclude={"experts", "student", "loss_limit"})
        identity["augmentations"] = list(families_of(context))
    else:
        identity["mtt"] = settings.model_dump(mode="json", include=set(WITHOUT_ITERATIONS))
    parents = [artifact for artifact in (whitening, trajectories) if artifact is not None]

    def build(work: Path) -> dict[str, Any]:
        space = input_space(context, whitening).cpu()
        images, targets = _start(context, space, trajectories)
        made, rows = MatchedSet(images, targets, settings.step_size), list[MatchRow]()
        checkpoint = work / "matching.ckpt.tmp"
        if method.iterations:
            assert trajectories is not None
            made, rows = _optimise(context, trajectories, space, images, targets, checkpoint)
        made.save(work / MATCHED)
        if whitening is not None:
            shutil.copyfile(whitening.path / WHITENING, work / WHITENING)
        pixels = space.decode(made.images[..., : data.image_size, : data.image_size])
        _save_units(work / UNITS, pixels.view(len(data.classes), ipc, *pixels.shape[1:]), rows)
        checkpoint.unlink(missing_ok=True)
        return {
            "units": ipc,
            "stacks": 1,
            "images": ipc * len(data.classes),
            "step_size": made.step_size,
            "loss": rows[-1].loss if rows else None,
        }

    name = f"{data.name}-{method.name}-ipc{ipc}"
    return context.store.make("images", name, identity, parents, build)


def load_matched(artifact: Artifact) -> MatchedSet:
    """Read the exact images, their labels and the step size."""
    return MatchedSet.load(artifact.path / MATCHED)


def _start(context: Context, space: InputSpace, trajectories: Artifact | None) -> tuple[Tensor, Tensor]:
    """Initial images, class by class, and their labels."""
    config, data, settings = context.config, context.data(), mtt_of(context)
    ipc, classes = config.ipc.images_per_class, len(data.classes)
    if config.method.init == "noise":
        side = data.image_size * settings.canvas
        source = generator(config.method.seed, "matching noise")
        images = torch.randn(classes * ipc, 3, side, side, generator=source)
    else:
        # A canvas is toroidal, so that copies of an image beside each other have no seam but its own.
        real = space.encode(initial_images(context, None).flatten(0, 1))
        images = real.repeat(1, 1, settings.canvas, settings.canvas)
    targets = torch.eye(classes).repeat_interleave(ipc, dim=0)
    if settings.labels == "hard":
        return images, targets
    if settings.labels_start == "expert":
        assert trajectories is not None
        store = open_trajectories(context, trajectories)
        network = flat_network(context)
        with torch.no_grad():
            last = store.snapshot(0, store.layout.snapshots - 1)
            logits = network(last, images[..., : data.image_size, : data.image_size])
        return images, logits.log_softmax(dim=1).clamp(min=-30).exp()
    rest = (1 - LABEL_CONFIDENCE) / max(classes - 1, 1)
    return images, targets * (LABEL_CONFIDENCE - rest) + rest


def _optimise(
    context: Context, trajectories: Artifact, space: InputSpace, images: Tensor, targets: Tensor, checkpoint: Path
) -> tuple[MatchedSet, list[MatchRow]]:
    method, data = context.config.method, context.data()
    done = 0
    with context.progress("distill", method.iterations) as advance:

        def on_row(row: MatchRow, current: Tensor) -> None:
            nonlocal done
            advance(row.iteration - done)
            done = row.iteration
            _log_row(context, row, space, current)

        module = MatchingModule(
            flat_network(context),
            open_trajectories(context, trajectories),
            images,
            targets,
            method,
            data.image_size,
            families_of(context),
            on_row,
        )
        try:
            context.fit(module, None, module.epochs, checkpoint)
        except ExplodingGradients as error:
            last_good = context.config.paths.output / LAST_GOOD
            _set_of(module).save(last_good)
            raise ExplodingGradients(f"{error}. Images, labels and step size are in {last_good}") from error
    return _set_of(module), module.rows


def _set_of(module: MatchingModule) -> MatchedSet:
    with torch.no_grad():
        probabilities, step_size = module.probabilities().cpu(), float(module.step_size())
    return MatchedSet(module.images.detach().cpu(), probabilities, step_size)


def _log_row(context: Context, row: MatchRow, space: InputSpace, images: Tensor) -> None:
    method, size = context.config.method, context.data().image_size
    values = {"distill/loss": row.loss, "distill/step_size": row.step_size, "distill/lr": row.lr}
    context.log(values, row.iteration)
    if row.iteration % method.grid_every == 0 or row.iteration == method.iterations:
        log.info("iteration %d: matched loss %.4g, step size %.4g", row.iteration, row.loss, row.step_size)
        ipc = context.config.ipc.images_per_class
        # The first image of each class.
        grid = image_grid(space.decode(images[::ipc, :, :size, :size].cpu()))
        context.log_images("distill/images", grid, row.iteration)
        context.save_picture("matching", grid)


def _save_units(folder: Path, pixels: Tensor, rows: Sequence[MatchRow]) -> None:
    """Write one file per slot as every method does; pixels are [classes, ipc, 3, size, size] uint8."""
    folder.mkdir(exist_ok=True)
    # No member votes, so that there are neither weights nor terms of members.
    history = [{**asdict(row), "ce": {}, "bn": {}} for row in rows]
    for slot in range(pixels.shape[1]):
        write_unit(folder, Unit(slot, 0, 0, len(pixels)), pixels[:, slot], history, {})


def make_mtt_student(
    context: Context,
    images: Artifact,
    name: str,
    backbone: BackboneConfig,
    seed: int,
    part: Literal["test", "train"] = "test",
) -> Artifact:
    """Return one student: SGD with the learned step size, DSA and the set's own labels (specification, section 2.7).

    Args:
        context: the configuration and its surroundings.
        images: made by :func:`make_mtt_images`.
        name: of the student.
        backbone: its network.
        seed: of its initialisation, order and augmentation.
        part: images on which it is measured; ``train`` means the real training images, which it has not seen.
    """
    config, data, settings = context.config, context.data(), mtt_of(context)
    protocol, student = config.protocol, settings.student
    identity = {
        "data": data.identity,
        "student": student.model_dump(mode="json"),
        "augmentations": list(families_of(context)),
        "canvas_samples": settings.canvas_samples,
        "eval_every": protocol.eval_every,
        "backbone": backbone.model_dump(mode="json"),
        "seed": seed,
        "measured_on": part,
    }

    def build(work: Path) -> dict[str, Any]:
        made = load_matched(images)
        whitening = images if (images.path / WHITENING).exists() else None
        space = input_space(context, whitening)
        own_seed = derive_seed(seed, "student")
        title = f"student {name} seed {seed}"
        rate = made.step_size if student.lr is None else student.lr
        sgd = SgdRecipe(student.epochs, rate, student.momentum, student.weight_decay, student.drop, True)
        with context.progress(title, student.epochs) as advance:
            module = SgdModule(
                sgd,
                made.images,
                made.targets,
                nn.Identity(),
                cross_entropy,
                dsa(families_of(context)),
                "dsa",
                canvas_crops(data.image_size, settings.canvas, settings.canvas_samples),
                sgd.drop_epoch,
                network=build_network(backbone, len(data.classes), own_seed),
                name=title,
                seed=own_seed,
                measure=measured_in(context, space, part),
                measured_at=every(protocol.eval_every, student.epochs),
                on_epoch=log_epochs(context, f"evaluate/{name}/seed{seed}", advance),
                rate=f"method.mtt.student.lr; it was {rate:.4g}",
            )
            least, field = smallest_batch(module.network), "method.mtt.student.batch_size"
            sampler = ShuffledBatches(len(made.images), student.batch_size, own_seed, least, field)
            loader: DataLoader[Any] = DataLoader(Positions(), sampler=sampler, batch_size=None)
            context.fit(module, loader, student.epochs, work / "training.ckpt.tmp")
        return save_student(work, module.curve)

    return context.store.make("students", f"{images.name}-{name}-seed{seed}", identity, [images], build)
