"""Curves along which rates and crops change."""

from __future__ import annotations

import math


def cosine(step: float, total: float) -> float:
    """Cosine from 1 at step 0 to 0 at ``total``."""
    return 0.5 * (1 + math.cos(math.pi * step / total))
