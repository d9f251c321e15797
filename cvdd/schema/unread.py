"""Settings that nothing would read, because of another setting or of an engine of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

_TRAINED: Mapping[str, Sequence[str]] = MappingProxyType({"student": ("protocol",)})

READ_WHERE: Mapping[str, Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "recipe.momentum": {"optimizer": ("sgd", "muon")},
        "recipe.nesterov": {"optimizer": ("sgd",)},
        "recipe.cosine_period": {"schedule": ("cosine",)},
        "recipe.pad": {"crop": ("pad",)},
        "recipe.crop_scale": {"crop": ("resized",)},
        "protocol.temperature": {**_TRAINED, "loss": ("kl",)},
        "protocol.temperature_factor": {**_TRAINED, "loss": ("kl",)},
        "protocol.student_temperature": {**_TRAINED, "loss": ("kl",)},
        "protocol.temperature_squared": {**_TRAINED, "loss": ("kl",)},
        "protocol.hard_label_weight": {**_TRAINED, "loss": ("mse", "gift")},
        "protocol.hard_share": _TRAINED,
        "protocol.repeat_labels": _TRAINED,
        "protocol.label_smoothing": _TRAINED,
        "protocol.optimizer": _TRAINED,
        "protocol.betas": {**_TRAINED, "optimizer": ("adamw", "muon")},
        "protocol.momentum": {**_TRAINED, "optimizer": ("sgd", "muon")},
        "protocol.weight_decay": _TRAINED,
        "protocol.decay": _TRAINED,
        "protocol.schedule": _TRAINED,
        "protocol.eta": {**_TRAINED, "schedule": ("cosine", "linear", "early_late")},
        "protocol.warmup": _TRAINED,
        "protocol.ema": _TRAINED,
        "protocol.accumulation": _TRAINED,
        "protocol.part_weights": _TRAINED,
        "label.halves": {"bn_mode": ("batch",)},
        "label.dropout": {"bn_mode": ("batch",)},
        "label.mix_alpha": {"mix": ("cutmix", "mixup")},
    }
)
"""Fields that are read only where others of their section, the switches, have one of these values.

Whether the measurement of priors would read them, with switches of its own (:mod:`cvdd.composition.prior_overrides`),
does not count. Fields that it reads whatever the run does, as it labels even where ``label.teachers=none``, are not
among them.
"""

SHARED = frozenset(
    {
        "name",
        "seed",
        "init",
        "iterations",
        "flip",
        "jitter",
        "classes_per_unit",
        "log_every",
        "grid_every",
        "checkpoint_every",
    }
)
"""Fields of the method that every engine reads, or that a data set's own file sets for all methods."""


def unread_settings(method: BaseModel, section: str, what: str, inits: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the settings around an engine's section: those of the recover loop would be ignored.

    Args:
        method: the whole method's configuration, in which the section is not null.
        section: of the engine, e.g. ``apm``.
        what: the engine does, for messages.
        inits: initial images that it starts from.
    """
    init = getattr(method, "init", None)
    if init not in inits:
        yield f"method.init={init}: {what} starts from {', '.join(inits[:-1])} or {inits[-1]}"
    for name, field in type(method).model_fields.items():
        default = field.get_default(call_default_factory=True)
        if name != section and name not in SHARED and getattr(method, name) != default:
            yield (
                f"method.{name} is of the recover loop, which {what} (method.{section}) replaces; leave it at "
                f"{as_typed(default)}"
            )


def unread_fields(config: BaseModel, section: str, harmless: Sequence[str] = ()) -> Iterator[str]:
    """Yield which fields of a section differ from their defaults though nothing would read them.

    Args:
        config: the section.
        section: its name, e.g. ``recipe``.
        harmless: fields that may differ all the same.
    """
    for key, switches in READ_WHERE.items():
        own, _, name = key.partition(".")
        if own != section or name in harmless:
            continue
        value, default = getattr(config, name), type(config).model_fields[name].default
        unmet = [(switch, values) for switch, values in switches.items() if getattr(config, switch) not in values]
        if value != default and unmet:
            switch, values = unmet[0]
            yield (
                f"{key}={as_typed(value)} is of {section}.{switch}={' or '.join(values)}, and {section}.{switch}="
                f"{getattr(config, switch)}; set {key}={as_typed(default)}, or {section}.{switch}={values[0]}"
            )


def without_unread(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a section without those that the others leave unread, which earlier versions allowed.

    Args:
        section: its name, e.g. ``label``.
        settings: values by field, the switches among them.
    """
    unread = {
        key.partition(".")[2]
        for key, switches in READ_WHERE.items()
        if key.startswith(f"{section}.") and any(settings.get(name) not in values for name, values in switches.items())
    }
    return {name: value for name, value in settings.items() if name not in unread}


def as_typed(value: Any) -> str:
    """Write a value of a field as an override has it."""
    # A section is written as people read it, and typed field by field.
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
