"""What each member contributed to the loss while images were made."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cvdd.chain.votes import effective_terms
from cvdd.schema import RunConfig

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "ce": "cross-entropy",
        "bn": "BatchNorm term times its weight",
        "features": "distance of features times its weight",
    }
)
"""What people call the terms."""


@dataclass(frozen=True)
class MemberTerms:
    """The terms of one member, as they enter the loss but for its vote.

    Attributes:
        iterations: of the log rows.
        curves: by term, its values times its weight, mean over the units in which the member votes.
        units: number of units in which it votes.
        vote: its share of the vote, mean over those units.
        share: part of the loss that it contributes to those units, votes included, over the last quarter.
    """

    iterations: tuple[int, ...]
    curves: Mapping[str, tuple[float, ...]]
    units: int
    vote: float
    share: float

    @property
    def late(self) -> dict[str, float]:
        """Each term, mean over the last quarter of the log rows; a single row depends on its crop."""
        count = max(len(self.iterations) // 4, 1)
        return {term: statistics.fmean(values[-count:]) for term, values in self.curves.items()}


def terms_of(members: Mapping[str, MemberTerms]) -> list[str]:
    """List the terms that any of these members has, in the order of :data:`TITLES`."""
    return [term for term in TITLES if any(term in member.curves for member in members.values())]


def member_terms(history: Mapping[str, Mapping[str, Any]], config: RunConfig) -> dict[str, MemberTerms]:
    """Average the log rows of a distilled set by member; empty where nothing was optimised.

    A log row is the mean over the units of its stack that have begun, and each of these carries it, so the mean over
    units is that of all that have begun, whatever the stacks.

    Args:
        history: by the unit's name, ``weights`` and ``rows``, as stored with the images.
        config: of the images.
    """
    # By iteration, because a run that was resumed with another log_every has rows at other places.
    said: dict[str, dict[int, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[str, list[float]] = defaultdict(list)
    votes: dict[str, list[float]] = defaultdict(list)
    for unit in history.values():
        rows: Sequence[Mapping[str, Any]] = unit["rows"]
        if not rows:
            continue
        parts: dict[str, float] = {}
        for name, weight in unit["weights"].items():
            # A voter that judges in turn may not have judged yet.
            heard = [row for row in rows if name in row["ce"]]
            if not heard:
                continue
            terms = [effective_terms(config, name, row) for row in heard]
            for row, of_row in zip(heard, terms, strict=True):
                said[name][row["iteration"]].append(of_row)
            late = terms[-max(len(heard) // 4, 1) :]
            parts[name] = weight * statistics.fmean(sum(of_row.values()) for of_row in late)
            votes[name].append(weight)
        total = sum(parts.values())
        for name, part in parts.items():
            shares[name].append(part / total if total else 0.0)
    return {
        name: MemberTerms(
            tuple(sorted(said[name])),
            _curves([said[name][iteration] for iteration in sorted(said[name])]),
            len(votes[name]),
            statistics.fmean(votes[name]),
            statistics.fmean(shares[name]),
        )
        for name in config.committee.members
        if name in votes
    }


def _curves(said: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, tuple[float, ...]]:
    return {
        term: tuple(statistics.fmean(of_unit[term] for of_unit in of_units) for of_units in said)
        for term in TITLES
        if term in said[0][0]
    }
