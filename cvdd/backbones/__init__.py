"""Networks: committee members, teachers and students."""

from __future__ import annotations

from cvdd.backbones.batchnorm import batchnorm_layers, has_batchnorm
from cvdd.backbones.build import build_network
from cvdd.backbones.config import BackboneConfig
from cvdd.backbones.published import PUBLISHED_NAMES, PublishedReport, find_published, load_published

__all__ = [
    "PUBLISHED_NAMES",
    "BackboneConfig",
    "PublishedReport",
    "batchnorm_layers",
    "build_network",
    "find_published",
    "has_batchnorm",
    "load_published",
]
