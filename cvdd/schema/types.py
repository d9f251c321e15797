"""Kinds of values that several parts of the configuration share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Verb = Literal["train", "distill", "relabel", "evaluate"]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


def _name(value: str) -> str:
    # Artefacts, points of sweeps and pictures have it in their paths, and must not end up in other directories.
    if not re.fullmatch(r"[\w+-][\w.+ -]*", value):
        raise ValueError(
            f"{value!r} cannot be part of a file's name; use letters, digits and _ + -, and after the first of them "
            "also . and spaces"
        )
    return value


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"[{value[0]:g},{value[1]:g}] must begin with the smaller number: [{value[1]:g},{value[0]:g}]")
    return value


Name = Annotated[str, AfterValidator(_name)]
Range = Annotated[tuple[Share, Share], BeforeValidator(_pair), AfterValidator(_ascending)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[_Decay, _Decay], BeforeValidator(_pair)]
_Change = Annotated[float, Field(ge=0, le=1)]
_Turn = Annotated[float, Field(ge=0, le=0.5)]
ColourChanges = Annotated[tuple[_Change, _Change, _Change, _Turn], BeforeValidator(_pair)]
# In the yaml files null stands for none: Hydra lets only that be replaced by keys that are not there yet.
Numbers = Annotated[dict[str, float], BeforeValidator(_none_is_empty)]


def whole_part(share: float, count: int) -> int:
    """Return how many of ``count`` things a share of them is, rounded down."""
    # Shares like 0.29 have no exact binary form, and 0.29 of 100 is 29.
    return int(round(share * count, 6))


def side_of_cut(size: int, share: float) -> int:
    """Side in pixels of a square that is cut out of images of ``size`` pixels."""
    return int(size * share + 0.5)
