"""From a backbone config to a network with the right head."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from cvdd.backbones.config import BackboneConfig, check_target
from cvdd.backbones.heads import IMAGENET_CLASSES, replace_heads
from cvdd.support.config_base import ConfigError
from cvdd.support.seeds import derive_seed

TIMM_FACTORY = "timm.create_model"


def build_network(config: BackboneConfig, num_classes: int, seed: int) -> nn.Module:
    """Build the network of ``config`` on the CPU, in training mode, and leave every global random generator as it was.

    Args:
        config: the backbone.
        num_classes: outputs of the head. A pretrained network keeps its own head where this is 1000 and gets a fresh
            one otherwise.
        seed: of the run; the initialisation depends on it and on ``config.name`` alone.

    Returns:
        A module from ``[B, 3, H, W]`` images to ``[B, num_classes]`` logits.

    Raises:
        ConfigError: unknown target or model, arguments the builder refuses, pretrained weights that do not exist or
            cannot be fetched.
    """
    if num_classes < 1:
        raise ConfigError(f"dataset has {num_classes} classes; a network needs at least 1")
    builder = _find_builder(config)
    arguments = dict(config.arguments)
    if config.pretrained:
        arguments |= _pretrained_arguments(config)
    with _initialisation_seed(derive_seed(seed, "backbone", config.name)):
        if config.pretrained and config.target.startswith("torchvision."):
            network = _call(builder, config, {**arguments, "num_classes": IMAGENET_CLASSES})
            if num_classes != IMAGENET_CLASSES:
                replace_heads(network, num_classes)
        else:
            network = _call(builder, config, {**arguments, "num_classes": num_classes})
    return network


@contextmanager
def _initialisation_seed(seed: int) -> Iterator[None]:
    """Seed the CPU's default generator for a while; ``torch.manual_seed`` would reseed the accelerators as well."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _find_builder(config: BackboneConfig) -> Callable[..., Any]:
    """Import the builder that ``config.target`` names."""
    module_name, _, attribute = check_target(config.target).rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"backbone.target={config.target}: there is no module {error.name}") from error
    builder: Callable[..., Any] | None = getattr(module, attribute, None)
    if builder is None or not callable(builder):
        raise ConfigError(
            f"backbone.target={config.target}: {module_name} has no builder {attribute}"
            f"{_closest(attribute, dir(module))}"
        )
    if config.target == TIMM_FACTORY:
        _check_timm_model(config)
    return builder


def _check_timm_model(config: BackboneConfig) -> None:
    """Refuse a missing or unknown timm model name before timm does so less helpfully."""
    model_name = str(config.arguments.get("model_name", "???"))
    if model_name == "???":
        raise ConfigError("backbone.arguments.model_name is missing; give it the name of a timm model, e.g. resnet18")
    # "model.tag" selects weights; only the part before the dot is the architecture.
    if not timm.is_model(model_name):
        names = timm.list_models()
        raise ConfigError(
            f"backbone.arguments.model_name={model_name} is no timm model"
            f"{_closest(model_name, names)}; timm.list_models() knows {len(names)}"
        )


def _closest(name: str, known: Iterable[str]) -> str:
    """Return a phrase with the known names most like ``name``, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; closest: {', '.join(matches)}" if matches else ""


def _pretrained_arguments(config: BackboneConfig) -> dict[str, Any]:
    """Return the builder's argument that asks for ImageNet weights."""
    if config.target.startswith("timm."):
        return {"pretrained": True}
    if not config.target.startswith("torchvision.models."):
        raise ConfigError(
            f"backbone.pretrained=true: {config.target} comes without weights; "
            "valid for targets under timm and torchvision.models"
        )
    if "weights" in config.arguments:
        return {}
    try:
        weights = torchvision.models.get_model_weights(config.target.rpartition(".")[2])
    except ValueError as error:
        raise ConfigError(f"backbone.pretrained=true: torchvision has no weights for {config.target}") from error
    # V1 is what the published ImageNet-1K committee votes with; a few newer networks only have later weights.
    return {"weights": getattr(weights, "IMAGENET1K_V1", weights.DEFAULT)}


def weights_chosen_by_timm(config: BackboneConfig) -> str | None:
    """Name the pretrained weights that this version of timm takes where the model's name leaves it to timm.

    Another version may take others, so what is made of them needs this in its identity.
    """
    model_name = str(config.arguments.get("model_name", ""))
    if not config.pretrained or config.target != TIMM_FACTORY or "." in model_name:
        return None
    found = timm.get_pretrained_cfg(model_name)
    return None if found is None else str(found.tag)


def _call(builder: Callable[..., Any], config: BackboneConfig, arguments: dict[str, Any]) -> nn.Module:
    """Call the builder and turn what it complains about into a message that names the override."""
    try:
        network = builder(**arguments)
    except ConfigError:
        raise
    except OSError as error:
        if not config.pretrained:
            raise
        raise ConfigError(
            f"backbone.pretrained=true: the weights of {config.name} could not be fetched ({error}); without a network "
            "put them into the cache of torch.hub or of Hugging Face beforehand, or set backbone.pretrained=false"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backbone.arguments={config.arguments}: {config.target} refuses them: {error}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"backbone.target={config.target} made a {type(network).__name__}, not a torch.nn.Module")
    return network
