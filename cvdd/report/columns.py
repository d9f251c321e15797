"""What a table has of a result, whoever writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cvdd.support.readable import readable_bytes

SIZES_AND_COSTS = (
    "image_count",
    "image_bytes",
    "label_bytes",
    "image_seconds",
    "image_process_seconds",
    "image_peak_memory_bytes",
    "student_seconds",
)
RESULT = (
    "row",
    "student",
    "protocol",
    "n",
    "top1",
    "std",
    "standard_error",
    "best_top1",
    "top5",
    "loss",
    *SIZES_AND_COSTS,
    "seeds",
)
"""Keys of :meth:`cvdd.chain.compare.Result.summary`."""


def best_shown(result: Mapping[str, Any]) -> str:
    """Write the accuracy at the best epoch, where one was chosen."""
    return "-" if result["best_top1"] is None else f"{result['best_top1']:.1f}"


def labels_shown(result: Mapping[str, Any]) -> str:
    """Write how many bytes the labels of a row have, or why they have none."""
    return str(result.get("label_note") or readable_bytes(result.get("label_bytes")))


def measured_images(data: Mapping[str, Any]) -> Literal["test", "validation"]:
    """Say which images accuracies are of.

    Args:
        data: identity of the data set.
    """
    return "validation" if data["test"].get("evaluate_on") == "validation" else "test"
