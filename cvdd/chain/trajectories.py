"""Stage before trajectory matching: its experts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cvdd.artifact import Artifact
from cvdd.backbones import build_network
from cvdd.chain.context import Context
from cvdd.chain.space import families_of, input_space, measured_in, training_pixels, whitening_of
from cvdd.chain.training import every, log_epochs, save_curve
from cvdd.methods.mtt import FlatNetwork, class_cross_entropy
from cvdd.schema.mtt import MttConfig
from cvdd.support.config_base import ConfigError
from cvdd.support.progress import Advance
from cvdd.support.seeds import derive_seed
from cvdd.synthesis.trajectories import Trajectories, TrajectoryLayout, TrajectoryWriter
from cvdd.synthesis.zca import InputSpace
from cvdd.training.classifier import Measure, Positions, ShuffledBatches, smallest_batch
from cvdd.training.real_images import RealImages
from cvdd.training.sgd_training import SgdModule, SgdRecipe, dsa

log = logging.getLogger(__name__)

CURVES = "curves"


def mtt_of(context: Context) -> MttConfig:
    """Return the settings of trajectory matching, which the caller knows to be there."""
    settings = context.config.method.mtt
    assert settings is not None
    return settings


def flat_network(context: Context) -> FlatNetwork:
    """Return the experts' network as a function of its parameters."""
    backbone = mtt_of(context).experts.backbone
    bare = backbone.model_copy(update={"pretrained": False})
    return FlatNetwork(build_network(bare, len(context.data().classes), 0))


def make_trajectories(context: Context) -> Artifact:
    """Return the parameters of all experts, after their initialisation and after each epoch.

    Every expert is trained by plain SGD on augmented real images (specification of MTT, section 2.4). A finished expert
    is kept by itself, and one that was interrupted goes on after its last checkpoint.

    Raises:
        ConfigError: the network is no mere function of its parameters, the images cannot be whitened, or the
            trajectories in ``method.mtt.experts.path`` were made with other settings or for other data.
    """
    config, data, settings = context.config, context.data(), mtt_of(context)
    experts = settings.experts
    network = flat_network(context)
    whitening = whitening_of(context)
    seed = derive_seed(config.seed, "experts")
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "experts": experts.model_dump(mode="json", exclude={"path"}),
        "augmentations": list(families_of(context)),
        "seed": seed,
    }
    parents = [] if whitening is None else [whitening]
    if experts.path is not None:
        return _made_elsewhere(context, experts.path, identity, parents)
    layout = TrajectoryLayout(experts.count, experts.epochs + 1, network.size, experts.dtype)

    def build(work: Path) -> dict[str, Any]:
        log.info("trajectories: %.1f MB", layout.bytes / 1e6)
        layout.save(work)
        (work / CURVES).mkdir(exist_ok=True)
        space = input_space(context, whitening)
        images = _encoded(context, space) if data.train.in_memory else None
        measure = measured_in(context, space)
        with context.progress("experts", experts.count * experts.epochs) as advance:
            for expert in range(experts.count):
                if layout.file(work, expert).exists():
                    advance(experts.epochs)
                    continue
                _train_expert(context, expert, derive_seed(seed, expert), work, layout, images, space, measure, advance)
        curves = [json.loads((work / CURVES / f"expert{k:05d}.json").read_text()) for k in range(experts.count)]
        last = [curve[-1] for curve in curves]
        return {
            "bytes": layout.bytes,
            "test_top1": sum(row["top1"] for row in last) / len(last),
            "train_loss": sum(row["train_loss"] for row in last) / len(last),
        }

    name = f"{data.name}-{experts.backbone.name}-{experts.count}x{experts.epochs}"
    return context.store.make("trajectories", name, identity, parents, build)


