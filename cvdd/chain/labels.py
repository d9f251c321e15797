"""Stage ``relabel``: labels for a set of images."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cvdd.artifact import Artifact, Maker, Parts
from cvdd.chain.context import Context
from cvdd.chain.elsewhere import as_it_was_made
from cvdd.chain.fitting import fit_batches, forget, remember, remembered
from cvdd.chain.members import load_network, make_member
from cvdd.chain.unit_files import load_images
from cvdd.chain.votes import priors_in_order
from cvdd.computing.passes import Passes, label_passes_elsewhere, passes_of_labels
from cvdd.data import check_same_classes
from cvdd.labels.pool import LabelPool
from cvdd.labels.rows import check_top
from cvdd.labels.sources import ComputedLabels, HardLabels, SoftLabels, check_batches
from cvdd.labels.store import LabelLayout, StoredLabels, epochs_written, require_reserved, reserve_labels, write_epochs
from cvdd.labels.teachers import Teachers
from cvdd.schema import LabelConfig, teachers_of
from cvdd.statistics.bn import require_batchnorm
from cvdd.support.config_base import ConfigError
from cvdd.support.memory import enough_memory
from cvdd.support.readable import readable_bytes
from cvdd.support.seeds import derive_seed
from cvdd.synthesis.committee import vote_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """Labels of a set of images: stored, to be computed, or hard.

    Attributes:
        identity: what determines them, for a student's hash.
        parents: artefacts that a student depends on through them.
        artifact: the store, or None if the labels are computed when they are read or are hard.
        context: that of the labels.
        images: the labelled images.
        weights: share of each teacher.
        teachers: names and artefacts of the teachers; none of hard labels.
    """

    identity: dict[str, Any]
    parents: list[Artifact]
    artifact: Artifact | None
    context: Context
    images: Artifact
    weights: list[float]
    teachers: dict[str, Artifact]

    @property
    def place(self) -> str | None:
        """Name of the directory in which they are stored, if they are."""
        return None if self.artifact is None else self.artifact.path.name

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return 0 if self.artifact is None else self.artifact.bytes

    def open(self, pixels: Tensor, in_rounds: bool = False) -> SoftLabels:
        """Return the labels for reading.

        Args:
            pixels: [count, 3, size, size] uint8, the labelled images.
            in_rounds: see :class:`cvdd.labels.store.StoredLabels`.

        Raises:
            ConfigError: the labels were made for other images.
        """
        if not self.teachers:
            return self.hard(len(pixels), _seed(self.context))
        if self.artifact is None:
            return _computed(self.context, self.teachers, self.weights, pixels)
        return open_labels(self.context, self.artifact, self.images, pixels, in_rounds)

    def hard(self, count: int, seed: int) -> HardLabels:
        """Return the classes of so many images, shown as these labels show them."""
        return HardLabels(self.context.config.label, count, self.context.data().image_size, seed)


def make_labels(context: Context, images: Artifact, priors: Mapping[str, float]) -> Labels:
    """Return the labels of a set of images.

    Args:
        context: the configuration and its surroundings.
        images: the artefact to label.
        priors: prior performance of each member in percent; may be empty where nothing depends on it.
    """
    config, data = context.config, context.data()
    label = config.label
    names = teachers_of(config)
    teachers = {name: make_member(context, name) for name in names}
    weights = _weights(context, names, priors)
    count = int(images.metrics["images"])
    check_batches(count, label)
    check_top(label.top, len(data.classes), label.rest)
    identity = {
        "label": label.model_dump(mode="json", exclude=_ignored(label)),
        # A balanced average has equal weights too, and other logits.
        "weights": "balanced" if label.weights == "balanced" and len(names) > 1 else weights,
        "seed": _seed(context),
    }
    parents = [images, *teachers.values()]
    kept = {"parameters": label.parameters, "images": images.digest, "classes": list(data.classes)}
    if names:
        passes = _passes(context, count).identity
        if label.store == "logits":
            others = [one.identity for one in label_passes_elsewhere(config.engine)]
            typed = f"engine.compile_labels={str(bool(passes.get('compiled'))).lower()}"
            passes = as_it_was_made(context, "labels", identity | kept, parents, passes, others, typed)
        identity |= passes
    artifact = None
    if label.store == "logits":
        layout = LabelLayout.of(label, count, len(data.classes))

        blocks = layout.blocks

        def prepare(work: Path) -> None:
            log.info(
                "soft labels: %s of logits, %s of crops and mixes",
                readable_bytes(layout.logits_bytes),
                readable_bytes(layout.parameters_bytes),
            )
            reserve_labels(work, layout)

        @contextlib.contextmanager
        def maker(work: Path) -> Iterator[Maker]:
            advice = (
                f"Lower label.stack={label.stack}, the batches that share a forward pass, or "
                f"label.batch_size={label.batch_size}, their images"
            )
            with (
                enough_memory("labelling the images", advice),
                context.progress("relabel", layout.pool.labelled_epochs) as advance,
            ):
                computed = _computed(context, teachers, weights, load_images(images)[0], remembered(work).get("stack"))

                def make(index: int) -> None:
                    write_epochs(work, computed, layout, blocks[index], advance)
                    if computed.stack != label.stack:
                        remember(work, stack=computed.stack)

                yield Maker(
                    make,
                    lambda indices: advance(sum(len(blocks[index]) for index in indices)),
                )

        def finish(work: Path) -> dict[str, Any]:
            require_reserved(work, layout)
            counts = {"bytes_logits": layout.logits_bytes, "bytes_parameters": layout.parameters_bytes}
            if less := forget(work):
                counts["stack_for_lack_of_memory"] = less["stack"]
            return counts

        parts = Parts(
            [f"epochs{block.start:05d}" for block in blocks],
            lambda work, index: epochs_written(work, blocks[index]) == len(blocks[index]),
            maker,
            prepare,
        )
        name = f"{images.name}-{label.name}"
        artifact = context.store.make_parts("labels", name, identity | kept, parents, parts, finish)
    return Labels(identity, parents, artifact, context, images, weights, teachers)


def _ignored(label: LabelConfig) -> set[str]:
    # Whole logits are what every label had before they could be shortened, and the mean is what others became; images
    # were whole, and nothing was DSA's.
    added = filter(label.at_default, ("top", "rest", "factor", "dsa"))
    return {"name", "teachers", "weights", "store", "parameters", "given", *added}


def open_labels(
    context: Context, artifact: Artifact, images: Artifact, pixels: Tensor, in_rounds: bool = False
) -> StoredLabels:
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
    layout = LabelLayout.of(label, len(pixels), len(data.classes))
    return StoredLabels(artifact.path, layout, label, data.image_size, made_for["seed"], in_rounds)


def _seed(context: Context) -> int:
    return derive_seed(context.config.seed, "labels")


def _passes(context: Context, count: int) -> Passes:
    config, data = context.config, context.data()
    backbones = [config.committee.members[name].backbone for name in teachers_of(config)]
    samples = LabelPool.of(config.label, count).samples
    classes, size = len(data.classes), data.image_size
    return passes_of_labels(config.engine, config.label, backbones, samples, classes, size, context.device)


def _weights(context: Context, teachers: Sequence[str], priors: Mapping[str, float]) -> list[float]:
    config = context.config
    if not teachers:
        return []
    voter = "prior" if config.label.weights == "prior" and len(teachers) > 1 else "equal"
    known = priors_in_order(priors if voter == "prior" else {}, teachers)
    weights = vote_weights(known, config.temperature.label, voter)
    shares: list[float] = weights.tolist()
    return shares


def _computed(
    context: Context,
    artifacts: Mapping[str, Artifact],
    weights: list[float],
    pixels: Tensor,
    stack: int | None = None,
) -> ComputedLabels:
    config, data = context.config, context.data()
    networks = []
    for name, artifact in artifacts.items():
        member = config.committee.members[name]
        network = load_network(context, artifact, member.backbone)
        if config.label.bn_mode == "batch" and member.bn_scale:
            require_batchnorm(network, name)
        networks.append(network)
    passes = _passes(context, len(pixels))
    teachers = Teachers(networks, weights, config.label, passes).to(context.device)
    shown, seed = pixels.to(context.device), _seed(context)
    stack = stack or fit_batches(context, list(artifacts), passes, len(pixels))
    return ComputedLabels(teachers, shown, config.label, seed, data.mean, data.std, stack)
