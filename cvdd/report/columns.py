"""What a table has of a result, whoever writes it."""

from __future__ import annotations

SIZES_AND_COSTS = (
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
