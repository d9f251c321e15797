"""Training curves as files."""

from __future__ import annotations

import json
from collections.abc import Sequence


def curve_json(curve: Sequence[dict[str, float]]) -> bytes:
    """One JSON row per epoch, one line each."""
    return ("[\n" + ",\n".join(json.dumps(row) for row in curve) + "\n]\n").encode()
