"""What a configuration may contain: types, one line of help for each field, and the checks across fields.

Hydra composes; this module decides whether the result can run. Nothing else in the project reads a raw config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from cvdd.backbones.config import BackboneConfig
from cvdd.config_base import ConfigError, StrictConfig
from cvdd.data.config import DatasetConfig

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Verb = Literal["train", "distill", "relabel", "evaluate"]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


Range = Annotated[tuple[Share, Share], BeforeValidator(_pair)]


class RecipeConfig(StrictConfig):
    """How a committee member is trained on the real data."""

    name: str = Field(description="name of the recipe, shown in manifests")
    epochs: Positive = Field(description="passes over the training data")
    batch_size: Positive = Field(description="images per step")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(description="adam couples weight decay, adamw does not")
    lr: float = Field(gt=0, description="highest learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="of sgd")
    weight_decay: float = Field(0.0, ge=0, description="of the optimiser, on all parameters")
    schedule: Literal["cosine", "onecycle", "constant"] = Field(
        "cosine", description="cosine steps per epoch, onecycle per step"
    )
    cosine_period: Positive | None = Field(None, description="epochs until the cosine reaches 0; null is all epochs")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")
    crop: Literal["none", "pad", "resized"] = Field("pad", description="random shift after padding, or resized crop")
    pad: int = Field(4, ge=0, description="pixels of padding for crop=pad")
    crop_scale: Range = Field((0.08, 1.0), description="area range for crop=resized")
    flip: bool = Field(True, description="random horizontal flip")


class MemberConfig(StrictConfig):
    """One member of the committee."""

    backbone: BackboneConfig = Field(description="the network")
    checkpoint: Path | None = Field(None, description="a checkpoint of the published CV-DD release instead of training")
    bn_scale: float = Field(1.0, ge=0, description="factor on this member's BatchNorm term")


class CommitteeConfig(StrictConfig):
    """Who votes on a slot, and how."""

    name: str = Field(description="name of the committee, shown in results")
    members: dict[str, MemberConfig] = Field(description="the members by name, in order")
    size: Positive = Field(description="N, the number of members that vote on a slot")
    draw: Literal["in_turn", "random", "best", "fixed"] = Field(
        description="in_turn (all subsets, slot after slot), random per slot, best (highest priors), or the list fixed"
    )
    fixed: list[list[str]] = Field([], description="for draw=fixed: lists of member names, used in turn by the slots")
    voter: Literal["prior", "equal", "random"] = Field(description="prior (softmax of priors / T), equal, or random")

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = list(self.members)
        if not names:
            raise ValueError("committee.members is empty: choose a committee with committee=NAME")
        if self.size > len(names):
            raise ValueError(
                f"committee.size={self.size} is larger than the committee ({len(names)}: {', '.join(names)}); "
                f"choose 1 to {len(names)}"
            )
        if (self.draw == "fixed") != bool(self.fixed):
            raise ValueError("committee.fixed is a list of lists of members exactly when committee.draw=fixed")
        for group in self.fixed:
            for name in group:
                if name not in self.members:
                    raise ValueError(f"committee.fixed names {name}; the members are {', '.join(names)}")
            if len(group) != self.size or len(set(group)) != len(group):
                raise ValueError(f"committee.fixed: {group} does not have committee.size={self.size} different members")
        return self


class PriorConfig(StrictConfig):
    """Where each member's prior performance comes from (specification of CV-DD, section 3)."""

    source: Literal["measured", "given"] = Field(description="measure by distilling with one member alone, or given")
    # In the yaml files null stands for none: Hydra lets only that be replaced by keys that are not there yet.
    values: Annotated[dict[str, float], BeforeValidator(_none_is_empty)] = Field(
        {}, description="given priors in percent, by member name"
    )
    observer: str = Field(description="member that labels for the measurement and whose network is its student")
    images_per_class: Positive = Field(10, description="IPC of the measurement")
    iterations: int = Field(4000, ge=0, description="recover iterations of the measurement")
    epochs: Positive = Field(300, description="label and student epochs of the measurement")
    seeds: Positive = Field(1, description="students of the measurement; their mean counts")
    measured_on: Literal["train", "test"] = Field(
        "train", description="real images on which the measurement's student is tested; the paper takes test"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source == "given") != bool(self.values):
            raise ValueError("prior.values holds a number for each member exactly when prior.source=given")
        return self


