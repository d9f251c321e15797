"""Soft labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from cvdd.schema.types import Name, Positive, Range, Share
from cvdd.schema.unread import unread_fields
from cvdd.support.config_base import CheckedConfig


class LabelConfig(CheckedConfig):
    """Soft labels: which view of which image, scored by whom."""

    name: Name = Field(description="name of the label recipe, shown in results")
    teachers: Literal["committee", "none"] | list[str] = Field(
        description="all members, a list of member names, or none: students learn the images' own classes"
    )
    weights: Literal["prior", "equal", "balanced"] = Field(
        description="average of several teachers' logits: softmax(prior/T), equal, or equal after their logits of a "
        "batch were brought to the same norm (G-VBSM)"
    )
    bn_mode: Literal["batch", "running"] = Field(description="batch: statistics of the labelled batch itself (BSSL)")
    halves: bool = Field(True, description="split each batch in two halves with statistics of their own")
    dropout: bool = Field(False, description="keep the teachers' dropout active, as the release does; labels get noisy")
    epochs: Positive = Field(description="epochs that are labelled")
    batch_size: int = Field(ge=2, description="images per batch")
    factor: Literal[1, 2] = Field(
        1, description="2: images are made of four, and a view is a crop of one of them, drawn anew in each epoch (CIM)"
    )
    crop_scale: Range = Field((0.08, 1.0), description="area range of the crop; with factor=2 of one of the four")
    flip: bool = Field(True, description="random horizontal flip")
    shuffle: Literal[1, 2] = Field(
        1, description="2: swap the halves of each image at random, on both axes, before the crop (RDED); 1: leave them"
    )
    randaugment: bool = Field(
        False,
        description="two random operations of RandAugment, before all else (EDC); with factor=2 on the one of the four "
        "that is shown",
    )
    dsa: bool = Field(
        False,
        description="after crop and flip other colours, one of a shift, a stretch and a rotation, and a square cut out "
        "(DSA as IDC and CIM have it)",
    )
    mix: Literal["cutmix", "mixup", "none"] = Field("cutmix", description="how a batch is mixed with itself")
    mix_alpha: float = Field(1.0, gt=0, description="of the Beta distribution of the mix")
    dtype: Literal["float16", "float32"] = Field("float16", description="of the stored logits")
    store: Literal["logits", "none"] = Field("logits", description="none computes the same labels on the fly")
    parameters: Literal["stored", "seed"] = Field("stored", description="store crops and mixes, or redraw them")
    keep: Share = Field(
        1.0, description="share of the label batches that is stored; epochs then draw from it with replacement (LPLD)"
    )
    top: Positive | None = Field(None, description="logits of each label that are kept, the largest; null is all")
    rest: Literal["mean", "nothing"] = Field(
        "mean",
        description="what label.top leaves out: the mean of these logits, or nothing, so that these classes have a "
        "probability of 0 (LPQLD)",
    )
    stack: Positive = Field(32, description="batches that share a forward pass")
    given: Path | None = Field(
        None,
        description="labels that are there: store/labels/NAME-HASH, or a folder of the published programs' records; "
        "for label=given, which reads all other fields from them",
    )

    @property
    def hard(self) -> bool:
        """Whether students learn the images' own classes."""
        return self.teachers == "none" and self.given is None

    def _problems(self) -> Iterator[str]:
        if self.halves and self.bn_mode == "batch" and self.batch_size < 4:
            yield f"label.batch_size={self.batch_size} with label.halves=true leaves halves of one image"
        # label=hard says that there are no halves, which is part of what its students are.
        yield from unread_fields(self, "label", ("halves", "dropout") if self.teachers == "none" else ())
        if self.factor > 1 and self.shuffle > 1:
            yield (
                f"label.shuffle={self.shuffle} swaps the parts of which label.factor={self.factor} shows one; set "
                "label.shuffle=1, or method.factor=1"
            )
        if self.teachers == []:
            yield "label.teachers is empty: name members, or choose committee for all, or none for hard labels"
        if self.given is not None and (self.teachers != "none" or self.store != "none"):
            yield (
                f"label.given={self.given} brings labels, and label.teachers={self.teachers} with label.store="
                f"{self.store} would make some; choose label=given, or label.given=null"
            )
        if self.hard and self.store != "none":
            yield "label.teachers=none gives hard labels, of which there is nothing to store; set label.store=none"
        if self.hard and self.top is not None:
            yield f"label.top={self.top} is of teachers, and label.teachers=none; set label.top=null"
        if self.top is None and self.rest != "mean":
            yield f"label.rest={self.rest} is of label.top, which is null; set label.rest=mean, or a label.top"
        if self.hard and self.dropout:
            yield "label.dropout=true is of teachers, and label.teachers=none; set label.dropout=false"
        if self.keep < 1 and self.store != "logits" and self.given is None:
            yield f"label.keep={self.keep} reads stored batches out of order; set label.store=logits, or label.keep=1"
