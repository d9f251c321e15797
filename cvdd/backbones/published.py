"""Reading trained networks: of the published CV-DD release (``offline_models/<dataset>/<Name>.pth``), or of a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cvdd.backbones.heads import find_head
from cvdd.support.config_base import ConfigError
from cvdd.support.unpickling import load_without_code

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class PublishedReport:
    """What :func:`load_published` did.

    Attributes:
        path: the file.
        mapping: ``names`` where every tensor was found under its own name, ``order`` where names differ and tensors
            were paired by position. Position cannot tell two equally shaped branches apart, so measure the accuracy.
        tensors: how many tensors were loaded, BatchNorm's batch counters excepted.
        num_classes: outputs of the head.
    """

    path: Path
    mapping: Literal["names", "order"]
    tensors: int
    num_classes: int


def load_published(path: str | Path, network: nn.Module) -> PublishedReport:
    """Load a network of the release into ``network``, all of it or nothing.

    Args:
        path: a ``.pth`` file: a state dict, plain or under ``state_dict``, with or without a wrapper's prefixes; or a
            ``.safetensors`` file of one, such as a store's members have.
        network: the matching architecture with the right number of classes; modified in place.

    Raises:
        ConfigError: the file is missing or damaged, holds other things than tensors, has another number of classes or
            another architecture; the message names the file and the first tensor that does not fit.
    """
    path = Path(path)
    stored = _state_dict(_read(path), path)
    expected = network.state_dict()
    _check_classes(path, stored, network)
    if _without_counters(stored).keys() == _without_counters(expected).keys():
        mapping: Literal["names", "order"] = "names"
        names = {name: name for name in _without_counters(expected)}
    else:
        mapping = "order"
        names = _pair_by_order(path, stored, expected)
    for name, stored_name in names.items():
        _check_tensor(path, name, expected[name], stored_name, stored[stored_name])
    # Old files have no batch counters; they do not influence evaluation, so the network's own ones may stay.
    counters = {name: stored.get(name, value) for name, value in expected.items() if name.endswith(_COUNTER)}
    network.load_state_dict({**{name: stored[stored_name] for name, stored_name in names.items()}, **counters})
    head = find_head(network)
    return PublishedReport(path, mapping, len(names), head[1].out_features if head else 0)


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return load_without_code(path, " or not a plain state dict")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: damaged, truncated or no safetensors file: {error}") from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Unwrap the file's content down to a flat dict of tensors without wrapper prefixes."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not a state dict")
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{path}: entry {name} is a {type(value).__name__}, not a tensor")
        tensors[_without_prefixes(str(name))] = value
    return tensors


def _without_prefixes(name: str) -> str:
    """Drop what data-parallel and compiled wrappers put before a name, in any order and number."""
    while True:
        stripped = name
        for prefix in _WRAPPER_PREFIXES:
            stripped = stripped.removeprefix(prefix)
        if stripped == name:
            return name
        name = stripped


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith(_COUNTER)}


def _check_classes(path: Path, stored: Mapping[str, Tensor], network: nn.Module) -> None:
    """Refuse a head with another number of outputs: the most likely mistake deserves its own message."""
    head = find_head(network)
    if head is None:
        return
    weights = [value for name, value in stored.items() if name.endswith("weight") and value.dim() == 2]
    stored_weight = stored.get(f"{head[0]}.weight", weights[-1] if weights else None)
    if stored_weight is None or stored_weight.dim() != 2:
        return
    classes, features = stored_weight.shape
    if features == head[1].in_features and classes != head[1].out_features:
        raise ConfigError(
            f"{path}: this network has {classes} classes and the dataset has {head[1].out_features}; "
            f"choose the file of this dataset or a dataset with {classes} classes"
        )


def _pair_by_order(path: Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Pair our names with the file's by position; the caller verifies every pair."""
    ours, theirs = _without_counters(expected), _without_counters(stored)
    for (name, tensor), (stored_name, stored_tensor) in zip(ours.items(), theirs.items(), strict=False):
        _check_tensor(path, name, tensor, stored_name, stored_tensor)
    if len(ours) != len(theirs):
        surplus = [*theirs][len(ours) :] or [*ours][len(theirs) :]
        where = "the file" if len(theirs) > len(ours) else "the network"
        raise ConfigError(
            f"{path}: another architecture: {len(theirs)} tensors and the network has {len(ours)}; "
            f"the first without a counterpart is {surplus[0]} of {where}"
        )
    return dict(zip(ours, theirs, strict=True))


def _check_tensor(path: Path, name: str, expected: Tensor, stored_name: str, stored: Tensor) -> None:
    """Refuse a pair whose role or shape differs, or values that no trained network has."""
    role, stored_role = name.rpartition(".")[2], stored_name.rpartition(".")[2]
    if role != stored_role or expected.shape != stored.shape:
        raise ConfigError(
            f"{path}: another architecture: {stored_name} {tuple(stored.shape)} stands where the network has "
            f"{name} {tuple(expected.shape)}"
        )
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        raise ConfigError(f"{path}: {stored_name} holds values that are not finite; the network cannot be used")
    if role == "running_var" and bool((stored < 0).any()):
        raise ConfigError(f"{path}: {stored_name} holds negative variances; the network cannot be used")
