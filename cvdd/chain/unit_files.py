"""Files of units: the images that every method makes, in the form that people, labels and students read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cvdd.tensor_files import save_tensors
from cvdd.units import Unit


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
