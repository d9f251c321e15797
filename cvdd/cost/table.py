"""The table that ``cost=true`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from cvdd.cost.prediction import StageCost
from cvdd.support.console import new_console, new_table, print_table
from cvdd.support.readable import readable_bytes, readable_seconds


def readable_count(count: float) -> str:
    """Write a large number for people."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}E"


def readable_time(seconds: float | None) -> str:
    """Write a predicted duration for people, also of years."""
    if seconds is None:
        return "unknown"
    days = seconds / 86400
    return readable_seconds(seconds) if days < 4 else f"{days:,.0f} days"


def what(stage: StageCost) -> str:
    """Say what a stage consists of."""
    parts = [f"{count:,} {_singular(name) if count == 1 else name}" for name, count in stage.parts.items()]
    return ", ".join(parts)


def _singular(name: str) -> str:
    first, *rest = name.split(" ")
    return " ".join([f"{first[:-3]}y" if first.endswith("ies") else first.removesuffix("s"), *rest])


def seconds_cell(stage: StageCost) -> str:
    """Say how long a stage takes, and what of it is there."""
    if stage.all_made:
        return "0 s made"
    made = f" ({len(stage.made)} of {stage.artifacts} made)" if stage.made else ""
    return readable_time(stage.seconds) + made


def cost_table(stages: Sequence[StageCost], title: str) -> Table:
    """Lay out the stages and their sum."""
    table = new_table(title)
    table.add_column("stage", no_wrap=True)
    table.add_column("what", overflow="fold")
    for column in ("steps", "FLOPs", "time", "memory", "images", "labels", "other"):
        table.add_column(column, justify="right", no_wrap=column != "time")
    for stage in stages:
        table.add_row(
            stage.stage,
            what(stage),
            readable_count(stage.steps),
            readable_count(stage.flops),
            seconds_cell(stage),
            readable_bytes(stage.peak_memory or None),
            *_bytes([stage]),
        )
    table.add_section()
    table.add_row(
        "all",
        "",
        readable_count(sum(stage.steps for stage in stages)),
        readable_count(sum(stage.flops for stage in stages)),
        _sum_of_times(stages),
        readable_bytes(max((stage.peak_memory for stage in stages), default=0) or None),
        *_bytes(stages),
    )
    return table


def _sum_of_times(stages: Sequence[StageCost]) -> str:
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    if len(known) == len(stages):
        return readable_time(sum(known))
    return f"at least {readable_time(sum(known))}" if sum(known) else readable_time(None)


def _bytes(stages: Sequence[StageCost]) -> list[str]:
    sums = [sum(getattr(stage, f"{kind}_bytes") for stage in stages) for kind in ("image", "label", "other")]
    return [readable_bytes(count) if count else "" for count in sums]


def print_costs(stages: Sequence[StageCost], title: str, notes: Sequence[str]) -> None:
    """Print the table, and what should be known with it."""
    print_table(cost_table(stages, title))
    for note in notes:
        new_console().print(note, markup=False, highlight=False)
