"""Files of units: the images that every method makes, in the form that people, labels and students read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cvdd.artifact import Artifact
from cvdd.artifact.tensor_files import save_tensors
from cvdd.synthesis.units import Unit

UNITS = "units"

PATCHES = "patches.safetensors"
"""Of initial images, whatever they are: [classes, images, 3, size, size] uint8, called ``images``."""


def write_unit(
    folder: Path, unit: Unit, pixels: Tensor, rows: Sequence[Mapping[str, Any]], weights: Mapping[str, float]
) -> None:
    """Write a unit's images, its classes and its history, atomically.

    Args:
        folder: of all units.
        unit: what the images are.
        pixels: [images, 3, size, size] uint8.
        rows: what was logged of the optimisation, JSON-able.
        weights: of the members that voted, by name; empty where nobody did.
    """
    path = folder / f"{unit.name}.safetensors"
    history = {"weights": dict(weights), "rows": [dict(row) for row in rows]}
    save_tensors(path, {"images": pixels.contiguous(), "labels": unit.targets}, {"history": json.dumps(history)})


def _files(artifact: Artifact) -> list[Path]:
    """Files of the units that the manifest lists; what else lies there, such as a second copy, is nobody's."""
    names = (name for name in artifact.manifest["files"] if name.startswith(f"{UNITS}/"))
    return [artifact.path / name for name in sorted(names) if name.endswith(".safetensors")]


def load_images(artifact: Artifact) -> tuple[Tensor, Tensor]:
    """Read distilled images and their labels: [classes * ipc, 3, size, size] uint8 and [classes * ipc].

    The order is that of the published folders: class by class, image i of a class is that of slot i.
    """
    slots: list[Tensor] = []
    labels: list[Tensor] = []
    for path in _files(artifact):
        with safe_open(path, "pt") as file:
            slots.append(file.get_tensor("images"))
            labels.append(file.get_tensor("labels"))
    images, classes = torch.cat(slots), torch.cat(labels)
    order = classes.argsort(stable=True)
    return images[order], classes[order]


def load_targets(artifact: Artifact) -> tuple[Tensor, int]:
    """Read the labels of distilled images [n], file by file, and their side in pixels, without reading the images."""
    labels, side = [], 0
    for path in _files(artifact):
        with safe_open(path, "pt") as file:
            labels.append(file.get_tensor("labels"))
            side = file.get_slice("images").get_shape()[-1]
    return torch.cat(labels), side


def pixel_bytes(artifact: Artifact) -> int:
    """Bytes of distilled images as pixels of 8 bits; the log beside them in their files is none of them."""
    count = 0
    for path in _files(artifact):
        with safe_open(path, "pt") as file:
            count += math.prod(file.get_slice("images").get_shape())
    return count


def bytes_beside_units(artifact: Artifact, *names: str) -> int:
    """Bytes of what a method keeps of its images beside pixels, such as real numbers and labels.

    Args:
        artifact: the images.
        names: of files that are no part of the set.
    """
    units = [name for name in artifact.manifest["files"] if name.startswith(f"{UNITS}/")]
    return artifact.bytes_without(*units, *names)


def load_history(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Read, by the unit's name, the weights of its members and the log rows of its stack."""
    histories = {}
    for path in _files(artifact):
        with safe_open(path, "pt") as file:
            histories[path.stem] = json.loads(file.metadata()["history"])
    return histories
