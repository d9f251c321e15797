"""How synthetic images are made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from cvdd.schema.anchors import AnchorsConfig, anchors_problems
from cvdd.schema.apm import ApmConfig
from cvdd.schema.difficulty import DifficultyConfig, difficulty_problems
from cvdd.schema.mtt import MttConfig
from cvdd.schema.retrieval import RetrievalConfig, retrieval_problems
from cvdd.schema.types import Betas, Name, Positive, Range, Share
from cvdd.schema.unread import unread_settings
from cvdd.support.config_base import CheckedConfig, StrictConfig


class IpcConfig(StrictConfig):
    """Images per class, and what the paper ties to it."""

    images_per_class: Positive = Field(description="IPC: synthetic images per class")
    draw: Literal["in_turn", "random", "best", "fixed"] = Field(description="how the release draws members at this IPC")
    label_batch: Positive = Field(
        description="images per label batch and per student step with label=committee and recipes that follow it; the "
        "others have a label.batch_size of their own"
    )


class PatchesConfig(StrictConfig):
    """Initial images cut from real data (specification of RDED, section 2)."""

    observer: str = Field(description="member that scores the crops")
    factor: Literal[1, 2] = Field(1, description="1: a patch is an image; 2: four patches are stitched")
    crops: Positive = Field(5, description="random crops of each candidate image")
    candidates: Positive = Field(300, description="real images inspected per class (all, if fewer)")
    crop_scale: Range = Field((0.08, 1.0), description="area range of a crop")
    difficulty: Literal["easy", "medium", "hard"] = Field("medium", description="which losses are taken")
    images_per_class: Positive = Field(description="images made per class; slot k starts from image k")


AS_THEY_ARE = frozenset({"random_real", "rded", "patches"})
"""Names by which everybody knows images that nobody optimises."""

BATCH = 64
"""As released for small images."""

PATCH = 4
"""Likewise."""


class StatisticsConfig(CheckedConfig):
    """What the members' statistics of the images are matched to (specifications of G-VBSM, EDC and LPLD)."""

    layers: Literal["bn", "bn_and_conv"] = Field(
        "bn", description="inputs of BatchNorm layers, or of convolutions too (channel and patch statistics)"
    )
    class_share: float = Field(0.0, ge=0, le=1, description="weight of the classes' own targets; the rest is global")
    class_statistics: Literal["images", "total", "moving"] = Field(
        "images",
        description="of a class: mean over its images of each one's own mean and variance (EDC), mean and variance of "
        "all of them together, or a moving average over batches (LPLD)",
    )
    batch: Positive = Field(
        BATCH,
        description="real images a batch while statistics are recorded; global variances and moving ones depend on it",
    )
    patch: Positive = Field(PATCH, description="side of the patches of bn_and_conv, in cells of the feature map")
    momentum: float | None = Field(
        None, ge=0, lt=1, description="moving average of the images' statistics over iterations; null for none"
    )
    start: Literal["first", "zero"] = Field(
        "first", description="the moving average starts from the first iteration's statistics, or from 0 as released"
    )
    drop_rate: float = Field(0.0, ge=0, lt=1, description="probability that a convolution is left out of an iteration")

    def _problems(self) -> Iterator[str]:
        if self.drop_rate and self.layers == "bn":
            yield ("method.statistics.drop_rate leaves out convolutions; set method.statistics.layers=bn_and_conv")
        if self.patch != PATCH and self.layers == "bn":
            yield (
                f"method.statistics.patch={self.patch} is of convolutions; set method.statistics.layers=bn_and_conv, "
                f"or method.statistics.patch={PATCH}"
            )
        if self.class_statistics != "images" and not self.class_share:
            yield (
                f"method.statistics.class_statistics={self.class_statistics} is of the classes' own targets; set "
                "method.statistics.class_share above 0, or method.statistics.class_statistics=images"
            )
        if self.start != "first" and self.momentum is None:
            yield (
                f"method.statistics.start={self.start} begins a moving average; set method.statistics.momentum, or "
                "method.statistics.start=first"
            )
        if self.batch != BATCH and not self.recorded:
            yield (
                f"method.statistics.batch={self.batch} is of statistics that are recorded, which "
                "method.statistics.layers=bn_and_conv and a class_share above 0 need; set it to "
                f"{BATCH}, or one of these"
            )

    @property
    def recorded(self) -> bool:
        """Whether targets are needed that the networks themselves do not hold."""
        return self.layers == "bn_and_conv" or self.class_share > 0


