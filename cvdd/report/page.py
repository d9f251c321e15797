"""The page of a run: one file that needs nothing around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cvdd.chain.compare import Distilled, Result
from cvdd.chain.context import Context
from cvdd.composition.portable import portable_config
from cvdd.composition.surroundings import FULL_DATA_ROW
from cvdd.report import headline, plots
from cvdd.report.columns import best_shown, labels_shown, measured_images
from cvdd.report.costs import all_artifacts, machine_seconds, open_members, stage_costs
from cvdd.report.drawing import DASHES, SERIES
from cvdd.report.gallery import make_gallery
from cvdd.report.predicted import predicted_costs
from cvdd.report.ranking import rank
from cvdd.report.terms import TITLES, member_terms, terms_of
from cvdd.report.verdict import verdict_sentence
from cvdd.report.votes import vote_table, votes_of, who_judges
from cvdd.schema import RunConfig
from cvdd.support.provenance import made_by_other_code
from cvdd.support.readable import readable_bytes, readable_seconds, significant, with_error

TEMPLATE = "page.html.j2"

Shown = TypeVar("Shown", Distilled, Result)


def render_page(
    context: Context, summary: dict[str, Any], distilled: Sequence[Distilled], results: Sequence[Result]
) -> str:
    """Write everything that a run found as one self-contained HTML page.

    Args:
        context: the configuration and its surroundings.
        summary: what :func:`cvdd.report.summary.summarise` collected.
        distilled: the distilled sets, the configuration's own first.
        results: the accuracies, likewise.
    """
    config = context.config
    distilled, results = _shown_first(context, distilled), _shown_first(context, results)
    main, members = distilled[0], open_members(context, summary)
    artifacts = all_artifacts(members, distilled, results)
    terms = member_terms(main.history, main.context.config)
    term_titles = {term: TITLES[term] for term in terms_of(terms)}
    return (
        _environment()
        .get_template(TEMPLATE)
        .render(
            title=f"{results[0].row} on {config.dataset.name}, IPC {config.ipc.images_per_class}",
            config=config,
            summary=summary,
            main=main,
            judges=who_judges(main.context.config),
            measured=measured_images(summary["dataset"]),
            of_one_seed=any(len(made.all_images) > 1 for made in distilled),
            results=[_row(result) for result in results],
            other_counts=len({result.images.metrics["images"] for result in results if result.images}) > 1,
            one_student=len({result.student for result in results}) == 1,
            sentences=[
                headline.headline(results),
                *filter(None, (headline.other_students(results), headline.reference(results), _published(summary))),
            ],
            verdict=_verdict(results),
            ranking=rank(results),
            colours=plots.row_colours(results),
            full_data=any(result.row == FULL_DATA_ROW for result in results),
            gallery=make_gallery(main),
            dots=plots.dot_plot(results),
            accuracy=plots.accuracy_curves(results),
            loss=plots.loss_curves(results),
            terms=terms,
            term_titles=term_titles,
            term_plot=plots.term_curves(terms) if term_titles else None,
            votes=vote_table(votes_of(main.history), list(summary["members"])),
            costs=stage_costs(members, artifacts, distilled, results),
            machines=machine_seconds(artifacts),
            predicted=predicted_costs(context),
            artifacts=artifacts,
            others=sum(made_by_other_code(artifact.manifest["code"]) for artifact in artifacts),
            code=_code(summary["code"]),
            libraries={
                key: value
                for key, value in summary["code"].items()
                if key not in ("commit", "changed", "cvdd", "source")
            },
            written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            yaml=portable_yaml(config),
            series=SERIES,
            dashes=len(DASHES),
        )
    )


def _shown_first(context: Context, made: Sequence[Shown]) -> list[Shown]:
    """Put the row that the page is about first: that of a sweep's point, or the configuration's own."""
    return sorted(made, key=lambda one: bool(context.shown) and one.row != context.shown)


def portable_yaml(config: RunConfig) -> str:
    """Write a configuration as YAML without this machine's directories."""
    tree = portable_config(config)
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cvdd", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": readable_bytes, "seconds": readable_seconds, "significant": significant}
    environment.globals["with_error"] = with_error
    return environment


def _row(result: Result) -> dict[str, Any]:
    summary = result.summary()
    return {**summary, "labels_kept": labels_shown(summary), "best": best_shown(summary)}


def _verdict(results: Sequence[Result]) -> str:
    baseline = headline.find_baseline(results, results[0])
    return "unknown" if baseline is None else headline.difference(results[0], baseline).verdict


def _published(summary: Mapping[str, Any]) -> str | None:
    verdict = summary.get("verdict")
    return None if verdict is None else f"Published: {verdict_sentence(verdict)}.".replace("+-", "\u00b1")


def _code(code: dict[str, Any]) -> str:
    commit = code.get("commit")
    if not commit:
        return f"cvdd {code['cvdd']}, commit unknown"
    return f"cvdd {code['cvdd']}, commit {commit[:12]}{' with uncommitted changes' if code.get('changed') else ''}"
