"""Images by adversarial prediction matching, with the logits that belong to them (specification of APM, section 3)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cvdd.artifact import Artifact, write_atomically
from cvdd.artifact.tensor_files import save_tensors
from cvdd.backbones import build_network
from cvdd.chain.apm_teachers import apm_of, draw_teacher, load_teachers, make_apm_teachers
from cvdd.chain.context import Context
from cvdd.chain.initial import initial_images, make_initial_patches
from cvdd.chain.space import families_of, input_space, whitening_of
from cvdd.chain.unit_files import UNITS, write_unit
from cvdd.support.config_base import ConfigError
from cvdd.support.grids import image_grid
from cvdd.support.seeds import derive_seed, generator
from cvdd.synthesis.adversarial import AdversarialModule, AdversarialRow, Pace, teacher_logits
from cvdd.synthesis.units import Unit
from cvdd.synthesis.zca import InputSpace
from cvdd.training.sgd_training import dsa
from cvdd.training.surrogate import require_batches

log = logging.getLogger(__name__)

DISTILLED = "distilled.safetensors"
IMAGES = "images.safetensors"
ROWS = "rows.json"
LABEL_CHUNK = 500
"""Images that are labelled in one forward pass."""


@dataclass(frozen=True)
class LabelledImages:
    """What a student is trained on, class by class, slot by slot.

    Attributes:
        images: [n, 3, size, size] float32 in the space of the networks, neither clamped nor rounded.
        targets: [n] classes.
        logits: [n, classes] of one teacher for the images as they are.
    """

    images: Tensor
    targets: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Part:
    """Slots that are distilled independently of all others.

    Attributes:
        index: of the part.
        start: first slot.
        stop: slot after the last.
    """

    index: int
    start: int
    stop: int


def plan_parts(context: Context) -> list[Part]:
    """Divide the slots into parts of the same size.

    Raises:
        ConfigError: they cannot be divided, or a batch is larger than a part.
    """
    settings, ipc = apm_of(context), context.config.ipc.images_per_class
    if ipc % settings.parts:
        divisors = [str(parts) for parts in range(1, ipc + 1) if ipc % parts == 0]
        raise ConfigError(
            f"method.apm.parts={settings.parts} must divide ipc.images_per_class={ipc}; choose {', '.join(divisors)}"
        )
    size = ipc // settings.parts
    count = size * len(context.data().classes)
    for name in ("batch_size", "chunk"):
        value = getattr(settings, name)
        if value is not None and value > count:
            raise ConfigError(
                f"method.apm.{name}={value} is more than the {count} images of a part; choose 1 to {count}, or null "
                "for all"
            )
    return [Part(index, index * size, (index + 1) * size) for index in range(settings.parts)]


def check_apm(context: Context) -> None:
    """Refuse, before any work, what the stages of prediction matching would refuse.

    Raises:
        ConfigError: parts or batches that do not fit the set, or batches of one image for BatchNorm layers.
    """
    settings, data = apm_of(context), context.data()
    part = plan_parts(context)[0]
    count = settings.batch_size or (part.stop - part.start) * len(data.classes)
    network = build_network(settings.teachers.backbone.model_copy(update={"pretrained": False}), len(data.classes), 0)
    require_batches(network, count, settings.surrogate.batch_size, "method.apm.surrogate.batch_size")


def make_apm_images(context: Context) -> Artifact:
    """Return images on which students and teachers disagreed, with one teacher's logits; a kind of ``images``.

    ``units/`` holds the images as pixels, slot by slot, like those of every method. Students are trained on
    ``distilled.safetensors`` instead, because the method's images leave the range of pixels. With
    ``method.iterations=0`` these are the initial images with logits of the same teacher: the fair baseline.

    Raises:
        ConfigError: see :func:`check_apm`; the data cannot be whitened; a teacher does not belong to the data.
    """
    check_apm(context)
    config, data, settings = context.config, context.data(), apm_of(context)
    method, ipc = config.method, config.ipc.images_per_class
    whitening = whitening_of(context)
    teachers = make_apm_teachers(context)
    patches = make_initial_patches(context) if method.init == "patches" else None
    parts = plan_parts(context) if method.iterations else []
    # Another process may make the other parts meanwhile; whoever comes second waits for them here.
    order = [*parts[settings.first_part :], *parts[: settings.first_part]]
    made = {part.index: _make_part(context, part, teachers, whitening, patches) for part in order}
    labeller = draw_teacher(len(teachers), generator(method.seed, "label teacher"))
    ignored = {"surrogate", "student", "teachers", "parts", "first_part", "chunk", "snapshots_at_once"}
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "ipc": ipc,
        "method": {
            "init": method.init,
            "iterations": method.iterations,
            "apm": settings.model_dump(mode="json", exclude=ignored) if method.iterations else None,
        },
        "seed": method.seed,
    }
    parents = [*(made[part.index] for part in parts), teachers[labeller]]
    parents += [artifact for artifact in (patches, whitening) if artifact is not None]

    def build(work: Path) -> dict[str, Any]:
        space = input_space(context, whitening)
        if parts:
            slots = torch.cat([load_file(made[part.index].path / IMAGES)["images"] for part in parts])
        else:
            slots = _initial(context, Part(0, 0, ipc), space, patches).cpu()
        histories = [_rows(made[part.index]) for part in parts for _ in range(part.start, part.stop)] or [[]] * ipc
        _save_units(work, slots.to(context.device), space, histories)
        classes = len(data.classes)
        images = slots.transpose(0, 1).reshape(classes * ipc, *slots.shape[2:]).contiguous()
        (teacher,) = load_teachers(context, [teachers[labeller]])
        logits = teacher_logits(teacher, images.to(context.device), LABEL_CHUNK).cpu()
        targets = torch.arange(classes).repeat_interleave(ipc)
        save_tensors(work / DISTILLED, {"images": images, "targets": targets, "logits": logits})
        right = (logits.argmax(dim=1) == targets).float().mean()
        return {"images": len(images), "parts": len(parts), "teacher_top1": 100 * float(right)}

    return context.store.make("images", f"{data.name}-{method.name}-ipc{ipc}", identity, parents, build)


def load_labelled(artifact: Artifact) -> LabelledImages:
    """Read the images as networks see them, with their classes and logits."""
    tensors = load_file(artifact.path / DISTILLED)
    return LabelledImages(tensors["images"], tensors["targets"], tensors["logits"])


def _make_part(
    context: Context, part: Part, teachers: Sequence[Artifact], whitening: Artifact | None, patches: Artifact | None
) -> Artifact:
    config, data, settings = context.config, context.data(), apm_of(context)
    method = config.method
    seed = derive_seed(method.seed, "apm", part.start)
    # How many parts there are, and who makes them, changes nothing in one of them.
    ignored = {"teachers", "student", "whitening", "whitening_eps", "augmentations", "parts", "first_part"}
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "slots": [part.start, part.stop],
        "init": method.init,
        "iterations": method.iterations,
        "apm": settings.model_dump(mode="json", exclude=ignored),
        "backbone": settings.teachers.backbone.model_dump(mode="json"),
        "augmentations": list(families_of(context)),
        "seed": method.seed,
    }
    parents = [*teachers, *(artifact for artifact in (whitening, patches) if artifact is not None)]
    shape = (part.stop - part.start, len(data.classes), 3, data.image_size, data.image_size)
    fresh = settings.teachers.backbone.model_copy(update={"pretrained": False})

    def build(work: Path) -> dict[str, Any]:
        space = input_space(context, whitening)
        with context.progress(f"distill part {part.index}", method.iterations) as advance:
            done = 0

            def on_row(row: AdversarialRow, current: Tensor) -> None:
                nonlocal done
                advance(row.iteration - done)
                done = row.iteration
                _log_row(context, part, row, current, space)

            module = AdversarialModule(
                _initial(context, part, space, patches).flatten(0, 1),
                torch.arange(shape[1]).repeat(shape[0]),
                load_teachers(context, teachers),
                lambda student: build_network(fresh, len(data.classes), student),
                dsa(families_of(context)),
                settings,
                Pace(method.iterations, method.log_every, method.checkpoint_every),
                seed,
                on_row,
            )
            context.fit(module, None, module.epochs, work / "images.ckpt.tmp")
        images = module.images.detach().cpu().view(shape).contiguous()
        save_tensors(work / IMAGES, {"images": images})
        write_atomically(work / ROWS, json.dumps([asdict(row) for row in module.rows]).encode())
        return {"images": images.shape[0] * images.shape[1], "discrepancy": module.rows[-1].discrepancy}

    name = f"{data.name}-{method.name}-slots{part.start}to{part.stop}"
    return context.store.make("image_parts", name, identity, parents, build)


def _initial(context: Context, part: Part, space: InputSpace, patches: Artifact | None) -> Tensor:
    """Initial images [slots, classes, 3, size, size] as networks see them, on the device."""
    config, data = context.config, context.data()
    classes, size = len(data.classes), data.image_size
    if config.method.init == "noise":
        return torch.stack(
            [
                torch.randn((classes, 3, size, size), generator=generator(config.method.seed, "noise", slot))
                for slot in range(part.start, part.stop)
            ]
        ).to(context.device)
    pixels = initial_images(context, patches)[:, part.start : part.stop].transpose(0, 1)
    return space.encode(pixels.flatten(0, 1).to(context.device)).view(pixels.shape)


def _rows(artifact: Artifact) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((artifact.path / ROWS).read_text())
    return rows


def _save_units(work: Path, slots: Tensor, space: InputSpace, histories: Sequence[Sequence[dict[str, Any]]]) -> None:
    folder = work / UNITS
    folder.mkdir(exist_ok=True)
    for slot, (images, rows) in enumerate(zip(slots, histories, strict=True)):
        # Nobody votes, so there are no weights.
        write_unit(folder, Unit(slot, 0, 0, len(images)), space.decode(images).cpu(), rows, {})


def _log_row(context: Context, part: Part, row: AdversarialRow, images: Tensor, space: InputSpace) -> None:
    method = context.config.method
    values = {f"distill/{key}": float(value) for key, value in asdict(row).items() if key != "iteration"}
    step = part.index * method.iterations + row.iteration
    context.log(values | {"distill/part": float(part.index)}, step)
    if row.iteration % method.grid_every == 0 or row.iteration == method.iterations:
        log.info(
            "part %d, iteration %d: loss %.4g; disagreement %.3g, cross-entropy %.3g of teacher %d",
            part.index,
            row.iteration,
            row.loss,
            row.discrepancy,
            row.ce,
            row.teacher,
        )
        grid = image_grid(space.decode(images[: len(context.data().classes)]))
        context.log_images("distill/images", grid, step)
        context.save_picture(f"part{part.index:05d}", grid)
