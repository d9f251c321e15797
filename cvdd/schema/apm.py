"""Adversarial prediction matching (specification of APM, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cvdd.backbones.config import BackboneConfig
from cvdd.schema.types import Positive
from cvdd.support.config_base import CheckedConfig, StrictConfig


class SgdConfig(StrictConfig):
    """One training by SGD whose learning rate falls once."""

    epochs: Positive = Field(description="passes over the images; the release counts from 0 to its number inclusively")
    batch_size: Positive = Field(256, description="images per step")
    lr: float = Field(gt=0, description="first learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="of SGD, on all parameters")
    milestone: Positive | None = Field(
        None, description="epoch, counted from 0, from which the learning rate is lower; null is half of them"
    )
    factor: float = Field(0.1, gt=0, le=1, description="of the learning rate from the milestone on")

    @property
    def drop(self) -> int:
        """Epoch, counted from 0, from which the learning rate is lower."""
        return (self.epochs + 1) // 2 if self.milestone is None else self.milestone

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        return self.lr * (self.factor if epoch >= self.drop else 1.0)


class TeachersConfig(SgdConfig):
    """The pool of converged networks, all of one architecture."""

    backbone: BackboneConfig = Field(description="network of teachers and surrogate students")
    count: Positive = Field(description="networks, each from an initialisation of its own")
    paths: list[Path] = Field([], description="sealed teachers made elsewhere, count of them; [] trains them")


class SurrogateConfig(SgdConfig):
    """The students that the images are held against."""

    snapshots: Positive = Field(5, description="K, states of a student's training that judge the images")
    gap: int = Field(2, ge=0, description="iterations without a new student between two with one")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.snapshots > max(self.epochs - 1, 1):
            raise ValueError(
                f"method.apm.surrogate.snapshots={self.snapshots} needs more than as many epochs, and "
                f"method.apm.surrogate.epochs={self.epochs}; choose 1 to {max(self.epochs - 1, 1)} snapshots"
            )
        return self


class ApmConfig(CheckedConfig):
    """Adversarial prediction matching: images on which students and their teacher still disagree."""

    teachers: TeachersConfig = Field(description="training of the teachers")
    surrogate: SurrogateConfig = Field(description="training of the surrogate students")
    student: SgdConfig = Field(description="training of the students that are measured")
    whitening: bool = Field(True, description="ZCA-whiten all images instead of standardising them by channel")
    whitening_eps: float = Field(0.1, gt=0, description="added to the covariance's eigenvalues, for values in [0, 1]")
    augmentations: list[Literal["color", "crop", "cutout", "scale", "rotate"]] = Field(
        ["color", "crop", "cutout", "scale", "rotate"],
        description="families of DSA in all training, one drawn for each batch; method.flip adds flip",
    )
    lr_images: float = Field(gt=0, description="of the images' SGD; it grows with the number of classes")
    momentum: float = Field(0.5, ge=0, lt=1, description="of the images' SGD")
    factor: float = Field(0.3, gt=0, le=1, description="of the images' learning rate in the second half")
    momentum_drift: bool = Field(
        True, description="as released, momentum also moves images that are not in the iteration's batch"
    )
    discrepancy: float = Field(
        1.0, description="weight of the disagreement, which is maximised; below 0 it is minimised, a control"
    )
    ce: float = Field(0.1, ge=0, description="weight of the teacher's cross-entropy")
    batch_size: Positive | None = Field(None, description="images of an iteration; null is all")
    chunk: Positive | None = Field(
        None, description="images in memory at once when the images' gradient is summed; null is the whole batch"
    )
    snapshots_at_once: bool = Field(False, description="all snapshots in one vectorised forward pass, more memory")
    parts: Positive = Field(1, description="parts of the slots that are distilled independently of each other")
    first_part: int = Field(
        0, ge=0, description="part that this process begins with; start more processes with other numbers"
    )

    def _problems(self) -> Iterator[str]:
        if self.chunk is not None and self.batch_size is not None and self.chunk > self.batch_size:
            yield f"method.apm.chunk={self.chunk} is larger than method.apm.batch_size={self.batch_size}"
        if self.first_part >= self.parts:
            yield f"method.apm.first_part={self.first_part}: choose 0 to {self.parts - 1} (method.apm.parts - 1)"
        if len(set(self.augmentations)) != len(self.augmentations):
            yield f"method.apm.augmentations={self.augmentations} repeats a family"
        if not self.whitening and not self.at_default("whitening_eps"):
            yield "method.apm.whitening_eps is of method.apm.whitening, which is false"
        if self.discrepancy == 0 and self.ce == 0:
            yield "method.apm.discrepancy=0 and method.apm.ce=0 leave nothing to optimise"
        if not self.momentum and not self.momentum_drift:
            yield "method.apm.momentum_drift=false is of method.apm.momentum, which is 0"
        if self.teachers.paths and len(self.teachers.paths) != self.teachers.count:
            yield (
                f"method.apm.teachers.paths names {len(self.teachers.paths)} teachers, and method.apm.teachers.count="
                f"{self.teachers.count}; set it to {len(self.teachers.paths)}"
            )
        if len(set(self.teachers.paths)) != len(self.teachers.paths):
            yield "method.apm.teachers.paths names a teacher twice; name each once"
        for name in ("teachers", "surrogate", "student"):
            training: SgdConfig = getattr(self, name)
            if training.milestone is not None and training.milestone >= training.epochs:
                yield (
                    f"method.apm.{name}.milestone={training.milestone} comes after the last of "
                    f"method.apm.{name}.epochs={training.epochs}; choose 1 to {training.epochs - 1}, or null"
                )