def open_trajectories(context: Context, artifact: Artifact) -> Trajectories:
    """Open trajectories for the network and the classes of a configuration.

    Raises:
        ConfigError: they are incomplete, or of a network of another size.
    """
    trajectories = Trajectories(artifact.path)
    size = flat_network(context).size
    if trajectories.layout.parameters != size:
        raise ConfigError(
            f"{artifact.path} holds networks of {trajectories.layout.parameters} parameters, and "
            f"method.mtt.experts.backbone has {size}; train experts of this network"
        )
    return trajectories


def _made_elsewhere(context: Context, path: Path, identity: Mapping[str, Any], parents: list[Artifact]) -> Artifact:
    artifact = context.open_elsewhere(path, "trajectories", "method.mtt.experts.path")
    asked = json.loads(json.dumps(dict(identity)))
    for key, found in _differences(asked, artifact.manifest["identity"]):
        raise ConfigError(
            f"method.mtt.experts.path={path} does not belong to this configuration: its {key} is {found[1]}, and "
            f"{found[0]} is asked for. Choose the data set and the settings that it was made with, or other "
            "trajectories, or null to make them"
        )
    if [parent["digest"] for parent in artifact.manifest["parents"]] != [parent.digest for parent in parents]:
        raise ConfigError(
            f"method.mtt.experts.path={path} was made with another whitening; choose method.mtt.whitening and "
            "method.mtt.whitening_eps as they were there"
        )
    return artifact


def _differences(asked: Any, found: Any, key: str = "") -> list[tuple[str, tuple[Any, Any]]]:
    if isinstance(asked, dict) and isinstance(found, dict):
        names = [*asked, *(name for name in found if name not in asked)]
        return [
            difference
            for name in names
            for difference in _differences(asked.get(name), found.get(name), f"{key}.{name}" if key else str(name))
        ]
    return [] if asked == found else [(key, (asked, found))]


def _encoded(context: Context, space: InputSpace) -> Tensor:
    """All training images as networks see them: [n, 3, size, size] float32 on the device."""
    chunks = training_pixels(context).split(1024)
    return torch.cat([space.encode(chunk.to(context.device)) for chunk in chunks])


def _train_expert(
    context: Context,
    expert: int,
    seed: int,
    work: Path,
    layout: TrajectoryLayout,
    images: Tensor | None,
    space: InputSpace,
    measure: Measure,
    advance: Advance,
) -> None:
    # Experts belong to no row of a comparison, whichever asked for them first.
    context = replace(context, label="")
    config, data, experts = context.config, context.data(), mtt_of(context).experts
    network = build_network(experts.backbone, len(data.classes), seed)
    flat = FlatNetwork(network)
    writer = TrajectoryWriter(work, layout, expert)
    writer.write(0, flat.vector())

    logged = log_epochs(context, f"experts/{expert}", advance)

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        logged(epoch, row)
        writer.write(epoch + 1, flat.vector())

    sgd = SgdRecipe(experts.epochs, experts.lr, experts.momentum, experts.weight_decay, experts.drop)
    module = SgdModule(
        sgd,
        images,
        data.train.labels,
        # All experts share the images in memory, which are encoded once.
        space.encode if images is None else nn.Identity(),
        class_cross_entropy,
        dsa(families_of(context)),
        "dsa",
        forgets_at=sgd.drop_epoch,
        network=network,
        name=f"expert {expert}",
        seed=seed,
        measure=measure,
        measured_at=every(experts.epochs, experts.epochs),
        on_epoch=on_epoch,
        rate="method.mtt.experts.lr",
    )
    least = smallest_batch(network)
    loader: DataLoader[Any] = DataLoader(
        Positions() if images is not None else RealImages(data, data.image_size),
        sampler=ShuffledBatches(len(data.train), experts.batch_size, seed, least, "method.mtt.experts.batch_size"),
        batch_size=None,
        num_workers=0 if images is not None else config.trainer.workers,
    )
    checkpoint = work / f"expert{expert:05d}.ckpt.tmp"
    context.fit(module, loader, experts.epochs, checkpoint)
    save_curve(work / CURVES / f"expert{expert:05d}.json", module.curve)
    writer.finish()
    checkpoint.unlink(missing_ok=True)