class IpcConfig(StrictConfig):
    """Images per class, and what the paper ties to it."""

    images_per_class: Positive = Field(description="IPC: synthetic images per class")
    draw: Literal["in_turn", "random", "best", "fixed"] = Field(description="how the paper draws members at this IPC")
    label_batch: Positive = Field(description="images per label batch and per student step")


class TemperatureConfig(StrictConfig):
    """Softmax temperatures of the prior-weighted averages."""

    vote: float = Field(gt=0, description="T of the vote on images; must be greater than 0")
    label: float = Field(gt=0, description="T of the average of several label teachers; must be greater than 0")


class PatchesConfig(StrictConfig):
    """Initial images cut from real data (specification of RDED, section 2)."""

    observer: str = Field(description="member that scores the crops")
    factor: Literal[1, 2] = Field(1, description="1: a patch is an image; 2: four patches are stitched")
    crops: Positive = Field(5, description="random crops of each candidate image")
    candidates: Positive = Field(300, description="real images inspected per class (all, if fewer)")
    crop_scale: Range = Field((0.08, 1.0), description="area range of a crop")
    difficulty: Literal["easy", "medium", "hard"] = Field("medium", description="which losses are taken")
    images_per_class: Positive = Field(description="images made per class; slot k starts from image k")


class MethodConfig(StrictConfig):
    """How synthetic images are made."""

    name: str = Field(description="name of the method, shown in results")
    seed: int = Field(ge=0, description="of the choice of real images and patches, of draws, crops and noise")
    init: Literal["patches", "real", "noise"] = Field(description="initial images")
    iterations: int = Field(ge=0, description="optimiser steps per unit; 0 keeps the initial images")
    lr: float = Field(0.25, gt=0, description="initial learning rate of Adam, cosine to 0")
    betas: Annotated[tuple[float, float], BeforeValidator(_pair)] = Field((0.5, 0.9), description="of Adam")
    eps: float = Field(1e-8, gt=0, description="of Adam")
    ce: float = Field(1.0, ge=0, description="weight of each member's cross-entropy")
    r_bn: float = Field(0.01, ge=0, description="weight of each member's BatchNorm term")
    first_bn_multiplier: float = Field(10.0, ge=0, description="extra weight of the first BatchNorm layer")
    statistics_of: Literal["unit", "stack"] = Field(
        "unit", description="match BatchNorm statistics of each unit, as published, or of the whole stack"
    )
    crop_scale: Range | None = Field((0.08, 1.0), description="area range of the unit's crop; null for none")
    flip: bool = Field(True, description="random horizontal flip of the unit")
    jitter: int = Field(ge=0, description="circular shift of the unit, 0..jitter pixels on both axes")
    classes_per_unit: Positive = Field(description="one image of each of so many classes is optimised together")
    units_per_stack: Positive = Field(10, description="units with the same draw that share a forward pass")
    checkpoint_every: Positive = Field(500, description="iterations between checkpoints inside a stack")
    log_every: Positive = Field(25, description="iterations between log rows")
    grid_every: Positive = Field(500, description="iterations between logged image grids")
    jpeg_round_trip: bool = Field(False, description="store what the release's JPEG quality 75 would have kept")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.iterations == 0 and self.init == "noise":
            raise ValueError("method.iterations=0 keeps the initial images, and method.init=noise has none to keep")
        if self.iterations and self.ce == 0 and self.r_bn == 0:
            raise ValueError("method.ce=0 and method.r_bn=0 leave nothing to optimise")
        for name in ("log_every", "grid_every"):
            if self.checkpoint_every % getattr(self, name) and getattr(self, name) < self.checkpoint_every:
                raise ValueError(f"method.{name} must divide method.checkpoint_every={self.checkpoint_every}")
        return self


