"""What was probably meant by a name that is not there. It imports nothing that takes time."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(given: str, known: Iterable[str], otherwise: str = "; see --help") -> str:
    """Return the part of a message that names what was probably meant.

    Args:
        given: what was typed.
        known: what there is.
        otherwise: the part where nothing is similar.
    """
    match = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {match[0]}?" if match else otherwise
