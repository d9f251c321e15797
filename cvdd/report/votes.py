"""The vote of the committee as a table: members by slots."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cvdd.schema import RunConfig, voters_of_a_slot

SLOTS = 50
"""Most columns that are shown."""
NUMBERED = 12
"""With more columns there is no room for numbers."""


@dataclass(frozen=True)
class VoteTable:
    """Shares of the members by slot.

    Attributes:
        slots: numbers of the slots that are shown.
        total: number of all slots.
        rows: by member's name, its share at each slot; None where it does not vote.
        numbered: whether there is room for the numbers.
    """

    slots: tuple[int, ...]
    total: int
    rows: dict[str, tuple[float | None, ...]]
    numbered: bool


def who_judges(config: RunConfig) -> str | None:
    """Say in half a sentence which members decide on the images of a slot, and how; None where none do."""
    method, committee = config.method, config.committee
    if not method.recovers:
        return None
    count, everyone = voters_of_a_slot(config), len(committee.members)
    if count == 1:
        listed = isinstance(method.voters, list)
        return f"{method.voters[0]} judges every slot alone" if listed else "one member judges a slot alone"
    who = f"{count} of {everyone} members" if count < everyone else "all members"
    if method.turns == "in_turn":
        return f"{who} judge a slot, one an iteration, in turn"
    how = {"prior": f"T = {config.temperature.vote:g}", "equal": "with equal weights", "random": "with random weights"}
    drawn = "one an iteration, drawn by its weight, " if method.turns == "sampled" else ""
    return f"{who} vote on a slot, {drawn}{how[committee.voter]}"


def votes_of(history: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List the votes by unit, as JSON, from the history of a distilled set."""
    return [{"unit": unit, **one["weights"]} for unit, one in history.items()]


def vote_table(votes: Sequence[Mapping[str, object]], members: Sequence[str]) -> VoteTable | None:
    """Arrange the votes by slot; all units of a slot have the same.

    Args:
        votes: by unit, its name under ``unit`` and the share of each member that votes.
        members: names in the order of the rows.

    Returns:
        the table, or None if nobody voted.
    """
    by_slot: dict[int, Mapping[str, object]] = {}
    for vote in votes:
        slot = re.match(r"slot(\d+)", str(vote["unit"]))
        if slot is not None and len(vote) > 1:
            by_slot.setdefault(int(slot[1]), vote)
    if not by_slot:
        return None
    shown = sorted(by_slot)[:SLOTS]
    rows = {name: tuple(_share(by_slot[slot], name) for slot in shown) for name in members}
    return VoteTable(tuple(shown), len(by_slot), rows, len(shown) <= NUMBERED)


def _share(vote: Mapping[str, object], name: str) -> float | None:
    share = vote.get(name)
    return float(share) if isinstance(share, (int, float)) else None
