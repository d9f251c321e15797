"""Stage ``relabel``: soft labels for a set of images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.bn import require_batchnorm
from cvdd.chain.images import load_images
from cvdd.chain.members import load_network, make_member
from cvdd.committee import vote_weights
from cvdd.config_base import ConfigError
from cvdd.context import Context
from cvdd.data import check_same_classes
from cvdd.labels import ComputedLabels, LabelLayout, SoftLabels, StoredLabels, Teachers, check_batches, write_labels
from cvdd.schema import teachers_of
from cvdd.seeds import derive_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """Soft labels of a set of images, stored or to be computed.

    Attributes:
        identity: what determines them, for a student's hash.
        parents: artefacts that a student depends on through them.
        artifact: the store, or None if the labels are computed when they are read.
        context: that of the labels.
        images: the labelled images.
        weights: share of each teacher.
        teachers: names and artefacts of the teachers.
    """

    identity: dict[str, Any]
    parents: list[Artifact]
    artifact: Artifact | None
    context: Context
    images: Artifact
    weights: list[float]
    teachers: dict[str, Artifact]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return 0 if self.artifact is None else self.artifact.bytes

    def open(self, pixels: Tensor) -> SoftLabels:
        """Return the labels for reading.

        Args:
            pixels: [count, 3, size, size] uint8, the labelled images.

        Raises:
            ConfigError: the labels were made for other images.
        """
        if self.artifact is None:
            return _computed(self.context, self.teachers, self.weights, pixels)
        return open_labels(self.context, self.artifact, self.images, pixels)


def make_labels(context: Context, images: Artifact, priors: Mapping[str, float]) -> Labels:
    """Return the soft labels of a set of images.

    Args:
        context: the configuration and its surroundings.
        images: the artefact to label.
        priors: prior performance of each member in percent; may be empty where nothing depends on it.
    """
    config, data = context.config, context.data()
    label = config.label
    names = teachers_of(config)
    teachers = {name: make_member(context, name) for name in names}
    voter = label.weights if len(names) > 1 else "equal"
    weights = vote_weights([priors.get(name, 0.0) for name in names], config.temperature.label, voter).tolist()
    seed = derive_seed(config.seed, "labels")
    count = int(images.metrics["images"])
    check_batches(count, label)
    identity = {
        "label": label.model_dump(mode="json", exclude={"name", "teachers", "weights", "store", "parameters"}),
        "weights": weights,
        "seed": seed,
    }
    parents = [images, *teachers.values()]
    artifact = None
    if label.store == "logits":
        layout = LabelLayout(label.epochs, count, len(data.classes), label.dtype, label.parameters == "stored")

        def build(work: Path) -> dict[str, Any]:
            log.info(
                "soft labels: %.1f MB of logits, %.1f MB of crops and mixes",
                layout.logits_bytes / 1e6,
                layout.parameters_bytes / 1e6,
            )
            computed = _computed(context, teachers, weights, load_images(images)[0])
            with context.progress("relabel", label.epochs) as advance:
                write_labels(work, computed, layout, advance)
            return {"bytes_logits": layout.logits_bytes, "bytes_parameters": layout.parameters_bytes}

        stored = identity | {"parameters": label.parameters, "images": images.digest, "classes": list(data.classes)}
        artifact = context.store.make("labels", f"{images.name}-{label.name}", stored, parents, build)
    return Labels(identity, parents, artifact, context, images, weights, teachers)


def open_labels(context: Context, artifact: Artifact, images: Artifact, pixels: Tensor) -> StoredLabels:
    """Open a label store for the images that it was made for.

    Raises:
        ConfigError: it was made for other images or for classes in another order.
    """
    made_for = artifact.manifest["identity"]
    if made_for["images"] != images.digest:
        raise ConfigError(
            f"the labels in {artifact.path} were made for the images {made_for['images']}, not for {images.digest}; "
            "run relabel.py with the configuration of these images"
        )
    data = context.data()
    check_same_classes(list(data.classes), made_for["classes"], f"labels {artifact.name}")
    label = context.config.label
    layout = LabelLayout(label.epochs, len(pixels), len(data.classes), label.dtype, label.parameters == "stored")
    return StoredLabels(artifact.path, layout, label, data.image_size, made_for["seed"])


def _computed(
    context: Context, artifacts: Mapping[str, Artifact], weights: list[float], pixels: Tensor
) -> ComputedLabels:
    config, data = context.config, context.data()
    networks = []
    for name, artifact in artifacts.items():
        network = load_network(context, artifact, config.committee.members[name].backbone)
        if config.label.bn_mode == "batch":
            require_batchnorm(network, name)
        networks.append(network)
    teachers = Teachers(networks, weights, config.label).to(context.device)
    seed = derive_seed(config.seed, "labels")
    return ComputedLabels(teachers, pixels.to(context.device), config.label, seed, data.mean, data.std)
