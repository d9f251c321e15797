"""Soft labels."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cvdd.config_base import StrictConfig
from cvdd.schema.types import Positive, Range


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
