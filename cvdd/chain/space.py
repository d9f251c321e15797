"""The space in which networks of prediction and trajectory matching see images: standardised, or ZCA-whitened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cvdd.artifact import Artifact
from cvdd.chain.context import Context
from cvdd.chain.training import evaluator_of
from cvdd.data import to_eval_tensor
from cvdd.schema.apm import ApmConfig
from cvdd.schema.mtt import MttConfig
from cvdd.support.config_base import ConfigError
from cvdd.synthesis.zca import InputSpace, Whitening, fit_whitening
from cvdd.training.classifier import Measure
from cvdd.training.measure import Accuracy

WHITENING = "whitening.safetensors"


def _settings_of(context: Context) -> tuple[str, ApmConfig | MttConfig]:
    """The section of the method's own engine, which the caller knows to be there, and what it says."""
    own = context.config.method.own
    assert own is not None
    section, settings = own
    return f"method.{section}", settings


def families_of(context: Context) -> tuple[str, ...]:
    """Families of DSA: those of the settings, and flip where a mirrored image still shows its class."""
    _, settings = _settings_of(context)
    return (*settings.augmentations, *(("flip",) if context.config.method.flip else ()))


def whitening_of(context: Context) -> Artifact | None:
    """Return the ZCA whitening of the training images, or None if they are only standardised.

    Raises:
        ConfigError: the images cannot be whitened; see :func:`cvdd.synthesis.zca.fit_whitening`.
    """
    section, settings = _settings_of(context)
    if not settings.whitening:
        return None
    data, eps = context.data(), settings.whitening_eps
    if not data.train.in_memory:
        raise ConfigError(
            f"{section}.whitening=true: the covariance of images of {data.image_size} pixels of dataset {data.name}, "
            f"which does not fit memory, is out of reach; set {section}.whitening=false"
        )
    identity = {"train": data.identity["train"], "image_size": data.image_size, "eps": eps}

    def build(work: Path) -> dict[str, Any]:
        whitening = fit_whitening(training_pixels(context), eps, section)
        whitening.save(work / WHITENING)
        return {"dimensions": len(whitening.mean), "largest": float(whitening.values.max())}

    return context.store.make("whitenings", data.name, identity, [], build)


def input_space(context: Context, whitening: Artifact | None) -> InputSpace:
    """Return the map from pixels to what networks see, on the device."""
    data = context.data()
    fitted = None if whitening is None else Whitening.load(whitening.path / WHITENING)
    return InputSpace(data.mean, data.std, fitted).to(context.device)


def training_pixels(context: Context) -> Tensor:
    """Return all training images [n, 3, size, size] uint8."""
    data = context.data()
    pixels: Tensor = to_eval_tensor(data.train, data.image_size, None, torch.arange(len(data.train)))
    return pixels


def measured_in(context: Context, space: InputSpace, part: Literal["test", "train"] = "test") -> Measure:
    """Return a function from a network that sees images of a space to its accuracy on real images."""
    evaluator = evaluator_of(context, part)

    def measure(network: nn.Module) -> Accuracy:
        return evaluator(nn.Sequential(space, network).train(network.training))

    return measure
