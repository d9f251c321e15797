"""Stage ``evaluate``: students trained on a distilled set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from cvdd.artifact import Artifact, write_atomically
from cvdd.backbones import BackboneConfig, build_network
from cvdd.chain.images import load_images
from cvdd.chain.labels import Labels
from cvdd.context import Context
from cvdd.label_batches import EpochSampler, SoftLabelDataset
from cvdd.measure import Evaluator
from cvdd.memory import enough_memory
from cvdd.report.curves import curve_json
from cvdd.seeds import derive_seed
from cvdd.student import StudentModule

CURVE = "curve.json"


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
        "protocol": protocol.model_dump(mode="json", exclude={"name", "seeds", "images", "full_data", "eval_batch"}),
        "backbone": backbone.model_dump(mode="json"),
        "seed": seed,
        "measured_on": part,
    }

    def train(work: Path) -> StudentModule:
        evaluator = Evaluator(
            data,
            protocol.eval_batch,
            context.device,
            test_resize=config.dataset.test_resize if part == "test" or not data.train.in_memory else None,
            part=part,
            workers=config.trainer.workers,
        )
        pixels, classes = load_images(labels.images)
        dataset = SoftLabelDataset(labels.open(pixels))
        sampler = EpochSampler(len(dataset.bounds))
        title = f"student {name} seed {seed}"
        with context.progress(title, protocol.epochs) as advance:

            def on_epoch(epoch: int, row: dict[str, float]) -> None:
                advance(1)
                context.log({f"evaluate/{name}/seed{seed}/{key}": value for key, value in row.items()}, step=epoch + 1)

            module = StudentModule(
                protocol,
                pixels,
                classes,
                dataset.labels.batch_size,
                data.mean,
                data.std,
                network=build_network(backbone, len(data.classes), derive_seed(seed, "student")),
                name=title,
                seed=derive_seed(seed, "student"),
                measure=evaluator,
                measured_at=lambda epoch: (epoch + 1) % protocol.eval_every == 0 or epoch + 1 == protocol.epochs,
                on_epoch=on_epoch,
            )
            loader: DataLoader[Any] = DataLoader(dataset, sampler=sampler, batch_size=None)
            advice = (
                f"Raise protocol.accumulation={protocol.accumulation}, which forwards a batch in parts, or lower "
                f"label.batch_size={config.label.batch_size}; where it is measured, lower "
                f"protocol.eval_batch={protocol.eval_batch}"
            )
            with enough_memory(title, advice):
                context.fit(module, loader, protocol.epochs, work / "training.ckpt.tmp", protocol.accumulation)
        return module

    def build(work: Path) -> dict[str, Any]:
        module = train(work)
        write_atomically(work / CURVE, curve_json(module.curve))
        measured = [row for row in module.curve if "top1" in row]
        last, best = measured[-1], max(measured, key=lambda row: row["top1"])
        return {
            "top1": last["top1"],
            "top5": last["top5"],
            "loss": last["loss"],
            "best_top1": best["top1"],
            "best_epoch": best["epoch"],
        }

    title = f"{labels.images.name}-{name}-seed{seed}"
    return context.make_network("students", title, identity, labels.parents, build, train, protocol.accumulation)


def load_curve(artifact: Artifact) -> list[dict[str, float]]:
    """Read the curve of a student or a member: one row per epoch."""
    curve: list[dict[str, float]] = json.loads((artifact.path / CURVE).read_text())
    return curve
