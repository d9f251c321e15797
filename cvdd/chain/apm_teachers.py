"""The teachers of prediction matching: a pool of networks of one architecture, trained on the real data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from cvdd.artifact import Artifact
from cvdd.backbones import build_network
from cvdd.chain.context import Context
from cvdd.chain.space import families_of, input_space, measured_in, training_pixels, whitening_of
from cvdd.chain.training import CURVE, WEIGHTS, count_parameters, log_epochs, save_curve, save_weights, ten_times
from cvdd.data import check_same_classes
from cvdd.schema.apm import ApmConfig
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import derive_seed
from cvdd.training.classifier import Positions, ShuffledBatches, smallest_batch
from cvdd.training.real_images import RealImages
from cvdd.training.sgd_training import SgdModule, dsa

KIND = "teachers"


def apm_of(context: Context) -> ApmConfig:
    """Return the settings of prediction matching, which the caller knows to be there."""
    settings = context.config.method.apm
    assert settings is not None
    return settings


def make_apm_teachers(context: Context, order: Sequence[int] | None = None) -> list[Artifact]:
    """Return the pool of teachers (specification of APM, section 3, stage A): made elsewhere, or trained.

    What counts is the last state of each; the release kept the best one on test images.

    Args:
        context: the configuration and its surroundings.
        order: in which they are trained; None is from the first to the last.

    Raises:
        ConfigError: a teacher in ``method.apm.teachers.paths`` does not belong to this configuration.
    """
    teachers = apm_of(context).teachers
    whitening = whitening_of(context)
    if teachers.paths:
        return [_made_elsewhere(context, path, whitening) for path in teachers.paths]
    trained = {index: _trained(context, index, whitening) for index in order or range(teachers.count)}
    return [trained[index] for index in range(teachers.count)]


def load_teachers(context: Context, artifacts: Sequence[Artifact]) -> list[nn.Module]:
    """Rebuild teachers on the device, frozen and in evaluation mode."""
    data = context.data()
    backbone = apm_of(context).teachers.backbone.model_copy(update={"pretrained": False})
    networks = []
    for artifact in artifacts:
        network = build_network(backbone, len(data.classes), 0)
        network.load_state_dict(load_file(artifact.path / WEIGHTS))
        networks.append(network.to(context.device).eval().requires_grad_(False))
    return networks


def _belonging(context: Context, whitening: Artifact | None) -> dict[str, Any]:
    """What a teacher and the images that it judges must have in common."""
    data = context.data()
    return {
        "data": data.identity,
        "classes": list(data.classes),
        "backbone": apm_of(context).teachers.backbone.model_dump(mode="json"),
        # Without it teachers of one space judge images of another, as in the release without whitening.
        "space": {"mean": list(data.mean), "std": list(data.std)} if whitening is None else whitening.digest,
    }


def _trained(context: Context, index: int, whitening: Artifact | None) -> Artifact:
    data, teachers = context.data(), apm_of(context).teachers
    seed = derive_seed(context.config.seed, "teacher", index)
    identity = {
        **_belonging(context, whitening),
        "training": teachers.model_dump(mode="json", exclude={"count", "paths", "backbone"}),
        "augmentations": list(families_of(context)),
        "seed": seed,
    }

    def build(work: Path) -> dict[str, Any]:
        network = build_network(teachers.backbone, len(data.classes), seed)
        # Teachers belong to no row of a comparison, whichever asked for them first.
        return _train(replace(context, label=""), index, network, seed, whitening, work)

    name = f"{data.name}-{teachers.backbone.name}-{index}"
    return context.store.make(KIND, name, identity, [] if whitening is None else [whitening], build)


def _train(
    context: Context, index: int, network: nn.Module, seed: int, whitening: Artifact | None, work: Path
) -> dict[str, Any]:
    config, data, teachers = context.config, context.data(), apm_of(context).teachers
    space = input_space(context, whitening)
    measure = measured_in(context, space)
    in_memory = data.train.in_memory
    least = smallest_batch(network)
    loader: DataLoader[Any] = DataLoader(
        Positions() if in_memory else RealImages(data, data.image_size),
        sampler=ShuffledBatches(len(data.train), teachers.batch_size, seed, least, "method.apm.teachers.batch_size"),
        batch_size=None,
        num_workers=0 if in_memory else config.trainer.workers,
    )
    with context.progress(f"teacher {index}", teachers.epochs) as advance:
        module = SgdModule(
            teachers,
            training_pixels(context) if in_memory else None,
            data.train.labels,
            space.encode,
            nn.functional.cross_entropy,
            dsa(families_of(context)),
            network=network,
            name=f"teacher {index}",
            seed=seed,
            measure=measure,
            measured_at=ten_times(teachers.epochs),
            on_epoch=log_epochs(context, f"train/teacher{index}", advance),
            rate="method.apm.teachers.lr",
        )
        context.fit(module, loader, teachers.epochs, work / "training.ckpt.tmp")
    save_curve(work / CURVE, module.curve)
    network.to(context.device).eval()
    save_weights(work, network)
    last = module.curve[-1]
    return {
        **{f"test_{key}": last[key] for key in ("top1", "top5", "loss")},
        "parameters": count_parameters(network),
    }


def _made_elsewhere(context: Context, path: Path, whitening: Artifact | None) -> Artifact:
    artifact = context.open_elsewhere(path, KIND, "method.apm.teachers.paths")
    found = artifact.manifest["identity"]
    check_same_classes(list(context.data().classes), found["classes"], f"teacher {path}")
    asked = json.loads(json.dumps(_belonging(context, whitening)))
    advice = {
        "data": "choose the dataset that it was trained on",
        "backbone": "teachers and surrogates share one architecture: set method.apm.teachers.backbone to the teacher's",
        "space": "set method.apm.whitening and method.apm.whitening_eps as they were for the teacher",
    }
    for key, what in advice.items():
        if found[key] != asked[key]:
            raise ConfigError(
                f"method.apm.teachers.paths: the {key} of {path} is {found[key]}, and this configuration's is "
                f"{asked[key]}; {what}, or set method.apm.teachers.paths=[] to train teachers"
            )
    return artifact


def draw_teacher(count: int, source: torch.Generator) -> int:
    """Draw one of the pool."""
    return int(torch.randint(count, (), generator=source))
