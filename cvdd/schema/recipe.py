"""Training of committee members."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from cvdd.schema.batch_checks import parts_problems
from cvdd.schema.moco import MocoConfig
from cvdd.schema.types import Positive, Range
from cvdd.schema.unread import unread_fields
from cvdd.support.config_base import CheckedConfig


class RecipeConfig(CheckedConfig):
    """How a committee member is trained on the real data."""

    name: str = Field(description="name of the recipe, shown in manifests")
    epochs: Positive = Field(description="passes over the training data")
    batch_size: int = Field(ge=2, description="images per step")
    accumulation: Positive = Field(
        1, description="parts of a batch, each with BatchNorm statistics of its own; ranks can share them"
    )
    optimizer: Literal["adam", "adamw", "sgd", "muon"] = Field(
        description="adam couples weight decay, adamw does not; muon makes the steps of matrices orthogonal, at the "
        "size of adamw's"
    )
    lr: float = Field(gt=0, description="highest learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd, and of muon's matrices")
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
    moco: MocoConfig | None = Field(
        None,
        description="train all but the last layer without labels first, and with everything above that layer alone "
        "(linear probe), the rest of the network as in evaluation; null trains everything with labels",
    )

    def _problems(self) -> Iterator[str]:
        yield from parts_problems(self.accumulation, "recipe", self.batch_size, "recipe")
        yield from unread_fields(self, "recipe")
        if self.nesterov and self.optimizer == "sgd" and not self.momentum:
            yield (
                "recipe.nesterov=true looks ahead along recipe.momentum, which is 0; set recipe.momentum above 0, or "
                "recipe.nesterov=false"
            )
