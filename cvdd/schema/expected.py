"""What somebody published for a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from cvdd.support.config_base import CheckedConfig


class ExpectedConfig(CheckedConfig):
    """A published number that the first row is held against; null where there is none.

    The papers give no spread. What is known of it: re-measurements of this family by others spread by up to 1.3 points
    over seeds, and the paper's own versions of one cell differ by 1.3 points at one image per class and by 0.8 at ten
    (field survey, sections 1.2 and 2.2). Hence the tolerance of the recipes: 3 points at one image per class, 1.5 at
    more.
    """

    source: str = Field(min_length=1, description="whose number it is: a paper or a repository")
    table: str = Field(min_length=1, description="table of the source")
    cell: str = Field(min_length=1, description="row and column of the table")
    student: str = Field(description="network that was measured; one of students")
    value: float | None = Field(ge=0, le=100, description="top-1 accuracy in percent; null where none can be read")
    tolerance: float | None = Field(gt=0, description="points that a reproduction may differ by; null without a value")
    epoch: Literal["best", "last"] = Field(
        "best", description="which of a student's measurements is compared; the releases report the best one"
    )
    note: str = Field("", description="what to know about the number")

    def _problems(self) -> Iterator[str]:
        if (self.value is None) != (self.tolerance is None):
            yield "expected.tolerance is a number exactly when expected.value is one"
        if self.value is None and not self.note:
            yield "expected.value=null needs expected.note to say why there is no number"
