"""Stage ``evaluate``: students trained on a distilled set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.backbones import BackboneConfig, build_network
from cvdd.chain.context import Context
from cvdd.chain.labels import Labels
from cvdd.chain.training import count_parameters, evaluator_of, every, log_epochs, save_student
from cvdd.chain.unit_files import load_images
from cvdd.computing.compiler import compiling
from cvdd.computing.passes import passes_of_students
from cvdd.labels.batches import SoftLabelDataset
from cvdd.labels.phases import HardBetweenSoft
from cvdd.labels.sources import SoftLabels
from cvdd.schema import ProtocolConfig
from cvdd.support.memory import enough_memory
from cvdd.support.seeds import derive_seed
from cvdd.training.recorded_student import make_student_module
from cvdd.training.student import StudentModule

ADDED = (
    "part_weights",
    "hard_share",
    "repeat_labels",
    "label_smoothing",
    "temperature_factor",
    "temperature_epochs",
    "temperature_least",
    "student_temperature",
)
"""Fields that came after the first students were made; a student that does not use them is what it was."""


def _ignored(protocol: ProtocolConfig) -> set[str]:
    return {"name", "seeds", "images", "full_data", "eval_batch", *filter(protocol.at_default, ADDED)}


def labels_of(labels: Labels, protocol: ProtocolConfig, pixels: Tensor, seed: int) -> SoftLabels:
    """Return what each epoch of a student teaches.

    Args:
        labels: of the images that it is trained on.
        protocol: of the student.
        pixels: [n, 3, size, size] uint8, these images.
        seed: of the student, from which views and mixes of its hard epochs are drawn.
    """
    soft = labels.open(pixels, protocol.repeat_labels)
    if not protocol.hard_epochs:
        return soft
    hard = labels.hard(len(pixels), derive_seed(seed, "hard epochs"))
    return HardBetweenSoft(soft, hard, protocol.epochs, protocol.hard_epochs)


def make_student(
    context: Context,
    labels: Labels,
    name: str,
    backbone: BackboneConfig,
    seed: int,
    part: Literal["test", "train"] = "test",
) -> Artifact:
    """Return one student: its curve and its final and best accuracy.

    Args:
        context: the configuration and its surroundings.
        labels: of the images that it is trained on.
        name: of the student.
        backbone: its network.
        seed: of its initialisation.
        part: images on which it is measured; ``train`` means the real training images, which it has not seen.
    """
    config, data = context.config, context.data()
    protocol = config.protocol
    identity = {
        "data": data.identity,
        "labels": labels.identity,
        "protocol": protocol.model_dump(mode="json", exclude=_ignored(protocol)),
        "backbone": backbone.model_dump(mode="json"),
        "seed": seed,
        "measured_on": part,
    }

    passes = passes_of_students(config.engine, context.device)
    identity |= passes.identity

    def train(work: Path) -> StudentModule:
        evaluator = evaluator_of(context, part)
        pixels, classes = load_images(labels.images)
        dataset = SoftLabelDataset(labels_of(labels, protocol, pixels, seed), context.device)
        title = f"student {name} seed {seed}"
        with context.progress(title, protocol.epochs) as advance:
            module, loader = make_student_module(
                protocol,
                dataset,
                pixels,
                classes,
                data.mean,
                data.std,
                passes,
                build_network(backbone, len(data.classes), derive_seed(seed, "student")),
                looks=config.label.randaugment,
                shared=context.world.shares(protocol.accumulation),
                name=title,
                seed=derive_seed(seed, "student"),
                measure=evaluator,
                measured_at=every(protocol.eval_every, protocol.epochs),
                on_epoch=log_epochs(context, f"evaluate/{name}/seed{seed}", advance),
            )
            advice = (
                f"Raise protocol.accumulation={protocol.accumulation}, which forwards a batch in parts, or lower "
                f"label.batch_size={config.label.batch_size}; where it is measured, lower "
                f"protocol.eval_batch={protocol.eval_batch}"
            )
            with enough_memory(title, advice), compiling(passes.compile):
                context.fit(module, loader, protocol.epochs, work / "training.ckpt.tmp", protocol.accumulation)
        return module

    def build(work: Path) -> dict[str, Any]:
        module = train(work)
        return {**save_student(work, module.curve), "parameters": count_parameters(module.network)}

    title = f"{labels.images.name}-{name}-seed{seed}"
    return context.make_network("students", title, identity, labels.parents, build, train, protocol.accumulation)
