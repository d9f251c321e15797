"""``evaluate``: students, and everything that a run shows."""

from __future__ import annotations

import logging

from cvdd.assistants import assist, assisted
from cvdd.chain.compare import compare
from cvdd.context import Context
from cvdd.launching import share_of_work
from cvdd.report.summary import summarise, write_results
from cvdd.report.tables import print_results, print_verdict

log = logging.getLogger(__name__)


def evaluate(context: Context, commands: list[str]) -> float | None:
    """Measure all rows; return the mean top-1 accuracy of the configuration's own first row."""
    index, total = share_of_work()
    if index:
        # Of several jobs each begins elsewhere; students, which cannot be divided, are then not waited for one by one.
        assist(context.config, index, total)
    with assisted(context.config):
        distilled, results = compare(context)
    summary = summarise(context, distilled, results, commands)
    page = write_results(context, summary, distilled, results)
    for result in summary["results"]:
        prefix = f"result/{result['row']}/{result['student']}"
        context.log({f"{prefix}/top1": result["top1"], f"{prefix}/best_top1": result["best_top1"]}, step=0)
    print_results(summary["results"])
    print_verdict(summary["verdict"])
    log.info("page: %s", page)
    return float(summary["results"][0]["top1"])
