"""Trajectory matching in a configuration that runs in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import TINY, configure

from cvdd.artifact import Store
from cvdd.chain.context import Context

MTT = (
    "method=mtt",
    "dataset.image_size=12",
    "dataset.digits.size_range=[8,12]",
    "dataset.digits.crop_range=[12,48]",
    "dataset.jitter=0",
    "dataset.train_per_class=50",
    "method.iterations=6",
    "method.log_every=2",
    "method.grid_every=2",
    "method.checkpoint_every=2",
    "method.mtt.experts.backbone.arguments.depth=2",
    "method.mtt.experts.backbone.arguments.width=4",
    "+method.mtt.experts.backbone.arguments.pooled_size=2",
    "method.mtt.experts.count=2",
    "method.mtt.experts.epochs=4",
    "method.mtt.experts.batch_size=50",
    "method.mtt.experts.lr=0.05",
    "method.mtt.student.epochs=6",
    "method.mtt.whitening=true",
    "method.mtt.steps=3",
    "method.mtt.target_epochs=2",
    "method.mtt.start_epochs=2",
    "method.mtt.lr_images=10",
    "method.mtt.step_size=0.05",
)
"""A network of two narrow layers, two experts of four epochs, images of 12 pixels."""

_SURROUNDINGS = tuple(item for item in TINY if not item.startswith(("method.", "dataset.train_per_class")))
"""The tiny run without what is of the recover loop."""


def mtt_context(root: Path, *overrides: str, verb: str = "evaluate") -> Context:
    """Return the surroundings of a tiny run of trajectory matching."""
    torch.set_num_threads(1)
    config = configure(root, *_SURROUNDINGS, *MTT, *overrides, verb=verb)
    config.paths.output.mkdir(parents=True, exist_ok=True)
    return Context(config, Store(config.paths.store), torch.device("cpu"))
