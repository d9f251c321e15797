"""Stage ``statistics``: what a member sees of the real data, where images are matched to more than it holds itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.tensor_files import write_tensors
from cvdd.chain.context import Context
from cvdd.chain.members import load_network, make_member
from cvdd.chain.real_batches import augmented_batches, drawn_by_augmentation
from cvdd.statistics.layer_statistics import Moments
from cvdd.statistics.recording import RealStatistics, Table, record_statistics
from cvdd.support.config_base import ConfigError
from cvdd.support.progress import Advance, counted
from cvdd.support.seeds import derive_seed, generator

STATISTICS = "statistics.safetensors"


def make_statistics(context: Context, name: str) -> Artifact:
    """Return the statistics of the training images at the layers of a member, as ``method.statistics`` asks for.

    The images are augmented by the recipe (crop and flip). The member's artefact is a parent, so statistics are never
    those of other weights.

    Args:
        context: the configuration and its surroundings.
        name: of the member.

    Raises:
        ConfigError: classes have targets of their own, and one has no images.
    """
    config, data = context.config, context.data()
    wanted = config.method.statistics
    assert wanted.recorded
    member = make_member(context, name)
    seed = derive_seed(config.seed, "statistics")
    identity: dict[str, Any] = {
        "data": data.identity,
        "classes": list(data.classes),
        "layers": wanted.layers,
        "patch": wanted.patch if wanted.layers == "bn_and_conv" else None,
        "class_statistics": wanted.class_statistics if wanted.class_share else None,
        "augmentation": drawn_by_augmentation(context),
        "batch": wanted.batch,
        "seed": seed,
    }

    def build(work: Path) -> dict[str, Any]:
        if wanted.class_share:
            _require_all_classes(context)
        backbone = config.committee.members[name].backbone
        network = load_network(context, member, backbone).to(context.device)
        with context.progress(f"statistics of {name}", -(-len(data.train) // wanted.batch)) as advance:
            recorded = record_statistics(network, _batches(context, seed, advance), wanted, len(data.classes))
        write_tensors(work / STATISTICS, _flat(recorded))
        layers = set(recorded.layers) | set(recorded.classes)
        return {"images": len(data.train), "layers": len(layers)}

    return context.store.make("statistics", f"{data.name}-{name}", identity, [member], build)


def load_statistics(artifact: Artifact) -> RealStatistics:
    """Read the statistics that :func:`make_statistics` made."""
    tables: dict[str, dict[str, dict[str, dict[str, Tensor]]]] = {"layers": {}, "classes": {}}
    for key, tensor in load_file(artifact.path / STATISTICS).items():
        table, layer, part, moment = key.split("/")
        tables[table].setdefault(layer, {}).setdefault(part, {})[moment] = tensor
    return RealStatistics(_table(tables["layers"]), _table(tables["classes"]))


def _table(tree: dict[str, dict[str, dict[str, Tensor]]]) -> Table:
    return {
        layer: {part: Moments(moments["mean"], moments["variance"]) for part, moments in parts.items()}
        for layer, parts in tree.items()
    }


def _flat(recorded: RealStatistics) -> dict[str, Tensor]:
    return {
        f"{name}/{layer}/{part}/{moment}": tensor.contiguous().cpu()
        for name, table in (("layers", recorded.layers), ("classes", recorded.classes))
        for layer, parts in table.items()
        for part, moments in parts.items()
        for moment, tensor in moments._asdict().items()
    }


def _require_all_classes(context: Context) -> None:
    data = context.data()
    counts = torch.bincount(data.train.labels, minlength=len(data.classes)).tolist()
    for name, count in zip(data.classes, counts, strict=True):
        if not count:
            raise ConfigError(
                f"class {name} has no training images, so there is nothing to match its images to; set "
                "method.statistics.class_share=0"
            )


def _batches(context: Context, seed: int, advance: Advance) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all training images once, shuffled: normalised [n, 3, size, size] and their labels [n], on the device."""
    size = context.config.method.statistics.batch
    order = torch.randperm(len(context.data().train), generator=generator(seed, "order")).split(size)
    return counted(augmented_batches(context, order, partial(generator, seed, "augment")), advance)
