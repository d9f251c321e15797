"""Who votes, with what prior performance and at what temperature."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cvdd.backbones.config import BackboneConfig
from cvdd.schema.types import Name, Numbers, Positive
from cvdd.support.config_base import CheckedConfig, StrictConfig


class MemberConfig(StrictConfig):
    """One member of the committee."""

    backbone: BackboneConfig = Field(description="the network")
    checkpoint: Path | None = Field(
        None, description="weights instead of training: a .pth of the published release, or a store's .safetensors"
    )
    bn_scale: float = Field(1.0, ge=0, description="factor on this member's BatchNorm term")


class CommitteeConfig(CheckedConfig):
    """Who votes on a slot, and how."""

    name: str = Field(description="name of the committee, shown in results")
    members: dict[Name, MemberConfig] = Field(description="the members by name, in order")
    size: Positive = Field(description="N, the number of members that vote on a slot")
    draw: Literal["in_turn", "random", "best", "fixed"] = Field(
        description="in_turn (all subsets, slot after slot), random per slot, best (highest priors), or the list fixed"
    )
    fixed: list[list[str]] = Field([], description="for draw=fixed: lists of member names, used in turn by the slots")
    voter: Literal["prior", "equal", "random"] = Field(description="prior (softmax of priors / T), equal, or random")

    def _problems(self) -> Iterator[str]:
        names = list(self.members)
        if not names:
            yield "committee.members is empty: choose a committee with committee=NAME"
            return
        if self.size > len(names):
            yield (
                f"committee.size={self.size} is larger than the committee ({len(names)}: {', '.join(names)}); "
                f"choose 1 to {len(names)}"
            )
        if (self.draw == "fixed") != bool(self.fixed):
            if self.draw == "fixed":
                example = f"[[{','.join(names[: self.size])}]]"
                yield (
                    f"committee.draw=fixed takes its members from committee.fixed, which is empty; type "
                    f"'committee.fixed={example}', or committee.draw=in_turn"
                )
            else:
                yield (
                    f"committee.fixed is read where committee.draw=fixed, and it is {self.draw}; type "
                    "committee.draw=fixed, or leave out committee.fixed"
                )
        for group in self.fixed:
            for name in group:
                if name not in self.members:
                    yield f"committee.fixed names {name}; the members are {', '.join(names)}"
            if len(group) != self.size or len(set(group)) != len(group):
                yield f"committee.fixed: {group} does not have committee.size={self.size} different members"


class PriorConfig(StrictConfig):
    """Where each member's prior performance comes from (specification of CV-DD, section 3)."""

    source: Literal["measured", "given"] = Field(description="measure by distilling with one member alone, or given")
    values: Numbers = Field({}, description="given priors in percent, by member name")
    observer: str = Field(description="member that labels for the measurement and whose network is its student")
    images_per_class: Positive = Field(10, description="IPC of the measurement")
    iterations: Positive = Field(4000, description="recover iterations of the measurement")
    epochs: Positive = Field(300, description="label and student epochs of the measurement")
    seeds: Positive = Field(1, description="students of the measurement; their mean counts")
    measured_on: Literal["train", "test"] = Field(
        "train", description="real images on which the measurement's student is tested; the paper takes test"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.source == "given") != bool(self.values):
            if self.values:
                raise ValueError(
                    "prior.values are read where prior.source=given, and it is measured; type prior.source=given, or "
                    "leave out prior.values"
                )
            raise ValueError(
                "prior.source=given takes a number for each member from prior.values, which is empty; type "
                f"'prior.values={{{self.observer}: PERCENT, ...}}', or prior=measured"
            )
        return self


class TemperatureConfig(StrictConfig):
    """Softmax temperatures of the prior-weighted averages."""

    vote: float = Field(gt=0, description="T of the vote on images; must be greater than 0")
    label: float = Field(gt=0, description="T of the average of several label teachers; must be greater than 0")