OWN_SECTIONS = ("apm", "mtt")
"""Fields of a method that hold the settings of an engine of its own; at most one of them is set."""


class MethodConfig(CheckedConfig):
    """How synthetic images are made."""

    name: Name = Field(description="name of the method, shown in results")
    seed: int = Field(ge=0, description="of the choice of real images and patches, of draws, crops and noise")
    init: Literal[
        "patches", "real", "easiest", "medium", "herding", "difficulty", "noise", "all", "given", "from_given"
    ] = Field(
        description="initial images: easiest chooses the real ones that patches.observer tells best, medium those in "
        "the middle of that order; herding those whose mean is that of the class, in the members' features; difficulty "
        "one of each group of method.difficulty; "
        "all takes every real image, whatever ipc says, and optimises nothing; given keeps those of method.given as "
        "they are, and from_given begins with them"
    )
    given: Path | None = Field(
        None,
        description="for init=given and from_given: images that somebody else made, a folder with one for each class, "
        "or store/images/NAME-HASH",
    )
    factor: Literal[1, 2] = Field(
        1,
        description="2: each image is made of four real ones at half the side, or given so, and members see one, or "
        "all with method.anchors",
    )
    composer: Literal["slots", "classes"] = Field(
        "slots",
        description="images that are optimised together: one of each of classes_per_unit classes, or all of a few "
        "classes",
    )
    classes_per_unit: Positive = Field(description="classes that are optimised together")
    slots_per_unit: Positive | None = Field(
        None, description="for composer=classes: images of a class that are optimised together; null is all"
    )
    units_per_stack: Positive = Field(10, description="units with the same draw that are optimised side by side")
    voters: Literal["drawn", "all"] | list[str] = Field(
        "drawn", description="drawn (committee.size members, as committee.draw says), all, or a list of members"
    )
    turns: Literal["all", "in_turn", "sampled"] = Field(
        "all", description="who judges an iteration: all voters by weight, one in turn, or one drawn by its weight"
    )
    iterations: int = Field(ge=0, description="optimiser steps per unit; 0 keeps the initial images")
    lr: float = Field(0.25, gt=0, description="initial learning rate of Adam")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate; cosine goes to 0")
    betas: Betas = Field((0.5, 0.9), description="of Adam")
    eps: float = Field(1e-8, gt=0, description="of Adam")
    stages: Positive = Field(1, description="equal parts of the iterations, each with a fresh Adam")
    sizes: list[Positive] | None = Field(None, description="side of the images in each stage; null is the data set's")
    residual: Share = Field(1.0, description="share of the images kept after a stage; the rest is blended in anew")
    early_late: bool = Field(
        False,
        description="slots begin spread evenly over the stages, the first ones first, and all end with the last stage "
        "(DELT); false: all begin with the first. The rate of that name is protocol.schedule's",
    )
    ce: float = Field(1.0, ge=0, description="weight of each member's cross-entropy")
    r_bn: float = Field(0.01, ge=0, description="weight of each member's statistics term")
    first_bn_multiplier: float = Field(10.0, ge=0, description="extra weight of the first layer that is matched")
    statistics_of: Literal["unit", "stack"] = Field(
        "unit", description="match statistics of each unit, as published, or of the whole stack"
    )
    statistics: StatisticsConfig = Field(default_factory=StatisticsConfig)
    difficulty: DifficultyConfig | None = Field(
        None, description="groups of real images by difficulty, one for each slot; null for none"
    )
    anchors: AnchorsConfig | None = Field(
        None, description="features of the real images that the parts of an image are to have; null for none"
    )
    retrieval: RetrievalConfig | None = Field(
        None,
        description="real images that are chosen anew for what is blended in after a stage; null blends in the initial",
    )
    density: float = Field(0.0, ge=0, description="weight of G-VBSM's data densification")
    density_scale: Literal["none", "dimension", "cosine"] = Field(
        "none", description="of the Gram matrix: none as released, divided by its dimension, or of unit vectors"
    )
    crop_scale: Range | None = Field((0.08, 1.0), description="area range of the unit's crop; null for none")
    crop_schedule: Literal["constant", "step", "linear", "cosine"] = Field(
        "constant", description="how the lowest area goes from 1 down to crop_scale (CDA)"
    )
    crop_milestone: Share = Field(1.0, description="share of the iterations after which it has arrived")
    pad: int = Field(
        0,
        ge=0,
        description="shift by up to so many pixels beyond its edges, where the mean colour is; for crop_scale=null",
    )
    flip: bool = Field(True, description="random horizontal flip of the unit")
    jitter: int = Field(ge=0, description="circular shift of the unit, 0..jitter pixels on both axes")
    jitter_both_ways: bool = Field(False, description="-jitter..jitter pixels instead")
    cutout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="side of a square that is cut out of what members see of a unit, as a share of the image's; 0 for "
        "none",
    )
    checkpoint_every: Positive = Field(500, description="iterations between checkpoints inside a stack")
    log_every: Positive = Field(25, description="iterations between log rows")
    log_agreement: bool = Field(
        True,
        description="also log cosines of the members' gradients; unless turns=all it costs one more pass of each at "
        "every log row",
    )
    grid_every: Positive = Field(500, description="iterations between logged image grids")
    jpeg_round_trip: bool = Field(False, description="store what the release's JPEG quality 75 would have kept")
    apm: ApmConfig | None = Field(
        None, description="settings of adversarial prediction matching instead of the recover loop; null for none"
    )
    mtt: MttConfig | None = Field(
        None, description="settings of trajectory matching instead of the recover loop; null for none"
    )

    @property
    def recovers(self) -> bool:
        """Whether members vote on the images in the recover loop."""
        return self.iterations > 0 and not self.brings_students

    @property
    def grades(self) -> DifficultyConfig | None:
        """Groups by difficulty of whose images the voters have the statistics, if they are to have any."""
        graded = self.difficulty is not None and self.difficulty.forward_share > 0 and self.recovers
        return self.difficulty if graded else None

    @property
    def ranks(self) -> bool:
        """Whether real images are ranked by difficulty."""
        return self.init == "difficulty" or self.grades is not None

    @property
    def begins_late(self) -> bool:
        """Whether some slots begin in a later stage than others."""
        return self.early_late and self.recovers

    @property
    def anchored(self) -> AnchorsConfig | None:
        """Anchors that the voters look at, if they are to look at any."""
        return self.anchors if self.recovers else None

    @property
    def retrieves(self) -> RetrievalConfig | None:
        """How real images are chosen anew, if any are blended in after a stage."""
        return self.retrieval if self.recovers else None

    @property
    def parts_judged(self) -> int:
        """Pictures that the voters judge of each image in an iteration."""
        return 1 if self.anchored is None else self.factor**2

    @property
    def keeps_given(self) -> bool:
        """Whether the images are somebody else's, as they are."""
        return self.init == "given"

    @property
    def brings_students(self) -> bool:
        """Whether the method makes images, labels and students in a way of its own."""
        return self.own is not None

    @property
    def own(self) -> tuple[str, ApmConfig | MttConfig] | None:
        """The section of the method's own engine and what it says; None for the recover loop."""
        found = ((section, getattr(self, section)) for section in OWN_SECTIONS)
        return next(((section, settings) for section, settings in found if settings is not None), None)

    def _problems_of_given(self) -> Iterator[str]:
        takes = self.init in ("given", "from_given")
        if takes and self.given is None:
            yield (
                f"method.init={self.init} takes images that are there; type method.given=FOLDER, with a folder for "
                "each class, or method.given=store/images/NAME-HASH"
            )
        if not takes and self.given is not None:
            yield (
                f"method.given={self.given} is of method=given, or of method.init=from_given, and method.init="
                f"{self.init}; choose one of these, or method.given=null. Beside rows that are written as lists, which "
                "have what is typed, make the given images a row: +compare.theirs=['method=given',...]"
            )
        if self.init == "given" and self.iterations:
            yield (
                f"method.init=given keeps images as they are, and method.iterations={self.iterations}; set "
                "method.iterations=0 (a row of compare has what is typed, so set it there), or method.init=from_given, "
                "which begins with them"
            )
        if self.init == "given" and self.jpeg_round_trip:
            yield (
                "method.init=given keeps images as they are, and method.jpeg_round_trip=true would compress them; set "
                "method.jpeg_round_trip=false"
            )
        if self.init == "from_given" and not self.iterations:
            yield "method.init=from_given begins with images, and method.iterations=0 keeps them; set method.init=given"

    def _problems(self) -> Iterator[str]:
        if self.mtt is not None:
            yield from unread_settings(self, "mtt", "trajectory matching", ("real", "noise"))
        if self.apm is not None:
            yield from unread_settings(self, "apm", "prediction matching", ("real", "patches", "noise"))
        yield from self._problems_of_given()
        yield from difficulty_problems(self)
        yield from anchors_problems(self)
        yield from retrieval_problems(self)
        if self.iterations == 0 and self.init == "noise":
            yield "method.iterations=0 keeps the initial images, and method.init=noise has none to keep"
        if self.iterations and self.name in AS_THEY_ARE:
            yield (
                f"method.name={self.name} is that of images as they are, which method.iterations={self.iterations} "
                "would change; set method.iterations=0, or another method.name"
            )
        if self.iterations and self.init == "all":
            yield "method.init=all keeps every real image as it is; set method.iterations=0"
        if self.iterations and self.ce == 0 and self.r_bn == 0 and self.anchors is None:
            yield "method.ce=0 and method.r_bn=0 leave nothing to optimise"
        for name in ("log_every", "grid_every"):
            if self.checkpoint_every % getattr(self, name) and getattr(self, name) < self.checkpoint_every:
                yield f"method.{name} must divide method.checkpoint_every={self.checkpoint_every}"
        if self.voters == []:
            yield "method.voters is empty: name members, or choose drawn or all"
        if self.slots_per_unit and self.composer == "slots":
            yield "method.slots_per_unit is of method.composer=classes; with composer=slots a unit has one slot"
        if self.iterations % self.stages:
            yield f"method.stages={self.stages} must divide method.iterations={self.iterations}"
        if self.sizes is not None and len(self.sizes) != self.stages:
            yield f"method.sizes={self.sizes} needs one side for each of method.stages={self.stages}"
        if self.early_late and self.iterations and self.stages == 1:
            yield (
                "method.early_late lets slots begin in different stages, and method.stages=1 is one; set method.stages "
                "to at least 2, or method.early_late=false"
            )
        if self.residual < 1 and self.stages == 1:
            yield "method.residual blends after a stage that is not the last; set method.stages to at least 2"
        if self.residual < 1 and self.init == "noise" and self.retrieval is None:
            yield (
                "method.residual blends in the initial real images, and method.init=noise has none; set residual=1, or "
                "'method.retrieval={complexity: 0.1}', which chooses others"
            )
        if self.crop_schedule != "constant" and self.crop_scale is None:
            yield "method.crop_schedule needs method.crop_scale"
        if self.crop_milestone < 1 and self.crop_schedule == "constant":
            yield "method.crop_milestone is of a crop_schedule; choose step, linear or cosine"
        if self.factor > 1 and self.init in ("herding", "difficulty", "all", "noise"):
            yield (
                f"method.factor={self.factor} makes an image of several real ones, and method.init={self.init} has "
                "none or whole ones; set method.factor=1, or method.init=real, easiest, medium or patches"
            )
        if self.factor > 1 and self.pad and self.anchors is None:
            yield f"method.pad shifts whole images, and method.factor={self.factor} shows parts; set method.pad=0"
        for side in self.sizes or ():
            if side % self.factor:
                yield f"method.sizes={self.sizes}: method.factor=2 cannot halve {side}; choose even sides, or factor=1"
        if self.pad and self.crop_scale is not None:
            yield "method.pad shifts whole images; set method.crop_scale=null"
        if self.jitter_both_ways and not self.jitter:
            yield "method.jitter_both_ways=true needs method.jitter"
        if self.density and self.composer == "slots":
            yield "method.density needs several images of a class in a unit; set method.composer=classes"
        if self.density_scale != "none" and not self.density:
            yield "method.density_scale is of method.density, which is 0"
        if not self.r_bn and self.statistics != StatisticsConfig():
            yield "method.statistics is of method.r_bn, which is 0"
