"""What a run leaves behind: metrics.json, results.csv and the page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvdd.chain.compare import Distilled, Result
from cvdd.chain.context import Context
from cvdd.chain.members import make_member
from cvdd.report.columns import RESULT
from cvdd.report.ranking import rank
from cvdd.report.verdict import hold_against
from cvdd.report.votes import votes_of
from cvdd.schema import RunConfig, members_used
from cvdd.support.provenance import code_version
from cvdd.synthesis.agreement import mean_agreement

COLUMNS = (*RESULT, "images", "labels")


def summarise(
    context: Context, distilled: Sequence[Distilled], results: Sequence[Result], commands: Sequence[str]
) -> dict[str, Any]:
    """Collect everything about a run that is worth keeping, as JSON."""
    config = context.config
    main = distilled[0]
    members = {name: make_member(context, name) for name in members_used(config)}
    return {
        "commands": list(commands),
        "code": code_version(),
        "dataset": context.data().identity,
        "classes": list(context.data().classes),
        "results": [result.summary() for result in results],
        "ranking": [ranking.summary() for ranking in rank(results)],
        "verdict": _verdict(config, results),
        "members": {
            name: {
                "metrics": dict(member.metrics),
                "prior": main.priors.values.get(name),
                "label_weight": dict(zip(main.labels.teachers, main.labels.weights, strict=True)).get(name),
                "seconds": member.manifest["cost"]["wall_seconds"],
                "artifact": member.path.name,
            }
            for name, member in members.items()
        },
        "votes": votes_of(main.history),
        "agreement": mean_agreement(main.history),
        "config": config.model_dump(mode="json"),
    }


def _verdict(config: RunConfig, results: Sequence[Result]) -> dict[str, Any] | None:
    from cvdd.report.experiments import changed_fields

    changed = () if config.expected is None else changed_fields(config.model_dump(mode="json"))
    return hold_against(config.expected, results, changed)


def write_results(
    context: Context, summary: dict[str, Any], distilled: Sequence[Distilled], results: Sequence[Result]
) -> Path:
    """Write metrics.json, results.csv and report.html into the run's directory; return the page's path."""
    from cvdd.report.page import render_page

    output = context.config.paths.output
    (output / "metrics.json").write_text(json.dumps(summary, indent=1) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(summary["results"])
    (output / "results.csv").write_text(table.getvalue())
    page = output / "report.html"
    page.write_text(render_page(context, summary, distilled, results))
    return page
