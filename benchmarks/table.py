"""What ``make bench`` prints; ``python -m benchmarks.table FILE`` prints it again, also of a run that was cut short."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "case",
    "quantity",
    "reference",
    "engine",
    "ratio (range)",
    "of limit",
    "warm-up s",
    "once per run s",
    "peak MiB",
)


def markdown(result: Mapping[str, Any]) -> str:
    """Return one table of all cases, with the machine above it and what needs to be known below."""
    machine, limits = result["machine"], result["limits"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    rates = ", ".join(
        f"{name} {limits['matrix'][name] / 1e12:.3g} (convolution {limits['convolution'][name] / 1e12:.3g}) TFLOP/s"
        for name in limits["matrix"]
    )
    commit = (result["commit"] or "unknown")[:10] + (" with changes" if result["changed"] else "")
    above = [
        f"{where}; torch {result['versions']['torch']}; cvdd {result['versions']['cvdd']}, commit {commit}.",
        f"Limits measured: {rates}, copy {limits['copy'] / 1e9:.3g} GB/s. Medians of {result['repetitions']} "
        "alternating repetitions; two numbers with a slash are of reference / engine.",
    ]
    above += _told(result["cases"])
    rows = [_row(case) for case in result["cases"]] + _means(result["cases"])
    if machine["load_before"] > 0.25 * machine["cores"]:
        above.append(f"The machine was not idle: its load was {machine['load_before']:.1f} before the first case.")
    below = [f"Left out for lack of time: {', '.join(result['left_out'])}."] if result["left_out"] else []
    below += _compiled(result.get("compile_seconds", {}), result.get("traced", {}))
    below += [f"Failed: {name} ({why})." for name, why in result.get("failed", {}).items()]
    return "\n\n".join(["\n".join(above), "\n".join(_aligned([COLUMNS, *rows])), *below, *result["notes"]])


def _told(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what the configuration was told beside each case's own recipe."""
    told: dict[str, list[str]] = {}
    for case in cases:
        for override in case["overrides"]:
            told.setdefault(override, []).append(case["name"])
    return [
        f"With {override}" + ("." if len(names) == len(cases) else f": {', '.join(names)}.")
        for override, names in sorted(told.items())
    ]


def _compiled(seconds: Mapping[str, float], traced: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say how long compilers took that ran before anything was measured."""
    if not seconds:
        return []
    each = [
        f"{key} {taken:.0f} s" + (f", traced in {traced[key]['seconds']:.0f} s" if key in traced else "")
        for key, taken in seconds.items()
    ]
    return [f"Compiled side by side before anything was measured: {'; '.join(each)}. It is no part of the warm-up."]


def _row(case: Mapping[str, Any]) -> Sequence[str]:
    sides = [case["reference"], case["engine"]]
    low, high = case["ratio_range"]
    peaks = [side["peak_bytes"] for side in sides]
    return (
        case["name"],
        case["quantity"],
        *(f"{side['shown']:.3g}" for side in sides),
        f"{case['ratio']:.2f} ({low:.2f} to {high:.2f})",
        f"{100 * case['fraction_of_limit']:.2g} %",
        " / ".join(f"{sum(side['warm_up']):.1f}" for side in sides),
        " / ".join(f"{statistics.median(side['outside']):.2g}" for side in sides),
        " / ".join("-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks),
    )


def _means(cases: Sequence[Mapping[str, Any]]) -> list[Sequence[str]]:
    """Means over all pairs of members, where several were compared at the same size."""
    sizes: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for case in cases:
        if found := re.match(r"recover_[a-z]+_[0-9]+", case["name"]):
            # What is computed in another way is no further pair of the same.
            sizes.setdefault((found[0], *case["overrides"]), []).append(case)
    rows = []
    for (name, *_), group in sizes.items():
        if len(group) > 1:
            reference, engine = (statistics.mean(case[side]["shown"] for case in group) for side in SIDES)
            shown = f"{reference:.3g}", f"{engine:.3g}", f"{reference / engine:.2f}"
            rows.append((f"mean of {len(group)}: {name}", group[0]["quantity"], *shown, "", "", "", ""))
    return rows


SIDES = ("reference", "engine")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
