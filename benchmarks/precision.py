"""Half precision against full precision, from a finished run: ``python -m benchmarks.precision DIR``.

After ``python evaluate.py experiment=precision paths.output=DIR``: the accuracy of the students, and the loss of the
images at every log row. Both sides begin with the same images and draw the same views, so differences are also taken
seed by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cvdd.artifact import Artifact
from cvdd.artifact.manifest import read_manifest
from cvdd.chain.unit_files import load_history

FULL = "fp32"


def loss_curve(images: Artifact) -> dict[int, float]:
    """Mean loss over the units of a set of images, by iteration."""
    losses: dict[int, list[float]] = {}
    for history in load_history(images).values():
        for row in history["rows"]:
            losses.setdefault(row["iteration"], []).append(row["loss"])
    return {iteration: statistics.mean(values) for iteration, values in losses.items()}


def curves_of(store: Path, students: Sequence[str]) -> list[dict[int, float]]:
    """Loss curves of the images behind students, one for each student."""
    curves = []
    for name in students:
        parents = read_manifest(store / "students" / name).manifest["parents"]
        (images,) = [f"{parent['name']}-{parent['digest']}" for parent in parents if parent["kind"] == "images"]
        curves.append(loss_curve(read_manifest(store / "images" / images)))
    return curves


def error_of(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def paired(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean difference of two samples that belong together pair by pair, and its standard error."""
    differences = [first - second for first, second in zip(one, other, strict=True)]
    return statistics.mean(differences), error_of(differences)


def with_error(values: Sequence[float]) -> str:
    """Mean +- standard error."""
    return f"{statistics.mean(values):.4g} +- {error_of(values):.2g}"


def show(store: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Print accuracies and loss curves, and the differences from full precision."""
    base, *others = results
    names = [FULL, *(row["row"] for row in others)]
    print("| top-1 | n | mean +- standard error | difference from fp32, by seed |")
    print("|---|---|---|---|")
    for name, row in zip(names, results, strict=True):
        mean, error = paired(row["top1_by_seed"], base["top1_by_seed"])
        difference = "" if row is base else f"{mean:+.2f} +- {error:.2f}"
        print(f"| {name} | {row['n']} | {with_error(row['top1_by_seed'])} | {difference} |")
    reference = curves_of(store, base["students"])
    for name, row in zip(names[1:], others, strict=True):
        curves = curves_of(store, row["students"])
        if curves == reference:
            # The same images.
            continue
        print(f"\n| iteration | loss, {FULL} | loss, {name} | difference, by seed | in errors of the fp32 mean |")
        print("|---|---|---|---|---|")
        for iteration in reference[0]:
            one = [curve[iteration] for curve in curves]
            other = [curve[iteration] for curve in reference]
            mean, error = paired(one, other)
            shown = (
                f"{with_error(other)} | {with_error(one)} | {mean:+.3g} +- {error:.2g} | {mean / error_of(other):+.2f}"
            )
            print(f"| {iteration} | {shown} |")


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory of a finished experiment=precision")
    parser.add_argument("--store", type=Path, default=Path("store"), help="its paths.store")
    wanted = parser.parse_args()
    show(wanted.store, json.loads((wanted.output / "metrics.json").read_text())["results"])


if __name__ == "__main__":
    main()