class LabelConfig(StrictConfig):
    """Soft labels: which view of which image, scored by whom."""

    name: str = Field(description="name of the label recipe, shown in results")
    teachers: Literal["committee"] | list[str] = Field(description="all members, or a list of member names")
    weights: Literal["prior", "equal"] = Field(
        description="average of several teachers' logits: softmax(prior/T), equal"
    )
    bn_mode: Literal["batch", "running"] = Field(description="batch: statistics of the labelled batch itself (BSSL)")
    halves: bool = Field(True, description="split each batch in two halves with statistics of their own")
    dropout: bool = Field(False, description="keep the teachers' dropout active, as the release does; labels get noisy")
    epochs: Positive = Field(description="epochs that are labelled")
    batch_size: int = Field(ge=2, description="images per batch")
    crop_scale: Range = Field((0.08, 1.0), description="area range of the crop")
    flip: bool = Field(True, description="random horizontal flip")
    mix: Literal["cutmix", "mixup", "none"] = Field("cutmix", description="how a batch is mixed with itself")
    mix_alpha: float = Field(1.0, gt=0, description="of the Beta distribution of the mix")
    dtype: Literal["float16", "float32"] = Field("float16", description="of the stored logits")
    store: Literal["logits", "none"] = Field("logits", description="none computes the same labels on the fly")
    parameters: Literal["stored", "seed"] = Field("stored", description="store crops and mixes, or redraw them")
    stack: Positive = Field(32, description="batches that share a forward pass")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.halves and self.batch_size < 4:
            raise ValueError(f"label.batch_size={self.batch_size} with label.halves=true leaves halves of one image")
        if self.dropout and self.bn_mode != "batch":
            raise ValueError("label.dropout=true imitates train-mode teachers and needs label.bn_mode=batch")
        if self.teachers == []:
            raise ValueError("label.teachers is empty: name members, or committee for all")
        return self


class ProtocolConfig(StrictConfig):
    """How a student is trained on the distilled set and measured."""

    name: str = Field(description="name of the protocol, shown beside every number")
    epochs: Positive = Field(description="epochs over the distilled set; at most label.epochs")
    lr: float = Field(gt=0, description="of AdamW")
    eta: float = Field(1.0, gt=0, description="stretch of the cosine: 1 ends at 0, 2 ends at half the rate")
    weight_decay: float = Field(0.01, ge=0, description="on weights with two or more axes")
    betas: Annotated[tuple[float, float], BeforeValidator(_pair)] = Field((0.9, 0.999), description="of AdamW")
    temperature: float = Field(20.0, gt=0, description="of both softmaxes in the divergence; must be greater than 0")
    accumulation: Positive = Field(2, description="parts of a batch that are forwarded separately")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="one student for each seed")
    images: Literal["once", "per_seed"] = Field(
        "once", description="per_seed: each seed has its own distilled images too (method.seed), and its own baselines"
    )
    eval_every: Positive = Field(10, description="epochs between measurements; the last is always measured")
    eval_batch: Positive = Field(256, description="images per forward pass when measuring")
    full_data: bool = Field(False, description="also train each student on all real data with the members' recipe")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"protocol.seeds={self.seeds} repeats a seed")
        return self


