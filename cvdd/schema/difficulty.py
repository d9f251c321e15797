"""Groups of real images by difficulty, one for each IPC slot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cvdd.schema.types import whole_part
from cvdd.support.config_base import StrictConfig

if TYPE_CHECKING:
    from cvdd.schema.method import MethodConfig


class DifficultyConfig(StrictConfig):
    """Groups of real images by difficulty, one for each IPC slot (PSM, arXiv 2609.34299)."""

    variance_weight: float = Field(
        1.0, ge=0, description="beta: weight of the variances in the distance by which images are ranked"
    )
    forward_share: float = Field(
        0.9,
        ge=0,
        le=1,
        description="share of recipe.epochs for which members are shown a slot's group, so that their running "
        "statistics are its own; 0 leaves them as they are",
    )
    start: Literal["front", "middle", "back", "random"] = Field(
        "back", description="for init=difficulty: the easiest image of the group, that in the middle, the hardest, any"
    )

    def epochs(self, of_training: int) -> int:
        """Passes of a member over a group, at least one unless there are none.

        Args:
            of_training: epochs for which members are trained.
        """
        return max(whole_part(self.forward_share, of_training), 1) if self.forward_share else 0


def difficulty_problems(method: MethodConfig) -> Iterator[str]:
    """Yield what does not agree between a method and its groups by difficulty."""
    config = method.difficulty
    if config is None:
        if method.init == "difficulty":
            yield (
                "method.init=difficulty chooses from the groups of method.difficulty, which is null; set "
                "'method.difficulty={start: back}', or another method.init"
            )
        return
    chooses = method.init == "difficulty"
    if not method.iterations:
        # Where nothing is optimised, nothing of the loop is read; images may stand so beside those of any method.
        return
    if not chooses and not config.forward_share:
        yield (
            "method.difficulty is for method.init=difficulty, or for the statistics of groups, and "
            "method.difficulty.forward_share=0; set method.difficulty=null, or one of these"
        )
    if not chooses and not config.at_default("start"):
        yield (
            f"method.difficulty.start={config.start} is of method.init=difficulty, and method.init={method.init}; set "
            "method.difficulty.start=back, or method.init=difficulty"
        )
    if method.grades is None:
        return
    if method.composer != "slots":
        yield (
            f"method.difficulty has a group for each slot, and method.composer={method.composer} optimises slots "
            "together; set method.composer=slots, or method.difficulty=null"
        )
    if method.statistics.recorded:
        yield (
            "method.statistics is of all real images, and method.difficulty of a group of them; set "
            "method.statistics.layers=bn method.statistics.class_share=0, or method.difficulty.forward_share=0"
        )
