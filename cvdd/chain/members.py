"""Stage ``train``: committee members, and any network trained on the real data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from cvdd.artifact import Artifact, file_checksum
from cvdd.backbones import (
    BackboneConfig,
    batchnorm_layers,
    build_network,
    load_published,
    weights_chosen_by_timm,
)
from cvdd.chain.context import Context
from cvdd.chain.encoders import is_ready, make_encoder, with_encoder
from cvdd.chain.training import (
    CURVE,
    WEIGHTS,
    count_parameters,
    evaluator_of,
    log_epochs,
    save_curve,
    save_weights,
    ten_times,
)
from cvdd.computing.compiler import compiling
from cvdd.computing.passes import passes_of_members
from cvdd.data import check_same_classes
from cvdd.schema import RecipeConfig
from cvdd.support.batch_parts import part_size
from cvdd.support.config_base import ConfigError
from cvdd.support.memory import enough_memory
from cvdd.support.seeds import derive_seed
from cvdd.training.classifier import Positions, ShuffledBatches
from cvdd.training.measure import Evaluator
from cvdd.training.member import MemberModule, own_images
from cvdd.training.real_images import RealImages, side_of_files

log = logging.getLogger(__name__)

MEASURED_AT_ONCE = 256
"""Training images in a forward pass that measures a member on them."""


def make_member(context: Context, name: str) -> Artifact:
    """Return a member: imported if it has a checkpoint, trained with the recipe otherwise."""
    config = context.config
    member = config.committee.members[name]
    if member.checkpoint is not None:
        return _imported(context, name, member.backbone, member.checkpoint)
    return make_classifier(context, name, member.backbone, derive_seed(config.seed, "member", name))


def make_classifier(context: Context, name: str, backbone: BackboneConfig, seed: int) -> Artifact:
    """Return a network trained on the real data with ``recipe``.

    The artefact holds the weights, the curve, and top-1, top-5 and loss on test and train images. With ``recipe.moco``
    all but the last layer is an artefact of its own, trained without labels (:mod:`cvdd.chain.encoders`).
    """
    data, recipe = context.data(), context.config.recipe
    ready = is_ready(backbone, len(data.classes))
    encoder = make_encoder(context, name, backbone, seed) if recipe.moco is not None and not ready else None
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "backbone": backbone.model_dump(mode="json"),
        "recipe": None if ready else recipe.model_dump(mode="json", exclude=_told_otherwise(recipe)),
        "seed": seed,
        **({} if ready else passes_of_members(context.config.engine, context.device).identity),
    }

    if weights := weights_chosen_by_timm(backbone):
        identity["weights"] = weights

    def train(work: Path) -> MemberModule:
        network = build_network(backbone, len(data.classes), seed)
        if encoder is not None:
            with_encoder(network, encoder, derive_seed(seed, "probe"))
        return _train(context, name, network, seed, work)

    def build(work: Path) -> dict[str, Any]:
        if ready:
            return _finish(context, build_network(backbone, len(data.classes), seed), [], work)
        module = train(work)
        return _finish(context, module.network, module.curve, work)

    parts = 1 if ready else recipe.accumulation
    parents = [] if encoder is None else [encoder]
    return context.make_network("members", f"{data.name}-{name}", identity, parents, build, train, parts)


def _told_otherwise(recipe: RecipeConfig) -> set[str]:
    """Fields that identities leave out: a parent tells of them, or earlier versions had just their default."""
    return {"moco", *({"accumulation"} if recipe.accumulation == 1 else ())}


def _imported(context: Context, name: str, backbone: BackboneConfig, checkpoint: Path) -> Artifact:
    data = context.data()
    if not checkpoint.is_file():
        raise ConfigError(f"committee.members.{name}.checkpoint={checkpoint}: there is no such file")
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "backbone": backbone.model_dump(mode="json"),
        "checkpoint": context.once(("checkpoint", checkpoint), lambda: file_checksum(checkpoint)),
    }

    def build(work: Path) -> dict[str, Any]:
        network = build_network(backbone, len(data.classes), 0)
        load_published(checkpoint, network)
        metrics = _finish(context, network, [], work)
        _warn_of_chance(f"committee.members.{name}.checkpoint={checkpoint}", metrics["test_top1"], len(data.classes))
        return metrics

    return context.store.make("members", f"{data.name}-{name}", identity, [], build)


def _warn_of_chance(where: str, top1: float, classes: int) -> None:
    # A file of weights carries no class list, so another order shows in nothing else.
    chance = 100 / classes
    if top1 < chance + 0.1 * (100 - chance):
        log.warning(
            "%s: %.1f %% of the test images, where chance is %.1f %%. Were its classes in another order than those of "
            "dataset.classes, or its images normalised otherwise?",
            where,
            top1,
            chance,
        )


def load_network(context: Context, artifact: Artifact, backbone: BackboneConfig) -> nn.Module:
    """Rebuild the network of a member artefact, in evaluation mode on the CPU.

    Raises:
        ConfigError: its classes are not those of the data set, in order, or its weights fit another network.
    """
    data = context.data()
    check_same_classes(list(data.classes), artifact.manifest["identity"]["classes"], f"member {artifact.name}")
    bare = backbone.model_copy(update={"pretrained": False})
    network = build_network(bare, len(data.classes), 0)
    try:
        network.load_state_dict(load_file(artifact.path / WEIGHTS))
    except RuntimeError as error:
        raise ConfigError(
            f"{artifact.path} was trained when the code of {backbone.name} built another network. Give the backbone "
            "another name, or delete this directory to train the member again"
        ) from error
    return network.eval().requires_grad_(False)


def _train(context: Context, name: str, network: nn.Module, seed: int, work: Path) -> MemberModule:
    # A network belongs to no row of a comparison, whichever asked for it first.
    context = replace(context, label="")
    config, data = context.config, context.data()
    recipe = config.recipe
    evaluator = evaluator_of(context)
    in_memory = data.train.in_memory
    # Two also without BatchNorm, as it always was: a member's identity does not say otherwise.
    sampler = ShuffledBatches(len(data.train), recipe.batch_size, seed)
    rank, ranks = (context.world.rank, context.world.size) if context.world.shares(recipe.accumulation) else (0, 1)
    own = partial(own_images, part=part_size(recipe.batch_size, recipe.accumulation), rank=rank, ranks=ranks)
    side = side_of_files(data.image_size, resized=recipe.crop == "resized")
    loader: DataLoader[Any] = DataLoader(
        Positions() if in_memory else RealImages(data, side, own),
        sampler=sampler,
        batch_size=None,
        num_workers=0 if in_memory else config.trainer.workers,
    )
    passes = passes_of_members(config.engine, context.device)
    with context.progress(f"train {name}", recipe.epochs) as advance:
        module = MemberModule(
            recipe,
            data.train.stacked() if in_memory else None,
            data.train.labels,
            data.mean,
            data.std,
            data.image_size,
            passes,
            network=network,
            name=f"member {name}",
            seed=seed,
            measure=evaluator,
            measured_at=ten_times(recipe.epochs),
            on_epoch=log_epochs(context, f"train/{name}", advance),
        )
        advice = (
            f"Raise recipe.accumulation={recipe.accumulation}, which forwards a batch in parts, or lower "
            f"recipe.batch_size={recipe.batch_size}; where it is measured, lower "
            f"protocol.eval_batch={config.protocol.eval_batch}"
        )
        with enough_memory(f"training {name}", advice), compiling(passes.compile):
            context.fit(module, loader, recipe.epochs, work / "training.ckpt.tmp", recipe.accumulation)
    return module


def _finish(context: Context, network: nn.Module, curve: Sequence[dict[str, float]], work: Path) -> dict[str, Any]:
    save_curve(work / CURVE, curve)
    network.to(context.device).eval()
    test = evaluator_of(context)(network)
    data = context.data()
    metrics: dict[str, Any] = {f"test_{key}": value for key, value in test.as_dict().items()}
    if data.train.in_memory:
        on_train = Evaluator(data, MEASURED_AT_ONCE, context.device, part="train", test_resize=None)(network)
        metrics |= {f"train_{key}": value for key, value in on_train.as_dict().items()}
    metrics["parameters"] = count_parameters(network)
    metrics["batchnorm_layers"] = len(batchnorm_layers(network))
    save_weights(work, network)
    return metrics
