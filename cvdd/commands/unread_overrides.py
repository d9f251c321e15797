"""Which of the overrides that were typed change nothing of what a command makes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from cvdd.chain.context import Context
from cvdd.composition.rows import differences
from cvdd.composition.surroundings import is_presentation, is_shared_by_rows
from cvdd.cost.plan import Piece, other_metrics, plan_pieces, planning_beside
from cvdd.cost.sizes import NotMade
from cvdd.schema import RunConfig
from cvdd.support.config_base import ConfigError

log = logging.getLogger(__name__)

Alternative = tuple[str, RunConfig]
"""An override as it was typed, and the configuration of the same command without it."""


def warn_of_unread(context: Context, alternatives: Iterable[Alternative]) -> None:
    """Name the overrides without which a command makes the same.

    A warning and no error, because a grid of overrides has points at which some of them mean nothing: a temperature
    where one member votes alone.

    Args:
        context: of the command.
        alternatives: for each override that is to be looked at.
    """
    unread = unread_overrides(context.config, alternatives, lambda other: _pieces(context, other))
    if unread:
        log.warning(
            "%s: nothing here reads %s. Members, images, labels and students are the same without %s",
            " ".join(unread),
            *(("it", "it") if len(unread) == 1 else ("these", "any one of them")),
        )


def unread_overrides(
    config: RunConfig, alternatives: Iterable[Alternative], pieces: Callable[[RunConfig], Sequence[Piece]]
) -> list[str]:
    """List the overrides that are of something that is made, say something else than the default, and change nothing.

    Args:
        config: of the command.
        alternatives: see :func:`warn_of_unread`.
        pieces: what a command would make.
    """
    with_all: frozenset[str] | None = None
    unread: list[str] = []
    for typed, other in alternatives:
        if not _differs(config, other):
            continue
        with_all = _digests(pieces(config)) if with_all is None else with_all
        if not with_all:
            break
        if with_all == _digests(pieces(other)):
            unread.append(typed)
    return unread


def _differs(config: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations differ in more than in what a run is called and how often it tells of itself."""
    return any(not is_presentation(key) for key in differences(_made(other), _made(config)))


def _made(config: RunConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return {key: value for key, value in tree.items() if not is_shared_by_rows(key)}


def _pieces(context: Context, config: RunConfig) -> list[Piece]:
    """List all of a chain, whichever of its verbs is asked for: the same is typed for each of them."""
    try:
        whole = config.model_copy(update={"verb": "evaluate"})
        return plan_pieces(planning_beside(context, whole, unmeasured=other_metrics))
    except (ConfigError, ValidationError, NotMade):
        # Of other settings rows may be impossible.
        return []


def _digests(pieces: Sequence[Piece]) -> frozenset[str]:
    return frozenset(f"{piece.artifact.kind}/{piece.artifact.digest}" for piece in pieces)
