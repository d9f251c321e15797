"""The whole chain for a configuration and for the rows that it is compared with."""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cvdd.artifact import Artifact
from cvdd.backbones import BackboneConfig
from cvdd.chain.context import Context
from cvdd.chain.given import kept_as_given
from cvdd.chain.given_labels import given_labels
from cvdd.chain.labels import Labels, make_labels
from cvdd.chain.members import make_classifier
from cvdd.chain.own_engines import OwnEngine, make_distilled, own_engine
from cvdd.chain.priors import Priors, find_priors, priors_of_row
from cvdd.chain.space import WHITENING
from cvdd.chain.spent import spent_on
from cvdd.chain.students import make_student
from cvdd.chain.unit_files import bytes_beside_units, load_history, pixel_bytes
from cvdd.composition.surroundings import FULL_DATA_ROW
from cvdd.schema import teachers_of
from cvdd.support.readable import standard_error
from cvdd.support.seeds import derive_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """Accuracy of one student on one distilled set.

    Attributes:
        row: name of the distilled set: the method, or a row of ``compare``.
        student: name of the network.
        protocol: how it was trained.
        seeds: one student each.
        students: their artefacts.
        images: the distilled set; None for all real data.
        labels: its labels; None for hard labels.
        of_method: whether students see the images as the method made them, and not as pixels of 8 bits.
    """

    row: str
    student: str
    protocol: str
    seeds: tuple[int, ...]
    students: tuple[Artifact, ...]
    images: Artifact | None
    labels: Labels | None
    of_method: bool = False

    def values(self, metric: str = "top1") -> list[float]:
        """One number per seed."""
        return [float(student.metrics[metric]) for student in self.students]

    def standard_error(self, metric: str = "top1") -> float | None:
        """Of the mean over seeds; None with a single one."""
        return standard_error(self.values(metric))

    def summary(self) -> dict[str, Any]:
        """Everything about it that belongs in a table, as JSON."""
        top1 = self.values()
        seconds = [float(student.manifest["cost"]["wall_seconds"]) for student in self.students]
        made = spent_on(self.images) if self.images else None
        soft = self.labels is not None
        return {
            "row": self.row,
            "student": self.student,
            "protocol": self.protocol,
            "n": len(top1),
            "top1": statistics.fmean(top1),
            "std": statistics.stdev(top1) if len(top1) > 1 else None,
            "standard_error": self.standard_error(),
            # With hard labels nobody chose an epoch.
            "best_top1": statistics.fmean(self.values("best_top1")) if soft else None,
            "top5": statistics.fmean(self.values("top5")),
            "loss": statistics.fmean(self.values("loss")),
            "seeds": list(self.seeds),
            "top1_by_seed": top1,
            "image_count": self.images.metrics["images"] if self.images else None,
            "image_bytes": self.image_bytes,
            "label_bytes": self.labels.bytes if self.labels else None,
            "label_note": _without_bytes(self.labels) if self.labels else None,
            "images": self.images.path.name if self.images else None,
            "labels": self.labels.place if self.labels else None,
            "students": [student.path.name for student in self.students],
            "student_seconds": statistics.fmean(seconds),
            "image_seconds": made.seconds if made else None,
            "image_process_seconds": made.process_seconds if made else None,
            "image_peak_memory_bytes": made.peak_memory if made else None,
        }

    @functools.cached_property
    def image_bytes(self) -> int | None:
        """Bytes that the students read of the images, as cost=true counts them; None of all real data."""
        # Looked up in every file of the images, and a page asks for it many times.
        if self.images is None:
            return None
        # A whitening is no image, however large.
        return bytes_beside_units(self.images, WHITENING) if self.of_method else pixel_bytes(self.images)


def _without_bytes(labels: Labels) -> str | None:
    """Say why labels have no bytes; None if they have."""
    if labels.bytes:
        return None
    config = labels.context.config
    if teachers_of(config):
        return "not stored"
    own = own_engine(config.method) if config.protocol.student == "method" else None
    return "with images" if own and own.learns_labels(labels.context) else "hard"


@dataclass(frozen=True)
class Distilled:
    """A distilled set with its labels, as one row of a comparison.

    Attributes:
        context: its configuration.
        row: its name.
        priors: prior performance of the members, and what it was measured by.
        images: the images.
        labels: their labels.
        others: images, and stored labels, of other seeds, where each has a set of its own.
    """

    context: Context
    row: str
    priors: Priors
    images: Artifact
    labels: Labels
    others: tuple[tuple[Artifact, Artifact | None], ...] = ()

    @property
    def all_images(self) -> list[Artifact]:
        """The images of all seeds, each set once."""
        return _distinct([self.images, *(images for images, _ in self.others)])

    @property
    def all_labels(self) -> list[Artifact]:
        """The stored labels of all seeds, each once."""
        return _distinct([self.labels.artifact, *(labels for _, labels in self.others)])

    @property
    def history(self) -> dict[str, dict[str, Any]]:
        """Who voted on the images, and how their loss went; of images that are given that is somebody else's."""
        given = kept_as_given(self.context, self.images) is not None
        return {} if given else load_history(self.images)


