"""Stage before members that are trained without labels, but for their last layer (specification of SC-DD)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from cvdd.artifact import Artifact
from cvdd.backbones import BackboneConfig, build_network
from cvdd.backbones.heads import IMAGENET_CLASSES, require_head
from cvdd.chain.context import Context
from cvdd.chain.training import CURVE, WEIGHTS, log_epochs, save_curve, save_weights
from cvdd.computing.compiler import compiling
from cvdd.computing.passes import passes_of_members
from cvdd.schema.committee import MemberConfig
from cvdd.schema.moco import MocoConfig
from cvdd.support.config_base import ConfigError
from cvdd.support.memory import enough_memory
from cvdd.support.seeds import derive_seed, generator
from cvdd.training.classifier import Positions, ShuffledBatches
from cvdd.training.measure import Accuracy
from cvdd.training.moco import MocoModule, only_probed, with_projection
from cvdd.training.real_images import RealImages, side_of_files

PROBE_STD = 0.01
"""Standard deviation of a probe's initial weights, as MoCo has it."""


def moco_of(context: Context) -> MocoConfig:
    """Return the settings of a training without labels, which the caller knows to be there."""
    settings = context.config.recipe.moco
    assert settings is not None
    return settings


def require_encoders(context: Context, networks: Mapping[str, nn.Module]) -> None:
    """Refuse members that cannot be trained without labels.

    Args:
        context: the configuration and its surroundings; ``recipe.moco`` is not null.
        networks: of members, by name; those whose weights are given are left out.

    Raises:
        ConfigError: there are fewer images than a batch has, a network ends in no linear layer, or its weights were
            trained with labels already.
    """
    moco, count = moco_of(context), len(context.data().train)
    members = {name: context.config.committee.members[name] for name in networks}
    trained = {name: member for name, member in members.items() if not _is_given(context, member)}
    if trained and count < moco.batch_size:
        raise ConfigError(
            f"recipe.moco.batch_size={moco.batch_size} is more than the {count} training images; set it to as many or "
            "fewer"
        )
    for name, member in trained.items():
        if member.backbone.pretrained:
            raise ConfigError(
                f"committee.members.{name}.backbone.pretrained=true begins with weights that were trained with labels, "
                "and recipe.moco trains without them; set it to false, or choose another recipe"
            )
        try:
            require_head(networks[name], "recipe.moco")
        except ConfigError as error:
            raise ConfigError(f"committee.members.{name}: {error}") from error


def _is_given(context: Context, member: MemberConfig) -> bool:
    return member.checkpoint is not None or is_ready(member.backbone, len(context.data().classes))


def is_ready(backbone: BackboneConfig, classes: int) -> bool:
    """Whether a network needs no training: build_network keeps ImageNet's own head, and any other must be trained."""
    return backbone.pretrained and classes == IMAGENET_CLASSES


def make_encoder(context: Context, name: str, backbone: BackboneConfig, seed: int) -> Artifact:
    """Return a network trained on the real images without their labels.

    The artefact holds the weights of all but the last linear layer, and the curve.

    Args:
        context: the configuration and its surroundings; ``recipe.moco`` is not null.
        name: of the member.
        backbone: of it.
        seed: of everything random.
    """
    data, config = context.data(), context.config
    moco = moco_of(context)
    identity = {
        "data": data.identity,
        "backbone": backbone.model_dump(mode="json"),
        "moco": moco.model_dump(mode="json"),
        "flip": config.recipe.flip,
        "seed": seed,
        **passes_of_members(config.engine, context.device).identity,
    }

    def train(work: Path) -> tuple[MocoModule, str]:
        return _train(context, name, backbone, seed, work)

    def build(work: Path) -> dict[str, Any]:
        module, head = train(work)
        save_curve(work / CURVE, module.curve)
        module.network.set_submodule(head, nn.Identity())
        save_weights(work, module.network)
        return {"train_loss": module.curve[-1]["train_loss"]}

    return context.make_network("encoders", f"{data.name}-{name}", identity, [], build, train, moco.groups)


def with_encoder(network: nn.Module, encoder: Artifact, seed: int) -> nn.Module:
    """Give a network the weights of an encoder, in place, and leave only a new last layer to be trained.

    Args:
        network: as it was built, for its classes.
        encoder: of the same backbone.
        seed: of the last layer's weights.
    """
    name, head = require_head(network, "recipe.moco")
    own = {key: value for key, value in network.state_dict().items() if key.startswith(f"{name}.")}
    network.load_state_dict({**load_file(encoder.path / WEIGHTS), **own})
    only_probed(network)
    nn.init.normal_(head.weight, 0.0, PROBE_STD, generator=generator(seed))
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return network


def _train(context: Context, name: str, backbone: BackboneConfig, seed: int, work: Path) -> tuple[MocoModule, str]:
    # An encoder belongs to no row of a comparison, whichever asked for it first.
    context = replace(context, label="")
    config, data, moco = context.config, context.data(), moco_of(context)
    network = build_network(backbone, moco.dimension, seed)
    head = with_projection(network, derive_seed(seed, "projection"))
    in_memory = data.train.in_memory
    passes = passes_of_members(config.engine, context.device)
    # Ranks that share a batch see different keys of it, so each has all of its images.
    loader: DataLoader[Any] = DataLoader(
        Positions() if in_memory else RealImages(data, side_of_files(data.image_size, resized=True)),
        sampler=ShuffledBatches(len(data.train), moco.batch_size, seed, moco.batch_size, "recipe.moco.batch_size"),
        batch_size=None,
        num_workers=0 if in_memory else config.trainer.workers,
    )
    with context.progress(f"train {name} without labels", moco.epochs) as advance:
        module = MocoModule(
            moco,
            config.recipe.flip,
            data.train.stacked() if in_memory else None,
            data.mean,
            data.std,
            data.image_size,
            passes,
            network=network,
            name=f"member {name} without labels",
            seed=seed,
            measure=_nothing,
            measured_at=lambda epoch: False,
            on_epoch=log_epochs(context, f"moco/{name}", advance),
            rate="recipe.moco.lr",
        )
        advice = f"Lower recipe.moco.batch_size={moco.batch_size}, or raise recipe.moco.groups={moco.groups}"
        with enough_memory(f"training {name} without labels", advice), compiling(passes.compile):
            context.fit(module, loader, moco.epochs, work / "training.ckpt.tmp", moco.groups)
    return module, head


def _nothing(network: nn.Module) -> Accuracy:
    raise AssertionError("an encoder knows no classes")
