"""Settings of trajectory matching (specification of MTT; TESLA is one of its gradients)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from cvdd.backbones.config import BackboneConfig
from cvdd.schema.types import Positive
from cvdd.support.config_base import CheckedConfig, StrictConfig


class ExpertConfig(StrictConfig):
    """Networks trained on the real data, whose parameters after every epoch are kept."""

    backbone: BackboneConfig = Field(description="network of experts and of the inner loop; it must have no buffers")
    count: Positive = Field(100, description="experts, each from an initialisation of its own")
    epochs: Positive = Field(50, description="passes over the real data; snapshots are one more")
    batch_size: Positive = Field(256, description="real images per step")
    lr: float = Field(0.01, gt=0, description="of plain SGD")
    momentum: float = Field(0.0, ge=0, lt=1, description="of SGD; 0 as published")
    weight_decay: float = Field(0.0, ge=0, description="of SGD; 0 as published")
    drop: bool = Field(False, description="divide the rate by 10 once, just past the middle")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the stored parameters")
    path: Path | None = Field(
        None, description="sealed trajectories made elsewhere with these very settings; null makes them"
    )


class MatchedStudentConfig(StrictConfig):
    """How a student is trained on images that trajectory matching made; the rate is the learned step size."""

    epochs: Positive = Field(1001, description="passes over the synthetic images")
    batch_size: Positive = Field(256, description="synthetic images per step")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="of SGD")
    drop: bool = Field(True, description="divide the rate by 10 just past the middle and forget the momentum")
    lr: float | None = Field(None, gt=0, description="rate instead of the learned step size; null for the latter")


class MttConfig(CheckedConfig):
    """Trajectory matching: a student's steps on synthetic images land where an expert was epochs later."""

    experts: ExpertConfig
    student: MatchedStudentConfig
    whitening: bool = Field(False, description="ZCA-whiten all images instead of standardising them by channel")
    whitening_eps: float = Field(0.1, gt=0, description="added to the covariance's eigenvalues, for values in [0, 1]")
    augmentations: list[Literal["color", "crop", "cutout", "scale", "rotate"]] = Field(
        ["color", "crop", "cutout", "scale", "rotate"],
        description="families of DSA, one drawn for each batch; method.flip adds flip",
    )
    steps: Positive = Field(20, description="N: steps of the student on synthetic images")
    target_epochs: Positive = Field(3, description="M: epochs that the expert is ahead")
    start_epochs: Positive = Field(25, description="an iteration starts at one of so many first snapshots")
    batch_size: Positive | None = Field(None, description="synthetic images per step of the student; null is all")
    lr_images: float = Field(1000.0, ge=0, description="of SGD on the images; 0 leaves them as they are")
    lr_step_size: float = Field(1e-5, ge=0, description="of SGD on the student's step size; 0 keeps it")
    momentum: float = Field(0.5, ge=0, lt=1, description="of these optimisers")
    step_size: float = Field(0.01, gt=0, description="the student's step size at first")
    step_size_form: Literal["plain", "softplus"] = Field(
        "plain", description="what is learned: the step size itself, or a number whose softplus it is (always positive)"
    )
    labels: Literal["hard", "learned"] = Field("hard", description="class indices, or probabilities that are learned")
    labels_start: Literal["class", "expert"] = Field(
        "class",
        description="learned labels at first: 90% the class itself, or what the first expert ends up predicting",
    )
    lr_labels: float | None = Field(None, gt=0, description="of SGD on the logits of learned labels")
    gradient: Literal["unrolled", "tesla", "tesla_detached"] = Field(
        "unrolled",
        description="through all steps at once; the same one step at a time (memory does not grow with steps); or "
        "without the way over later parameters, as TESLA's program does",
    )
    steps_in_graph: Positive | None = Field(
        None, description="for gradient=unrolled: steps whose graph is held at once, the others run twice; null is all"
    )
    canvas: Positive = Field(1, description="side of an image in sides of what networks see; above 1 makes textures")
    canvas_samples: Positive = Field(1, description="crops of each canvas in a step")
    loss_limit: float | None = Field(
        10.0, gt=1, description="stop where the matched loss is higher (standing still has 1); null for no limit"
    )

    def _problems(self) -> Iterator[str]:
        last = self.start_epochs - 1 + self.target_epochs
        if last > self.experts.epochs:
            yield (
                f"method.mtt.start_epochs={self.start_epochs} and method.mtt.target_epochs={self.target_epochs} need "
                f"snapshots up to epoch {last}, and method.mtt.experts.epochs={self.experts.epochs}; train experts for "
                "more epochs or lower one of the two"
            )
        if self.canvas > 1 and self.whitening:
            yield f"method.mtt.canvas={self.canvas}: canvases have no whitening; set method.mtt.whitening=false"
        if self.canvas_samples > 1 and self.canvas == 1:
            yield "method.mtt.canvas_samples is of textures; set method.mtt.canvas to at least 2"
        if self.labels == "learned" and self.lr_labels is None:
            yield "method.mtt.labels=learned needs method.mtt.lr_labels"
        if self.labels == "hard" and self.lr_labels is not None:
            yield "method.mtt.lr_labels is of learned labels; set method.mtt.labels=learned or lr_labels=null"
        if self.labels == "hard" and self.labels_start != "class":
            yield "method.mtt.labels_start is of learned labels; set method.mtt.labels=learned"
        if self.steps_in_graph is not None and self.gradient != "unrolled":
            yield f"method.mtt.steps_in_graph is of gradient=unrolled; gradient={self.gradient} always holds one step"
        if len(set(self.augmentations)) != len(self.augmentations):
            yield f"method.mtt.augmentations={self.augmentations} repeats a family"
        if not self.whitening and not self.at_default("whitening_eps"):
            yield "method.mtt.whitening_eps is of method.mtt.whitening, which is false"
