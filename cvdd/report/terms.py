"""What each member contributed to the loss while images were made."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvdd.chain.votes import effective_terms
from cvdd.schema import RunConfig


@dataclass(frozen=True)
class MemberTerms:
    """The two terms of one member, as they enter the loss but for its vote.

    Attributes:
        iterations: of the log rows.
        ce: weighted cross-entropy, mean over the units in which the member votes.
        bn: weighted BatchNorm term, likewise.
        units: number of units in which it votes.
        vote: its share of the vote, mean over those units.
        share: part of the loss that it contributes to those units, votes included, over the last quarter.
    """

    iterations: tuple[int, ...]
    ce: tuple[float, ...]
    bn: tuple[float, ...]
    units: int
    vote: float
    share: float

    @property
    def late(self) -> tuple[float, float]:
        """Both terms, mean over the last quarter of the log rows; a single row depends on its crop."""
        count = max(len(self.ce) // 4, 1)
        return statistics.fmean(self.ce[-count:]), statistics.fmean(self.bn[-count:])


def member_terms(history: Mapping[str, Mapping[str, Any]], config: RunConfig) -> dict[str, MemberTerms]:
    """Average the log rows of a distilled set by member; empty where nothing was optimised.

    A log row is the mean over the units of its stack, and every unit carries the rows of its stack, so the mean over
    units is that of all units, whatever the stacks.

    Args:
        history: by the unit's name, ``weights`` and ``rows``, as stored with the images.
        config: of the images.
    """
    # By iteration, because a run that was resumed with another log_every has rows at other places.
    ce: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    bn: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
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
            late = heard[-max(len(heard) // 4, 1) :]
            for row in heard:
                one, other = effective_terms(config, name, row["ce"][name], row["bn"][name])
                ce[name][row["iteration"]].append(one)
                bn[name][row["iteration"]].append(other)
            parts[name] = weight * statistics.fmean(
                sum(effective_terms(config, name, row["ce"][name], row["bn"][name])) for row in late
            )
            votes[name].append(weight)
        total = sum(parts.values())
        for name, part in parts.items():
            shares[name].append(part / total if total else 0.0)
    return {
        name: MemberTerms(
            tuple(sorted(ce[name])),
            tuple(statistics.fmean(ce[name][iteration]) for iteration in sorted(ce[name])),
            tuple(statistics.fmean(bn[name][iteration]) for iteration in sorted(bn[name])),
            len(votes[name]),
            statistics.fmean(votes[name]),
            statistics.fmean(shares[name]),
        )
        for name in config.committee.members
        if name in votes
    }
