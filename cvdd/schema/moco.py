"""Training of committee members without labels."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from cvdd.schema.types import ColourChanges, Positive, Range
from cvdd.support.config_base import CheckedConfig


class MocoConfig(CheckedConfig):
    """MoCo v2, which trains all of a member but its last layer to tell two views of an image from those of others."""

    epochs: Positive = Field(description="passes over the training data")
    batch_size: int = Field(ge=2, description="images per step; a last batch with fewer is left out")
    groups: Positive = Field(
        8,
        description="parts of a batch with BatchNorm statistics of their own, which keys are shuffled over, so that "
        "statistics do not tell which views belong together; ranks can share them",
    )
    lr: float = Field(gt=0, description="highest learning rate of SGD; a cosine brings it to 0, epoch by epoch")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(0.0001, ge=0, description="of SGD, on all parameters")
    dimension: Positive = Field(128, description="numbers of a view's representation")
    queue: Positive = Field(65536, description="representations of other images that a view is held against")
    key_momentum: float = Field(
        0.999, ge=0, lt=1, description="of the second network, whose parameters follow those of the trained one"
    )
    temperature: float = Field(0.2, gt=0, description="of the softmax over similarities")
    crop_scale: Range = Field((0.2, 1.0), description="area range of a view's crop")
    changes: ColourChanges = Field(
        (0.4, 0.4, 0.4, 0.1), description="largest change of a view's brightness, contrast, saturation and hue"
    )
    changed: float = Field(0.8, ge=0, le=1, description="share of views that are changed so")
    grey: float = Field(0.2, ge=0, le=1, description="share of views without colours")
    blurred: float = Field(0.5, ge=0, le=1, description="share of views that are blurred")

    def _problems(self) -> Iterator[str]:
        possible = [groups for groups in range(1, self.batch_size // 2 + 1) if self.batch_size % groups == 0]
        if self.groups not in possible:
            yield (
                f"recipe.moco.groups={self.groups} does not cut recipe.moco.batch_size={self.batch_size} into equal "
                f"parts of two images or more; set recipe.moco.groups to one of {', '.join(map(str, possible))}"
            )
        if not self.changed and not self.at_default("changes"):
            yield (
                "recipe.moco.changed=0 changes no view, so that nothing reads recipe.moco.changes; raise changed, or "
                "leave changes at [0.4,0.4,0.4,0.1]"
            )
        if self.changed and not any(self.changes):
            yield "recipe.moco.changes=[0,0,0,0] changes nothing; set recipe.moco.changed=0 in its place"
        if self.queue < self.batch_size:
            yield (
                f"recipe.moco.queue={self.queue} holds less than a batch; set it to at least recipe.moco.batch_size="
                f"{self.batch_size}"
            )
