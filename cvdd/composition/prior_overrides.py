"""What a run is while a prior is measured, whatever else makes and labels the images."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from cvdd.schema import MethodConfig, RunConfig, StatisticsConfig
from cvdd.schema.method import OWN_SECTIONS

PLAIN: Mapping[str, Any] = MappingProxyType(
    {
        "method.init": "patches",
        "method.given": None,
        "method.factor": 1,
        "method.composer": "slots",
        "method.slots_per_unit": None,
        "method.voters": "drawn",
        "method.turns": "all",
        "method.stages": 1,
        "method.sizes": None,
        "method.residual": 1.0,
        "method.early_late": False,
        "method.statistics_of": "unit",
        "method.statistics": StatisticsConfig().model_dump(),
        "method.difficulty": None,
        "method.anchors": None,
        "method.retrieval": None,
        "method.schedule": "cosine",
        "method.density": 0.0,
        "method.density_scale": "none",
        "method.crop_schedule": "constant",
        "method.crop_milestone": 1.0,
        "method.pad": 0,
        "method.cutout": 0.0,
        **{f"method.{section}": None for section in OWN_SECTIONS},
        "label.bn_mode": "batch",
        "label.halves": True,
        "label.factor": 1,
        "label.shuffle": 1,
        "label.randaugment": False,
        "label.dsa": False,
        "label.mix": "cutmix",
        "label.mix_alpha": 1.0,
        "label.store": "none",
        "label.given": None,
        "label.keep": 1.0,
        "label.top": None,
        "label.rest": "mean",
        "protocol.student": "protocol",
        "protocol.loss": "kl",
        "protocol.hard_label_weight": 0.0,
        "protocol.hard_share": 0.0,
        "protocol.repeat_labels": False,
        "protocol.label_smoothing": 0.0,
        "protocol.temperature_factor": 1.0,
        "protocol.temperature_epochs": 30,
        "protocol.temperature_least": 2.0,
        "protocol.student_temperature": "teachers",
    }
)
"""Of a prior's measurement: the recover loop from patches, labels with the statistics of half-batches, and KL, whatever
else makes and labels the images (specification of CV-DD, section 3). Strengths and rates stay."""


def prior_overrides(config: RunConfig, member: str) -> dict[str, Any]:
    """Return the overrides by which the measurement of a member's prior differs from a run.

    Args:
        config: of the run.
        member: who makes the images alone.
    """
    prior = config.prior
    overrides: dict[str, Any] = {
        "committee.size": 1,
        "committee.draw": "fixed",
        "committee.fixed": [[member]],
        "committee.voter": "equal",
        "method.name": f"prior-{member}",
        "method.iterations": prior.iterations,
        "ipc.images_per_class": prior.images_per_class,
        "patches.images_per_class": max(prior.images_per_class, config.patches.images_per_class),
        "label.teachers": [prior.observer],
        "label.epochs": prior.epochs,
        "protocol.epochs": prior.epochs,
        "protocol.eval_every": prior.epochs,
        "method.classes_per_unit": config.dataset.classes_per_unit,
        **PLAIN,
        "compare": {},
    }
    if config.method.anchors is not None:
        # Its terms and its rate are of features, and priors are measured without them.
        overrides |= {
            f"method.{name}": MethodConfig.model_fields[name].default for name in ("ce", "r_bn", "lr", "betas")
        }
    if config.method.crop_scale is None:
        overrides["method.crop_scale"] = MethodConfig.model_fields["crop_scale"].default
        # Where images are padded instead, whether they are mirrored is of that.
        overrides["method.flip"] = config.dataset.mirror
    return overrides
