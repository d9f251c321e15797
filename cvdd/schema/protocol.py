"""How students are trained and measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from cvdd.schema.types import Betas, Name, Positive, whole_part
from cvdd.schema.unread import unread_fields
from cvdd.support.config_base import CheckedConfig


class ProtocolConfig(CheckedConfig):
    """How a student is trained on the distilled set and measured."""

    name: Name = Field(description="name of the protocol, shown beside every number")
    student: Literal["protocol", "method"] = Field(
        "protocol", description="who says how students are trained: this protocol, or the method itself (APM, MTT)"
    )
    epochs: Positive = Field(
        description="epochs over the distilled set; without those of hard_share at most label.epochs, unless labels "
        "are repeated"
    )
    hard_share: float = Field(
        0.0, ge=0, lt=1, description="of the epochs, in the middle, that teach the images' own classes instead (HALD)"
    )
    repeat_labels: bool = Field(
        False,
        description="draw label batches in rounds, each once before any comes again, so that fewer label.epochs do "
        "(HALD)",
    )
    loss: Literal["kl", "mse", "gift", "cross_entropy"] = Field(
        "kl",
        description="kl: divergence from the teachers, mse: of the logits, gift: angle to the logits, cross_entropy: "
        "for label.teachers=none",
    )
    temperature: float = Field(20.0, gt=0, description="of both softmaxes of loss=kl; must be greater than 0")
    temperature_factor: float = Field(
        1.0,
        gt=0,
        le=1,
        description="on the temperature after every temperature_epochs, for other lessons of few labels "
        "(LPQLD); 1 leaves it",
    )
    temperature_epochs: Positive = Field(30, description="epochs between two factors on the temperature")
    temperature_least: float = Field(2.0, gt=0, description="below which no factor takes the temperature")
    student_temperature: Literal["teachers", "calibrated"] = Field(
        "teachers",
        description="of the student's softmax: that of the teachers', or the one from 0.01 to 1 that fitted the last "
        "batch of the epoch before best (LPQLD)",
    )
    temperature_squared: bool = Field(False, description="multiply the divergence by temperature^2")
    hard_label_weight: float = Field(
        0.0,
        ge=0,
        description="of the classes beside the teachers: of the unmixed image's cross-entropy in loss=mse, of the "
        "smoothed label in loss=gift",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a label that all classes have alike, where students learn the images' own classes: with "
        "loss=cross_entropy, or in the epochs of hard_share",
    )
    optimizer: Literal["adamw", "sgd", "muon"] = Field(
        "adamw",
        description="adamw decouples weight decay, sgd does not; muon makes the steps of matrices orthogonal, at the "
        "size of adamw's, and is adamw for vectors",
    )
    lr: float = Field(gt=0, description="highest learning rate")
    betas: Betas = Field((0.9, 0.999), description="of adamw, and of muon's vectors")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd, and of muon's matrices")
    weight_decay: float = Field(0.01, ge=0, description="of the optimiser")
    decay: Literal["matrices", "all"] = Field(
        "matrices", description="what decays: weights with two or more axes, or all parameters"
    )
    schedule: Literal["cosine", "linear", "early_late", "multistep", "two_steps"] = Field(
        "cosine",
        description="per epoch; early_late: cosine until 5/6, then lower and linear to 0; multistep: halved three "
        "times at the end (both EDC); two_steps: to a fifth after 2/3 and after 5/6 (CIM)",
    )
    eta: float = Field(1.0, gt=0, description="stretch of the schedule: cosine 1 ends at 0, 2 ends at half the rate")
    warmup: int = Field(0, ge=0, description="epochs that rise linearly from a hundredth of the rate")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the moving average of the parameters that is measured; null for none"
    )
    accumulation: Positive = Field(2, description="parts of a batch that are forwarded separately")
    part_weights: Literal["alike", "by_size"] = Field(
        "alike",
        description="of the parts of a batch in its loss: alike, 1 / accumulation each, as published, so that a last, "
        "smaller batch with fewer parts counts less; or by_size, so that each sample of a batch counts the same",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="one student for each seed")
    images: Literal["once", "per_seed"] = Field(
        "once", description="per_seed: each seed has its own distilled images too (method.seed), and its own baselines"
    )
    eval_every: Positive = Field(10, description="epochs between measurements; the last is always measured")
    eval_batch: Positive = Field(256, description="images per forward pass when measuring")
    full_data: bool = Field(False, description="also train each student on all real data with the members' recipe")

    @property
    def hard_epochs(self) -> int:
        """Epochs that teach the images' own classes between those that teach what the label recipe says."""
        return self.epochs - self.soft_epochs

    @property
    def soft_epochs(self) -> int:
        """Epochs that teach what the label recipe says."""
        return self.soft_epochs_of(self.epochs)

    def soft_epochs_of(self, epochs: int) -> int:
        """Return how many of so many epochs would teach what the label recipe says."""
        return epochs - whole_part(self.hard_share, epochs)

    def _problems(self) -> Iterator[str]:
        if len(set(self.seeds)) != len(self.seeds):
            yield f"protocol.seeds={self.seeds} repeats a seed"
        yield from unread_fields(self, "protocol")
        if self.decay != "matrices" and not self.weight_decay:
            yield "protocol.decay=all is of protocol.weight_decay, which is 0; set protocol.decay=matrices"
        yield from self._temperature_problems()
        if self.hard_share and not self.hard_epochs and self.epochs > 1:
            yield (
                f"protocol.hard_share={self.hard_share} of protocol.epochs={self.epochs} is no epoch; set "
                f"protocol.hard_share to at least {1 / self.epochs:.2g}, or to 0.0"
            )
        if self.label_smoothing and not self.hard_share and self.loss != "cross_entropy":
            yield (
                f"protocol.label_smoothing={self.label_smoothing} is of the images' own classes, which protocol.loss="
                f"{self.loss} does not teach; set protocol.label_smoothing=0.0, or a protocol.hard_share"
            )
        if self.warmup >= self.epochs:
            yield f"protocol.warmup={self.warmup} must be less than protocol.epochs={self.epochs}"

    def _temperature_problems(self) -> Iterator[str]:
        for name in ("temperature_epochs", "temperature_least"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.temperature_factor == 1 and value != default:
                yield (
                    f"protocol.{name}={value} is of protocol.temperature_factor, and a factor of 1 changes nothing; "
                    f"set protocol.{name}={default}, or a protocol.temperature_factor"
                )
        if self.temperature_factor < 1 and self.temperature_least >= self.temperature:
            yield (
                f"protocol.temperature_least={self.temperature_least} is not below the temperature to begin with; set "
                f"it to less than protocol.temperature={self.temperature}, or protocol.temperature_factor=1.0"
            )
        # A single epoch is debug=smoke.
        if self.temperature_factor < 1 and 1 < self.epochs < self.temperature_epochs:
            yield (
                f"protocol.temperature_epochs={self.temperature_epochs} of protocol.epochs={self.epochs} leave the "
                f"temperature as it is; set protocol.temperature_epochs to at most {self.epochs}, or "
                "protocol.temperature_factor=1.0"
            )
        if self.student_temperature == "calibrated" and self.accumulation > 1:
            yield (
                "protocol.student_temperature=calibrated is of whole batches, and protocol.accumulation="
                f"{self.accumulation}; set protocol.accumulation=1, or protocol.student_temperature=teachers"
            )