class TrainerConfig(StrictConfig):
    """Where and in what precision things run; never part of an artefact's identity on the CPU in fp32."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field(description="where to run")
    devices: Positive = Field(1, description="processes")
    threads: Positive | None = Field(None, description="CPU threads; null leaves PyTorch's choice")
    workers: int = Field(2, ge=0, description="loader processes for data that does not fit memory")
    progress: Literal["auto", "bar", "lines", "none"] = Field("auto", description="bar in a terminal, lines elsewhere")


class LoggerConfig(StrictConfig):
    """Besides csv, which is always on."""

    wandb: bool = Field(False, description="Weights & Biases")
    wandb_mode: Literal["online", "offline"] = Field("online", description="offline runs are sent later by wandb sync")
    project: str = Field("cvdd", description="wandb project")
    entity: str | None = Field(None, description="wandb entity; null is your default")
    group: str | None = Field(None, description="wandb group; null is the sweep's directory, if any")
    tensorboard: bool = Field(False, description="TensorBoard event files")


class PathsConfig(StrictConfig):
    """Directories; never part of an artefact's identity."""

    data: Path = Field(description="raw data sets")
    store: Path = Field(description="artefacts")
    output: Path = Field(description="this run's table, metrics, page and logs")


class RunConfig(StrictConfig):
    """The whole configuration; the same for all four verbs."""

    verb: Verb = Field(description="what the command makes; set by the script")
    seed: int = Field(ge=0, description="of everything but the students, which have protocol.seeds")
    dataset: DatasetConfig
    recipe: RecipeConfig
    committee: CommitteeConfig
    prior: PriorConfig
    ipc: IpcConfig
    temperature: TemperatureConfig
    patches: PatchesConfig
    method: MethodConfig
    label: LabelConfig
    protocol: ProtocolConfig
    students: dict[str, BackboneConfig] = Field(min_length=1, description="networks to train on the distilled set")
    compare: dict[str, dict[str, Any]] = Field(
        {}, description="more rows of the table: name -> the overrides in which the row differs from this config"
    )
    trainer: TrainerConfig
    logger: LoggerConfig
    paths: PathsConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = list(self.committee.members)
        for field, name in [("patches.observer", self.patches.observer), ("prior.observer", self.prior.observer)]:
            if name not in names:
                raise ValueError(f"{field}={name} is not a member of the committee; choose from {', '.join(names)}")
        if self.label.teachers != "committee":
            for name in self.label.teachers:
                if name not in names:
                    raise ValueError(f"label.teachers names {name}; the members are {', '.join(names)}, or committee")
        if self.prior.source == "given":
            missing = [name for name in names if name not in self.prior.values]
            if missing and needs_priors(self):
                raise ValueError(
                    f"prior.values has no number for {', '.join(missing)}; add +prior.values.{missing[0]}=PERCENT, or "
                    "use prior=measured"
                )
        if self.protocol.epochs > self.label.epochs:
            raise ValueError(
                f"protocol.epochs={self.protocol.epochs} needs labels of as many epochs, and label.epochs is "
                f"{self.label.epochs}; set label.epochs={self.protocol.epochs} or protocol.epochs={self.label.epochs}"
            )
        if self.method.init == "patches" and self.patches.images_per_class < self.ipc.images_per_class:
            raise ValueError(
                f"patches.images_per_class={self.patches.images_per_class} is less than "
                f"ipc.images_per_class={self.ipc.images_per_class}; set it to at least as many"
            )
        return self


def teachers_of(config: RunConfig) -> list[str]:
    """Names of the members that label, in committee order."""
    if config.label.teachers == "committee":
        return list(config.committee.members)
    return [name for name in config.committee.members if name in config.label.teachers]


def needs_priors(config: RunConfig) -> bool:
    """Whether anything in this configuration depends on the members' prior performance."""
    voting = config.method.iterations > 0 and (
        config.committee.draw == "best" or (config.committee.voter == "prior" and config.committee.size > 1)
    )
    return voting or (config.label.weights == "prior" and len(teachers_of(config)) > 1)


def with_overrides(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """Return a copy of a configuration with dotted keys replaced, checked like a new one.

    Raises:
        ConfigError: a key does not exist or the result cannot run.
    """
    tree = config.model_dump()
    for key, value in overrides.items():
        *path, last = key.split(".")
        node: Any = tree
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ConfigError(f"{key}: there is no such field in the configuration")
        node[last] = value
    return RunConfig.model_validate(tree)
