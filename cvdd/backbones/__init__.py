"""Networks: committee members, teachers and students."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cvdd.support.lazy import exports

if TYPE_CHECKING:
    from cvdd.backbones.batchnorm import batchnorm_layers, has_batchnorm
    from cvdd.backbones.build import build_network, weights_chosen_by_timm
    from cvdd.backbones.config import BackboneConfig
    from cvdd.backbones.published import PublishedReport, load_published
else:
    __getattr__ = exports(
        __name__,
        {
            "BackboneConfig": "cvdd.backbones.config",
            "batchnorm_layers": "cvdd.backbones.batchnorm",
            "build_network": "cvdd.backbones.build",
            "has_batchnorm": "cvdd.backbones.batchnorm",
            "load_published": "cvdd.backbones.published",
            "PublishedReport": "cvdd.backbones.published",
            "weights_chosen_by_timm": "cvdd.backbones.build",
        },
    )

__all__ = [
    "BackboneConfig",
    "PublishedReport",
    "batchnorm_layers",
    "build_network",
    "has_batchnorm",
    "load_published",
    "weights_chosen_by_timm",
]
