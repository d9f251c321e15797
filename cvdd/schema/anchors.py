"""Real images whose features the parts of an image are to have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cvdd.support.config_base import StrictConfig

if TYPE_CHECKING:
    from cvdd.schema.method import MethodConfig

HEAD = "head"
"""Of a network, its last linear layer."""

RANKED = ("easiest", "medium")
"""Initial images that are chosen by how well ``patches.observer`` tells them."""

BEGINNINGS = ("real", *RANKED)
"""Initial images of which it is known which real ones they are made of."""


class AnchorsConfig(StrictConfig):
    """Each part of an image is to have the features of the whole real image that it was made of (CIM)."""

    weight: float = Field(1.0, gt=0, description="of each member's distance of features, beside method.ce and r_bn")
    layer: str = Field(
        HEAD,
        min_length=1,
        description="features are what goes into it: head, a network's last linear layer, or the name of a module that "
        "all voters have, such as layer3, for which judgements are not compiled",
    )
    distance: Literal["l1", "l2"] = Field(
        "l1", description="mean absolute difference of the features, as released, or mean squared, as in the paper"
    )


def anchors_problems(method: MethodConfig) -> Iterator[str]:
    """Yield what does not agree between a method and its anchors."""
    if method.anchors is None or not method.iterations:
        # Where nothing is optimised, nothing of the loop is read; images may stand so beside those of any method.
        return
    if method.factor == 1:
        yield (
            "method.anchors are whole real images that parts of an image are made of, and with method.factor=1 an "
            "image is one; set method.factor=2, or method.anchors=null"
        )
    if method.init not in BEGINNINGS:
        yield (
            f"method.anchors are the real images that an image is made of, and of method.init={method.init} they are "
            "not known; set method.init=real, easiest or medium, or method.anchors=null"
        )
    if method.sizes is not None:
        yield "method.anchors have the size of the data set, and method.sizes others; set method.sizes=null"
