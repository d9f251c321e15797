"""``train``: committee members."""

from __future__ import annotations

from cvdd.chain.members import make_member
from cvdd.context import Context
from cvdd.report.tables import print_members


def train(context: Context, commands: list[str]) -> float | None:
    """Make all members; return their mean test accuracy."""
    members = {name: make_member(context, name) for name in context.config.committee.members}
    print_members(context.config, members)
    return sum(float(member.metrics["test_top1"]) for member in members.values()) / len(members)
