"""Stage ``difficulty``: real images by difficulty, and members with the statistics of a group of them (PSM)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cvdd.artifact import Artifact, Maker, Parts
from cvdd.artifact.tensor_files import is_whole, save_tensors, write_tensors
from cvdd.backbones import batchnorm_layers, has_batchnorm
from cvdd.chain.context import Context
from cvdd.chain.members import load_network, make_member
from cvdd.chain.real_batches import augmented, augmented_batches, decoded, drawn_by_augmentation, plain_batches
from cvdd.data import to_eval_tensor
from cvdd.methods.psm import choose_start, difficulty_groups, precision_distance, ranks_in_class, update_statistics
from cvdd.schema import DifficultyConfig, RunConfig
from cvdd.statistics.bn import running_moments
from cvdd.support.batch_parts import part_size, parts_of
from cvdd.support.config_base import ConfigError
from cvdd.support.progress import counted
from cvdd.support.seeds import derive_seed, generator
from cvdd.training.classifier import ShuffledBatches

SCORES = "scores.safetensors"

RANKED_AT_ONCE = 256
"""Images in a forward pass that ranks them."""


def ranking_members(config: RunConfig) -> list[str]:
    """Names of the members by whose statistics images are ranked: all that may vote."""
    voters = config.method.voters
    return list(config.committee.members) if isinstance(voters, str) else [*voters]


def require_ranking(networks: Mapping[str, nn.Module]) -> None:
    """Refuse members by whose statistics nothing can be ranked.

    Args:
        networks: by name, those of :func:`ranking_members`.

    Raises:
        ConfigError: none has BatchNorm layers.
    """
    for name, network in networks.items():
        for _, layer in batchnorm_layers(network):
            if layer.running_mean is None:
                raise ConfigError(
                    f"method.difficulty ranks images by statistics that BatchNorm layers keep, and those of {name} "
                    "keep none (track_running_stats=False); choose another backbone, or other method.voters"
                )
    if not any(has_batchnorm(network) for network in networks.values()):
        raise ConfigError(
            f"method.difficulty ranks images by statistics of BatchNorm layers, and none of {', '.join(networks)} has "
            "any; choose other method.voters, or method.difficulty=null and another method.init"
        )


def make_difficulty(context: Context) -> Artifact:
    """Return the difficulty of each training image: its rank in its class, in the mean over members (equation 4).

    Images are shown once, as they are tested; members without BatchNorm layers rank nothing.

    Raises:
        ConfigError: no member has BatchNorm layers.
    """
    config, data = context.config, context.data()
    names = ranking_members(config)
    members = [make_member(context, name) for name in names]
    weight = _settings(config).variance_weight
    identity = {"data": data.identity, "classes": list(data.classes), "variance_weight": weight}

    def build(work: Path) -> dict[str, Any]:
        networks = {
            name: load_network(context, member, config.committee.members[name].backbone)
            for name, member in zip(names, members, strict=True)
        }
        require_ranking(networks)
        normalising = {name: network.to(context.device) for name, network in networks.items() if has_batchnorm(network)}
        order = torch.arange(len(data.train)).split(RANKED_AT_ONCE)
        parts: dict[str, list[Tensor]] = {name: [] for name in normalising}
        with context.progress("difficulty", len(order)) as advance:
            # All look at a batch in turn, because it may have to be decoded.
            for images in counted(plain_batches(context, order), advance):
                for name, network in normalising.items():
                    parts[name].append(precision_distance(network, images, weight).cpu())
        ranks = [ranks_in_class(_finite(name, torch.cat(each)), data.train.labels) for name, each in parts.items()]
        write_tensors(work / SCORES, {"scores": torch.stack(ranks).double().mean(dim=0)})
        return {"images": len(data.train), "members": len(ranks)}

    return context.store.make("difficulty", data.name, identity, members, build)


def _finite(name: str, distances: Tensor) -> Tensor:
    if not distances.isfinite().all():
        raise ConfigError(
            f"member {name} has statistics of the training images that are no numbers, so it cannot rank them; train "
            "it otherwise (recipe.lr), or leave it out (method.voters)"
        )
    return distances


def graded_images(context: Context, difficulty: Artifact) -> Tensor:
    """Initial images of all slots, each out of the group of its slot: [classes, ipc, 3, size, size] uint8.

    Args:
        context: the configuration and its surroundings.
        difficulty: of :func:`make_difficulty`.
    """
    config, data = context.config, context.data()
    choice, seed = _settings(config).start, config.method.seed
    groups = _groups(context, difficulty)
    chosen = [
        choose_start(group[label], choice, generator(seed, "difficulty", label, slot))
        for label in range(len(data.classes))
        for slot, group in enumerate(groups)
    ]
    pixels: Tensor = to_eval_tensor(data.train, data.image_size, config.dataset.test_resize, torch.tensor(chosen))
    return pixels.view(len(data.classes), len(groups), *pixels.shape[1:])


def make_group_statistics(context: Context, name: str, difficulty: Artifact, slots: Sequence[int]) -> Artifact:
    """Return the running statistics of a member after it was shown a group alone, for each of some groups (equation 6).

    They start from its own. Batches, or the parts of them that are normalised by themselves, are as large as in
    training and augmented by the recipe. Each group is a part, which any process can make; one that is interrupted goes
    on after its last pass over the group.

    Args:
        context: the configuration and its surroundings.
        name: of the member.
        difficulty: of :func:`make_difficulty`.
        slots: whose groups, in ascending order.
    """
    config, data = context.config, context.data()
    recipe, member = config.recipe, make_member(context, name)
    epochs = _settings(config).epochs(recipe.epochs)
    seed = derive_seed(config.seed, "group_statistics")
    count = config.ipc.images_per_class
    size = part_size(recipe.batch_size, recipe.accumulation)
    identity = {
        "data": data.identity,
        "classes": list(data.classes),
        "groups": count,
        "slots": list(slots),
        "epochs": epochs,
        "batch": recipe.batch_size,
        "part": size,
        "augmentation": drawn_by_augmentation(context),
        "seed": seed,
    }

    def update(network: nn.Module, group: int, images: Tensor, checkpoint: Path) -> None:
        batches = ShuffledBatches(len(images), recipe.batch_size, derive_seed(seed, "group", group))
        held = decoded(context, images)
        for epoch in range(_resume(network, checkpoint), epochs):
            batches.set_epoch(epoch)
            parts = [index[part] for index in batches for part in parts_of(len(index), size)]
            source = partial(generator, seed, "augment", group, epoch)
            if held is None:
                views = (seen for seen, _ in augmented_batches(context, [images[part] for part in parts], source))
            else:
                views = (augmented(context, held[part], source(number)) for number, part in enumerate(parts))
            update_statistics(network, views)
            save_tensors(checkpoint, _on_cpu(network), {"epochs": str(epoch + 1)})

    @contextlib.contextmanager
    def maker(work: Path) -> Iterator[Maker]:
        groups = [torch.cat(of_classes) for of_classes in _groups(context, difficulty)]
        backbone = config.committee.members[name].backbone
        with context.progress(f"statistics of groups, {name}", len(slots)) as advance:

            def make(index: int) -> None:
                group = slots[index]
                network = load_network(context, member, backbone).to(context.device)
                if has_batchnorm(network):
                    update(network, group, groups[group], work / f"{_file_of(group)}.ckpt.tmp")
                save_tensors(work / _file_of(group), _on_cpu(network))
                advance(1)

            yield Maker(make, lambda made: advance(len(made)))

    def done(work: Path, index: int) -> bool:
        return is_whole(work / _file_of(slots[index]))

    parts = Parts([f"group{group:04d}" for group in slots], done, maker)
    named, parents = f"{data.name}-{name}-{count}", [member, difficulty]
    metrics = {"groups": len(slots)}
    return context.store.make_parts("group_statistics", named, identity, parents, parts, lambda work: metrics)


def take_group_statistics(network: nn.Module, statistics: Artifact, group: int) -> None:
    """Replace the running statistics of a member by those that it has of a group.

    Args:
        network: of the member.
        statistics: of :func:`make_group_statistics`.
        group: that of the slot.
    """
    _take(network, load_file(statistics.path / _file_of(group)))


def _resume(network: nn.Module, checkpoint: Path) -> int:
    """Go on from a checkpoint, if there is one; return the number of finished passes."""
    if not is_whole(checkpoint):
        return 0
    _take(network, load_file(checkpoint))
    with safe_open(checkpoint, "pt") as file:
        return int(file.metadata()["epochs"])


def _take(network: nn.Module, stored: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, mine in _statistics_of(network).items():
            mine.copy_(stored[key])


def _on_cpu(network: nn.Module) -> dict[str, Tensor]:
    return {key: values.cpu() for key, values in _statistics_of(network).items()}


def _settings(config: RunConfig) -> DifficultyConfig:
    settings = config.method.difficulty
    assert settings is not None
    return settings


def _groups(context: Context, difficulty: Artifact) -> list[list[Tensor]]:
    data = context.data()
    scores = load_file(difficulty.path / SCORES)["scores"]
    return difficulty_groups(scores, data.train.labels, len(data.classes), context.config.ipc.images_per_class)


def _file_of(group: int) -> str:
    return f"group{group:04d}.safetensors"


def _statistics_of(network: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in batchnorm_layers(network):
        moments = running_moments(layer)
        found |= {f"{name}/mean": moments.mean, f"{name}/variance": moments.variance}
        if layer.num_batches_tracked is not None:
            # By it a layer without a momentum averages.
            found[f"{name}/batches"] = layer.num_batches_tracked
    return found
