"""How students are trained and measured."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cvdd.config_base import StrictConfig
from cvdd.schema.types import Pair, Positive


class ProtocolConfig(StrictConfig):
    """How a student is trained on the distilled set and measured."""

    name: str = Field(description="name of the protocol, shown beside every number")
    epochs: Positive = Field(description="epochs over the distilled set; at most label.epochs")
    lr: float = Field(gt=0, description="of AdamW")
    eta: float = Field(1.0, gt=0, description="stretch of the cosine: 1 ends at 0, 2 ends at half the rate")
    weight_decay: float = Field(0.01, ge=0, description="on weights with two or more axes")
    betas: Pair = Field((0.9, 0.999), description="of AdamW")
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