def _distinct(artifacts: Iterable[Artifact | None]) -> list[Artifact]:
    return list({artifact.path: artifact for artifact in artifacts if artifact is not None}.values())


def distil(context: Context, row: str, priors: Priors | None = None) -> Distilled:
    """Make images and labels of one configuration, and everything that they need.

    Args:
        context: the configuration and its surroundings.
        row: its name in a comparison.
        priors: prior performance of the members, if it is known already.
    """
    priors = find_priors(context) if priors is None else priors
    images = make_distilled(context, priors.values)
    return Distilled(context, row, priors, images, _labels(context, priors, images))


def _labels(context: Context, priors: Priors, images: Artifact) -> Labels:
    config = context.config
    own = _trained_by(context)
    if own and own.labels:
        return own.labels(context, images)
    if config.label.given is not None:
        return given_labels(context, images)
    return make_labels(context, images, priors.values)


def rows_of(context: Context) -> Iterator[tuple[str, Context]]:
    """Yield the configuration itself, and the rows that it is compared with."""
    own = context.config.method.name
    yield own, context
    for name, overrides in context.config.compare.items():
        # A row of that name says the same, or the configuration would have been refused.
        if name != own:
            yield name, context.differing({**overrides, "compare": {}}, name)


def compare(context: Context) -> tuple[list[Distilled], list[Result]]:
    """Measure all students on the configuration's own distilled set and on the rows that it is compared with."""
    shared = find_priors(context)
    distilled, results = [], []
    for row, row_context in rows_of(context):
        priors = priors_of_row(context, row_context, shared)
        sets = make_sets(row_context, row, priors, row_context.config.protocol.seeds)
        first, *others = sets.values()
        # Labels hold what they are computed with, which need not stay.
        distilled.append(replace(first, others=tuple((made.images, made.labels.artifact) for made in others)))
        protocol, of_method = row_context.config.protocol, _trained_by(row_context) is not None
        for name, backbone in context.config.students.items():
            students = tuple(student_of(made, name, backbone, seed) for seed, made in sets.items())
            seen = (first.images, first.labels, of_method)
            results.append(Result(row, name, protocol.name, tuple(sets), students, *seen))
    return distilled, [*results, *_full_data(context)]


def warn_of_equal_rows(results: Sequence[Result]) -> None:
    """Name the rows whose students are the same."""
    by_students: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        by_students.setdefault(tuple(student.path.name for student in result.students), []).append(result.row)
    for rows in dict.fromkeys(tuple(rows) for rows in by_students.values() if len(rows) > 1):
        log.warning("rows %s are one and the same: they differ in nothing that is read", " and ".join(rows))


def student_of(made: Distilled, name: str, backbone: BackboneConfig, seed: int) -> Artifact:
    """Train one student on a distilled set, as the protocol or the method says."""
    context = made.context
    own = _trained_by(context)
    if own is None:
        return make_student(context, made.labels, name, backbone, seed)
    return own.student(context, made.images, name, backbone, seed)


def _trained_by(context: Context) -> OwnEngine | None:
    """Return the engine of a method that trains students in its own way, on what it made."""
    return own_engine(context.config.method) if context.config.protocol.student == "method" else None


def make_sets(context: Context, row: str, priors: Priors, seeds: Sequence[int]) -> dict[int, Distilled]:
    """Make the distilled set of each seed: the same for all, or one of its own for each, as the protocol says."""
    if context.config.protocol.images == "once":
        made = distil(context, row, priors)
        return dict.fromkeys(seeds, made)
    # Labels tell the seeds apart in logs and pictures, which would otherwise overwrite each other. The first has the
    # keys of a row whose images are made once, so that dashboards show both alike.
    first = context.config.protocol.seeds[0]
    labels = {seed: context.label if seed == first else f"{row} seed {seed}" for seed in seeds}
    own = {seed: context.differing({"method.seed": seed}, label) for seed, label in labels.items()}
    return {seed: distil(each, row, priors) for seed, each in own.items()}


def _full_data(context: Context) -> Sequence[Result]:
    config = context.config
    if not config.protocol.full_data:
        return []
    results, serving = [], context.differing({}, context.label, serves="students")
    for name, backbone in config.students.items():
        trained = [
            make_classifier(serving, f"full-{name}-seed{seed}", backbone, derive_seed(seed, "student"))
            for seed in config.protocol.seeds
        ]
        students = tuple(_as_student(artifact) for artifact in trained)
        # Not trained by the protocol of the other rows but like a member.
        protocol = f"recipe {config.recipe.name}"
        results.append(Result(FULL_DATA_ROW, name, protocol, tuple(config.protocol.seeds), students, None, None))
    return results


def _as_student(member: Artifact) -> Artifact:
    metrics = {key: member.metrics[f"test_{key}"] for key in ("top1", "top5", "loss")}
    return Artifact(member.path, {**member.manifest, "metrics": metrics})
