"""``evaluate``: students, and everything that a run shows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from cvdd.artifact import Artifact
from cvdd.chain.assistants import assist, assisted
from cvdd.chain.compare import Result, compare, warn_of_equal_rows
from cvdd.chain.context import Context
from cvdd.composition.launching import share_of_work
from cvdd.report.columns import SIZES_AND_COSTS, measured_images
from cvdd.report.summary import summarise, write_results
from cvdd.report.tables import print_ranking, print_results, print_verdict
from cvdd.verbs.made import Made

log = logging.getLogger(__name__)

SHOWN = ("top1", "standard_error", "n", "best_top1", *SIZES_AND_COSTS)
"""What a dashboard compares over runs."""


def evaluate(context: Context, commands: list[str]) -> Made:
    """Measure all rows; the metric is the top-1 accuracy of the first student on the row that the command is about."""
    index, total = share_of_work()
    if index:
        # Of several jobs each begins elsewhere; students, which cannot be divided, are then not waited for one by one.
        assist(context.config, index, total)
    with assisted(context.config):
        distilled, results = compare(context)
    warn_of_equal_rows(results)
    summary = summarise(context, distilled, results, commands)
    page = write_results(context, summary, distilled, results)
    for result in summary["results"]:
        prefix = f"result/{result['row']}/{result['student']}"
        measured = {f"{prefix}/{key}": result[key] for key in ("top1", "best_top1") if result[key] is not None}
        context.log(measured, step=0)
    # The first row is the command's own.
    shown = next((one for one in summary["results"] if one["row"] == context.shown), summary["results"][0])
    context.log(_of_shown_row(shown), step=0)
    artifacts: dict[str, Artifact] = {}
    for made in results:
        artifacts |= _artifacts(made)
    context.log_artifacts(artifacts)
    print_results(summary["results"], measured_images(summary["dataset"]))
    print_ranking(summary["ranking"])
    print_verdict(summary["verdict"])
    log.info("page: %s", page)
    return Made(float(shown["top1"]), artifacts, summary["results"])


def _of_shown_row(summary: Mapping[str, Any]) -> dict[str, float]:
    """What a dashboard compares over runs: of the row that a command is about, under keys that do not name it."""
    values = {key: summary[key] for key in SHOWN}
    count, seconds = summary["image_count"], summary["image_seconds"]
    values["images_per_second"] = count / seconds if count and seconds else None
    return {f"result/{key}": float(value) for key, value in values.items() if value is not None}


def _artifacts(result: Result) -> dict[str, Artifact]:
    students = zip(result.seeds, result.students, strict=True)
    artifacts = {f"{result.row}/{result.student}/seed{seed}": student for seed, student in students}
    if result.images is not None:
        artifacts[f"{result.row}/images"] = result.images
    if result.labels is not None and result.labels.artifact is not None:
        artifacts[f"{result.row}/labels"] = result.labels.artifact
    return artifacts
