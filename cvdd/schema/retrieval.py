"""Real images that are chosen anew after every stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from cvdd.schema.types import Positive
from cvdd.support.config_base import StrictConfig

if TYPE_CHECKING:
    from cvdd.schema.method import MethodConfig


class RetrievalConfig(StrictConfig):
    """After each stage an image gets back the real one of its class that fits it (RETA, arXiv 2602.24144)."""

    candidates: Positive | None = Field(
        300, description="real images of each class that are looked at, random ones; null is all"
    )
    shared: bool = Field(
        True,
        description="all images of a class choose among the same candidates, as in the paper; false: each slot has its "
        "own, so that no two images of a class get back the same one",
    )
    complexity: float = Field(
        0.1, ge=0, le=1, description="lambda: weight of how complex a real image is, beside how far its features are"
    )
    sigma: float = Field(
        1.0, gt=0, description="of the Gaussian that smooths an image before its complexity is measured, in pixels"
    )


def retrieval_problems(method: MethodConfig) -> Iterator[str]:
    """Yield what does not agree between a method and the real images that it chooses anew."""
    if method.retrieval is None or not method.iterations:
        # Where nothing is optimised, nothing of the loop is read; images may stand so beside those of any method.
        return
    if method.residual == 1:
        yield (
            "method.retrieval chooses what is blended in after a stage, and method.residual=1 blends nothing in; set "
            "method.residual below 1, or method.retrieval=null"
        )
    if method.factor > 1:
        yield (
            f"method.retrieval chooses whole real images, and with method.factor={method.factor} an image is made of "
            "several; set method.factor=1, or method.retrieval=null"
        )
    config = method.retrieval
    if config.complexity == 0 and not config.at_default("sigma"):
        yield (
            f"method.retrieval.sigma={config.sigma} is of method.retrieval.complexity, which is 0; set "
            "method.retrieval.sigma=1.0, or a complexity above 0"
        )
