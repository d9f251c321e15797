"""The stages of the chain, in the order in which they run, and which artefacts belong to each."""

from __future__ import annotations

STAGES = ("members", "patches", "priors", "images", "labels", "students")

_OF_KIND = {
    "members": "members",
    "encoders": "members",
    "trajectories": "members",
    "teachers": "members",
    "patches": "patches",
    "herds": "patches",
    "easiest": "patches",
    "medium": "patches",
    "given": "patches",
    "difficulty": "patches",
    "candidates": "patches",
    "labels": "labels",
    "students": "students",
}


def stage_of(kind: str) -> str:
    """Return the stage to which an artefact of this kind belongs, unless it serves another one."""
    return _OF_KIND.get(kind, "images")
